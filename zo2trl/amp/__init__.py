"""What a unit looks like on the wire between its home and the device."""
