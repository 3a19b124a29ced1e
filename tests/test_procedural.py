"""Procedural clips: the same everywhere, exact masks, and what each kind promises."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from sam2jax.training.data import procedural, shapes, textures
from sam2jax.training.data.config import SceneConfig
from sam2jax.training.data.procedural import clip_kind, longest_absence, procedural_clip
from sam2jax.training.data.scene import Layer, Scene
from tests.conftest import ROOT

SIZE, FRAMES = 96, 32
SCENE = SceneConfig()
SEEDS = {kind: [SCENE.kinds.index(kind) + 3 * i for i in range(4)] for kind in SCENE.kinds}


@pytest.fixture(scope="module")
def clips():
    seeds = [seed for found in SEEDS.values() for seed in found]
    return {s: procedural_clip(SCENE, s, image_size=SIZE, num_frames=FRAMES) for s in seeds}


def digest(seed):
    clip = procedural_clip(SCENE, seed, image_size=64, num_frames=6)
    return hashlib.sha256(b"".join(part.tobytes() for part in clip)).hexdigest()


def disc(radius, x, y, frames=1):
    """A still layer, a circle of a radius about (x, y), in widths of the frame."""
    return Layer(
        field=(1 - shapes._RADIUS).astype(np.float32),
        path=np.full((frames, 2), (x, y)),
        angle=np.zeros(frames),
        scale=np.full(frames, radius),
        bend=0.0,
        waves=np.ones(2),
        phases=np.zeros((frames, 2)),
        texture=0,
        density=1.0,
        offset=np.zeros(2),
        shade=0.0,
    )


def test_shapes_and_types(clips):
    clip = clips[0]
    assert clip.frames.shape == (FRAMES, SIZE, SIZE, 3) and clip.frames.dtype == np.uint8
    assert clip.masks.shape == (FRAMES, 3, SIZE, SIZE) and clip.masks.dtype == bool
    assert clip.objects.tolist() == [True] * 3
    assert len({frame.tobytes() for frame in clip.frames}) == FRAMES


def test_same_seed_same_clip_in_another_process():
    code = "from tests.test_procedural import digest; print(digest(5))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == digest(5), done.stderr
    assert digest(6) != digest(5)


def test_a_clip_is_pinned():
    # Areas, not bytes: another NumPy may round a pixel otherwise, but must not draw another scene.
    masks = procedural_clip(SCENE, 4, image_size=64, num_frames=6).masks
    areas = [[84, 296, 508], [52, 204, 635]]
    np.testing.assert_allclose(masks[[0, 5]].sum((2, 3)), areas, rtol=0.05, atol=2)


def test_kinds_take_turns():
    assert [clip_kind(SCENE, seed) for seed in range(4)] == [
        "plain",
        "occluded",
        "distractor",
        "plain",
    ]
    assert clip_kind(SceneConfig(kinds=("occluded",)), 0) == "occluded"


def test_first_frame_shows_every_object(clips):
    for clip in clips.values():
        shares = clip.masks[0].mean((1, 2))
        assert (shares >= SCENE.min_area).all() and (shares <= SCENE.max_area).all()


def test_masks_do_not_overlap(clips):
    assert max(clip.masks.sum(1).max() for clip in clips.values()) == 1


def test_occluded_target_goes_and_comes_back(clips):
    for seed in SEEDS["occluded"]:
        seen = clips[seed].masks[:, 0].any((1, 2))
        length, end = longest_absence(seen)
        assert length >= 8 and seen[0] and seen[end:].any()


@pytest.mark.parametrize("kind", ["plain", "distractor"])
def test_others_stay_in_sight(clips, kind):
    for seed in SEEDS[kind]:
        seen = clips[seed].masks.any((2, 3))
        assert max(longest_absence(seen[:, i])[0] for i in range(3)) < 8


def test_objects_move_turn_and_change_size(clips):
    for clip in clips.values():
        areas = clip.masks.sum((2, 3))
        assert all(len(set(column.tolist())) > 5 for column in areas.T)


@pytest.mark.parametrize("num_frames", [1, 2, 4, 8])
def test_short_clips(num_frames):
    for seed in range(3):
        clip = procedural_clip(SCENE, seed, image_size=64, num_frames=num_frames)
        assert clip.frames.shape == (num_frames, 64, 64, 3)
        assert clip.masks[0].any((1, 2)).all()
    hidden = SCENE.hidden_in(8)
    assert hidden == 2
    masks = procedural_clip(SCENE, 1, image_size=64, num_frames=8).masks
    assert longest_absence(masks[:, 0].any((1, 2)))[0] >= hidden


def test_distractor_shares_texture_and_shape(monkeypatch):
    scenes = []
    plan = procedural.plan_scene
    monkeypatch.setattr(procedural, "plan_scene", lambda *a: scenes.append(plan(*a)) or scenes[-1])
    procedural_clip(SCENE, 2, image_size=64, num_frames=4)
    scene = scenes[-1]
    assert len(scene.layers) == 4 and len(scene.objects) == 3
    target = scene.layers[scene.objects[0]]
    (twin,) = [layer for i, layer in enumerate(scene.layers) if i not in scene.objects]
    assert twin.texture == target.texture
    assert sum(layer.texture == target.texture for layer in scene.layers) == 2
    alike = ((twin.field > 0) == (target.field > 0)).mean()
    assert 0.9 < alike < 1


def test_a_hard_scene_hides_the_target_and_shows_its_like(monkeypatch):
    scenes = []
    plan = procedural.plan_scene
    monkeypatch.setattr(procedural, "plan_scene", lambda *a: scenes.append(plan(*a)) or scenes[-1])
    config = SceneConfig(kinds=("hard",))
    for seed in range(4):
        clip = procedural_clip(config, seed, image_size=64)
        scene = scenes[-1]
        seen = clip.masks[:, 0].any((1, 2))
        length, end = longest_absence(seen)
        assert length >= 8 and seen[0] and seen[end:].any()
        target = scene.layers[scene.objects[0]]
        others = [layer for i, layer in enumerate(scene.layers) if i not in scene.objects]
        assert [layer.texture for layer in others].count(target.texture) == 1
        assert len({scene.layers[i].texture for i in scene.objects}) == 3


def test_few_scenes_are_thrown_away(monkeypatch):
    drawn = []
    plan = procedural.plan_scene
    monkeypatch.setattr(procedural, "plan_scene", lambda *a: drawn.append(1) or plan(*a))
    scene = SceneConfig(kinds=("occluded",))
    for seed in range(16):
        procedural_clip(scene, seed, image_size=32, num_frames=32)
    assert len(drawn) <= 20


def test_nearer_layers_cover():
    far, near = disc(0.3, 0.4, 0.5), disc(0.2, 0.6, 0.5)
    one, other = procedural._masks(Scene((far, near), (0, 1)), 0, 100)
    y, x = np.mgrid[:100, :100] + 0.5
    whole_far, whole_near = (np.hypot(x - c, y - 50) <= r for c, r in ((40, 30), (60, 20)))
    assert (other != whole_near).mean() < 0.002
    assert (one != (whole_far & ~other)).mean() < 0.002
    swapped = procedural._masks(Scene((near, far), (1, 0)), 0, 100)
    assert swapped[0].sum() > one.sum() and not (swapped[0] & swapped[1]).any()
    hidden = procedural._masks(Scene((near, disc(0.5, 0.5, 0.5)), (0, 1)), 0, 100)
    assert not hidden[0].any()


def test_masks_are_where_the_colour_is():
    tile = textures.pack(np.full((64, 64, 3), (200, 100, 50)))
    canvas = np.zeros((64, 64), np.uint64)
    layer = disc(0.3, 0.45, 0.55)
    procedural._stamp(canvas, layer, 0, tile, 10.0)
    colors = textures.unpack(canvas)
    mask = procedural._masks(Scene((layer,), (0,)), 0, 64)[0]
    np.testing.assert_array_equal(mask, colors[..., 0] >= 100)
    assert colors.max((0, 1)).tolist() == [200, 100, 50]


def test_texture_moves_with_its_object():
    tile = textures.draw_texture(np.random.default_rng(0), 64)
    layer = disc(0.2, 0.25, 0.5, frames=2)
    layer = layer._replace(path=np.array([[0.25, 0.5], [0.75, 0.5]]))
    pictures = []
    for frame in range(2):
        canvas = np.zeros((64, 64), np.uint64)
        procedural._stamp(canvas, layer, frame, tile, 12.0)
        pictures.append(canvas)
    np.testing.assert_array_equal(pictures[0][:, :32], pictures[1][:, 32:])
    assert pictures[0].any() and not pictures[0][:, 32:].any()


def test_sampling_a_texture_is_bilinear_and_periodic():
    colors = np.random.default_rng(1).integers(0, 256, (8, 8, 3))
    tile = textures.pack(colors)
    whole = np.arange(-8, 16, dtype=np.int32) * 256
    at = textures.sample(tile, whole[None].repeat(24, 0), whole[:, None].repeat(24, 1))
    np.testing.assert_array_equal(textures.unpack(at), np.tile(colors, (3, 3, 1)))
    x, y = np.array([[2 * 256 + 64]], np.int32), np.array([[7 * 256 + 128]], np.int32)
    expected = (
        (colors[7, 2] * 0.75 + colors[7, 3] * 0.25) + (colors[0, 2] * 0.75 + colors[0, 3] * 0.25)
    ) / 2
    assert abs(textures.unpack(textures.sample(tile, x, y))[0, 0] - expected).max() <= 0.5


def test_shapes_have_bays_or_holes():
    rng = np.random.default_rng(0)
    fields = [shapes.draw_shape(rng) for _ in range(60)]
    assert all(field.dtype == np.float32 and (field >= 0).any() for field in fields)
    # A convex shape holds the midpoint of any two of its points.
    bent = 0
    for field in fields:
        rows, columns = np.nonzero(field > 0)
        one, other = rng.integers(0, len(rows), (2, 400))
        middle = field[(rows[one] + rows[other]) // 2, (columns[one] + columns[other]) // 2]
        bent += (middle < -0.02).any()
    assert bent > 40
    assert all(shapes.core(shapes.solid(rng, a)) > 0.9 / np.hypot(1, a) for a in (2.0, 4.0))


def test_an_impossible_scene_says_so():
    scene = SceneConfig(num_objects=12, min_area=0.19, max_area=0.2)
    with pytest.raises(ValueError, match="no scene of 12 objects"):
        procedural_clip(scene, 0, image_size=32, num_frames=1)
