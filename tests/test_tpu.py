"""The tracker's program for a TPU, lowered on a CPU: what XLA there would be given."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

import sam2jax
from sam2jax.nn.sam2 import param_shapes

HOST = ("custom_call", "infeed", "outfeed", "send", "recv")  # what leaves the device, or XLA


def tensor(text: str) -> tuple[int, ...]:
    """The shape of `tensor<1x7xf32>`."""
    return tuple(int(size) for size in re.findall(r"(\d+)x", text))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sam2.1_hiera_tiny", "sam2.1_hiera_large"])
def test_lowered_for_tpu(variant):
    config = sam2jax.VARIANTS[variant]
    model, prompts = sam2jax.SAM2(config), sam2jax.Prompts.make(points=[[(10, 10)]])

    def run(params, frames):
        return sam2jax.track(model, params, frames, prompts)[1].masks

    frames = jax.ShapeDtypeStruct((4, 720, 1280, 3), jnp.uint8)
    lowered = export.export(jax.jit(run), platforms=["tpu"])(param_shapes(config), frames)
    text = lowered.mlir_module()
    assert lowered.out_avals[0].shape == (4, 1, config.mask_size, config.mask_size)
    assert "stablehlo.while" in text  # the scan over frames
    assert [name for name in HOST if f"stablehlo.{name}" in text] == []

    found = re.findall(r'"stablehlo\.gather"\(.*?: \((tensor<\S+>), (tensor<\S+>)\)', text)
    assert found
    single = []
    for operand, indices in found:
        *count, _ = tensor(indices)
        if math.prod(count) > max(config.image_size, config.num_maskmem):
            single.append(tensor(operand))
    # Slots of the bank, candidates, and whole rows of pictures; cell by cell only the areas of
    # holes, by their labels.
    assert single == [(1, config.mask_size**2 + 1)]
