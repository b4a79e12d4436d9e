"""The mathematics of zeroth-order training: directions, estimators, update rules. No I/O, no model."""
