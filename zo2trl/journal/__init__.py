"""The append-only log of finished steps, and the logbook of measurements beside it."""
