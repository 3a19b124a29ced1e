"""Pure functions without parameters."""
