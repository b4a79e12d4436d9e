"""Forms of weights in storage and on links, and the codecs that turn them into weights again."""
