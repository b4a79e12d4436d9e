"""Objectives that a run may optimise instead of the loss of its trainer."""
