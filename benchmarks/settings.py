"""What is measured, and with what."""

from __future__ import annotations

import dataclasses

import jax

from sam2jax.config import VARIANTS, SAM2Config

SEED = 7  # of the weights: live ones, as random ones do the same work as trained ones


@dataclasses.dataclass(frozen=True)
class Settings:
    """Shared by all sections."""

    variants: tuple[str, ...]
    image_size: int | None  # None: each variant's own
    dtype: str
    frames: int  # tracked in one program
    objects: tuple[int, ...]
    videos: tuple[int, ...]
    runs: int  # pairs of runs behind a row
    lengths: tuple[int, ...]  # of clips whose memory is compared
    train_size: int  # pixels a side of frames in training, at most
    side: int  # points per side of automatic masks
    picture: str | None
    compiled: str | None  # mode of torch.compile, for the official package
    official: bool  # there is an official package to compare with

    def config(self, variant: str) -> SAM2Config:
        config = VARIANTS[variant]
        size = self.image_size or config.image_size
        # The official package fills holes by a CUDA extension alone; here neither side does.
        config = dataclasses.replace(config, image_size=size, dtype=self.dtype, fill_hole_area=0)
        # It computes objects as one batch; so does a device that one of them does not fill.
        together = 8 if jax.default_backend() == "gpu" else config.objects_at_once
        return dataclasses.replace(config, objects_at_once=together)

    @property
    def first(self) -> SAM2Config:
        """The model of sections that take one."""
        return self.config(self.variants[0])

    @property
    def exact(self) -> SAM2Config:
        """The same in float32."""
        return dataclasses.replace(self.first, dtype="float32")
