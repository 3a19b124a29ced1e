"""The memory bank: an immutable value of fixed capacity, with its reads and writes."""

from sam2jax.memory.bank import MemoryBank, empty, read, write

__all__ = ["MemoryBank", "empty", "read", "write"]
