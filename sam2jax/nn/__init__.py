"""Flax Linen modules: one file for each box of the paper's figure."""
