"""The processes of one training and the messages they exchange."""
