"""The memory bank: an immutable value of fixed capacity, and what is read from and written to it."""

from sam2jax.memory.bank import MemoryBank, empty, read, write

__all__ = ["MemoryBank", "empty", "read", "write"]
