"""Checkpoints read and written: loading, converting, exporting, verifying and rebuilding weights."""
