"""This package holds objectives that a run may optimise instead of its trainer's loss."""
