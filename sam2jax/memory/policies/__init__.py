"""Policies that other trackers built on SAM 2 have made known, a file each."""
