"""This room reads and writes checkpoints: it loads, converts, exports, verifies and rebuilds weights."""
