"""Predictors with the official names and calls, on the host's side of the pure core."""
