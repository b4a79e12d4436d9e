"""Which bytes belong together: units, segments, visit points, and the layout file that describes them."""
