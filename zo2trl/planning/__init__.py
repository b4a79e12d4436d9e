"""Placement of units, write schedule and budgets, from one cost model. Pure functions below the tiers."""
