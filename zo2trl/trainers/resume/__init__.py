"""Checkpoints of the trainers, and resuming a run from its journal."""
