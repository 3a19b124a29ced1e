"""The memory bank: an immutable value of fixed capacity, and the policies of what it keeps."""

from sam2jax.memory.bank import MemoryBank, Room, empty
from sam2jax.memory.policies.dam4sam import dam4sam
from sam2jax.memory.policies.rcms import rcms
from sam2jax.memory.policies.sam2long import sam2long
from sam2jax.memory.policies.sam3_score import sam3_score
from sam2jax.memory.policies.samurai import samurai
from sam2jax.memory.policy import SAM2, Choice, MemoryPolicy, Now, Seen, sam2

POLICIES = {
    "sam2": sam2,
    "sam3_score": sam3_score,
    "samurai": samurai,
    "dam4sam": dam4sam,
    "rcms": rcms,
    "sam2long": sam2long,
}

__all__ = [
    "POLICIES",
    "SAM2",
    "Choice",
    "MemoryBank",
    "MemoryPolicy",
    "Now",
    "Room",
    "Seen",
    "dam4sam",
    "empty",
    "rcms",
    "sam2",
    "sam2long",
    "sam3_score",
    "samurai",
]
