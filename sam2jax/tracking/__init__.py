"""The tracker: one frame (`step`), and the same step scanned over a clip (`track`)."""
