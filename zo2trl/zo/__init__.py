"""The mathematics of zeroth-order training: directions, estimators, updates. No I/O, no model."""
