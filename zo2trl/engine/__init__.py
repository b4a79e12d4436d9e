"""One ZO step: passes in lockstep over leased weights."""
