"""Memory policies of SAM 2 in plain NumPy: what is read, chosen and kept on every frame of a video.

Slow and obvious on purpose. Every frame is kept for ever, and what a policy thinks of an old frame
is worked out anew at each reading, so that nothing here can be wrong about what may be forgotten.
For each frame the calls are `read`, `choose`, `write`, in this order, and frames go forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

NUM_MASKMEM = 7
CONDITIONING_POSITION = NUM_MASKMEM - 1
MOST_RECENT = NUM_MASKMEM - 1
MOST_POINTERS = 15
ALTERNATIVES = (1, 2, 3)
# The logits of a mask are at a quarter of the image's size.
MASK_STRIDE = 4

Box = tuple[float, float, float, float]


@dataclass
class Candidates:
    """What the decoder gives on a frame, for one lineage: a single mask (0), three alternatives."""

    masks: np.ndarray  # [4, s, s] logits
    ious: np.ndarray  # [4]
    score: float  # object score, a logit


@dataclass
class Read:
    """What one lineage reads on a frame, in reading order."""

    spatial: list[tuple[int, int, float]]  # (frame, temporal position, key scale)
    pointers: list[tuple[int, float, float]]  # (frame, distance or rank, key scale)
    longest: int  # the divisor of the distances


@dataclass(frozen=True)
class Choice:
    """The candidate that was taken on a frame."""

    parent: int
    index: int
    candidates: Candidates
    multimask: bool
    motion: float | None = None

    @property
    def iou(self) -> float:
        return float(self.candidates.ious[self.index])

    @property
    def score(self) -> float:
        return self.candidates.score


@dataclass(frozen=True)
class Record:
    """A frame that was written: the candidate taken, and its logits as the memory sees them."""

    choice: Choice
    answer: np.ndarray

    @cached_property
    def area(self) -> int:
        return int(np.count_nonzero(self.answer > 0))


@dataclass
class History:
    """The frames of one lineage; each is held as conditioning or as recent, never as both."""

    cond: dict[int, Record] = field(default_factory=dict)
    recent: dict[int, Record] = field(default_factory=dict)

    def copy(self) -> History:
        return History(dict(self.cond), dict(self.recent))

    def promote(self, frame: int) -> None:
        """Make a recent frame a conditioning one."""
        self.cond[frame] = self.recent.pop(frame)


class Reference:
    """A policy for one object. As it stands: one lineage, which takes the best predicted IoU."""

    presence = 0.0  # the object is there where its score is above this

    def __init__(self, *, lineages: int = 1):
        self.start: int | None = None
        self.histories = [History() for _ in range(lineages)]
        self.chosen: list[Choice] = []

    def read(self, frame: int, num_frames: int) -> list[Read]:
        """What each lineage reads on this frame, which must not be a conditioning one."""
        return [self._read(history, frame, num_frames) for history in self.histories]

    def choose(
        self, frame: int, candidates: list[Candidates], *, conditioning: bool, multimask: bool
    ) -> list[tuple[int, int]]:
        """Per lineage: the lineage it goes on from, and which of that one's masks it takes."""
        candidates = [snapshot(found) for found in candidates]
        if multimask:
            self.chosen = self._choose(frame, candidates)
        else:
            self.chosen = [Choice(p, 0, found, multimask) for p, found in enumerate(candidates)]
        return [(choice.parent, choice.index) for choice in self.chosen]

    def write(self, frame: int, answer: list[np.ndarray], *, conditioning: bool) -> list[bool]:
        """Keep a frame; per lineage, whether its memory is encoded from the mask cut at 0."""
        if self.start is None and conditioning:
            self.start = frame
        self.histories = [self.histories[choice.parent].copy() for choice in self.chosen]
        binarised = []
        for history, choice, logits in zip(self.histories, self.chosen, answer, strict=True):
            record = Record(choice, np.array(logits, np.float64))
            binarised.append(self._write(history, frame, record, conditioning))
        return binarised

    def held(self) -> list[dict[str, list[int]]]:
        """Per lineage: the conditioning frames, the user's and the promoted ones."""
        return [{"cond": sorted(history.cond)} for history in self.histories]

    def _read(self, history: History, frame: int, num_frames: int) -> Read:
        raise NotImplementedError

    def _choose(self, frame: int, candidates: list[Candidates]) -> list[Choice]:
        return [Choice(p, best_iou(found), found, True) for p, found in enumerate(candidates)]

    def _write(self, history: History, frame: int, record: Record, conditioning: bool) -> bool:
        kept = history.cond if conditioning else history.recent
        kept[frame] = record
        return False


class Sam2(Reference):
    """SAM 2 itself: all conditioning frames, and those just before this one."""

    def _read(self, history: History, frame: int, num_frames: int) -> Read:
        longest = longest_distance(num_frames)
        spatial = conditioning_spatial(history.cond)
        for distance in range(1, MOST_RECENT + 1):
            if frame - distance in history.recent:
                spatial.append((frame - distance, distance - 1, 1.0))
        return Read(spatial, pointers_by_distance(history, frame, longest), longest)


class Sam3Score(Reference):
    """SAM 3's own selection: frames whose score, presence times IoU, is high enough."""

    def __init__(self, *, threshold: float = 0.01):
        super().__init__()
        self.threshold = threshold

    def accepts(self, record: Record) -> bool:
        present = record.choice.score > 0
        confidence = 2 * sigmoid(record.choice.score) - 1
        return confidence * present * record.choice.iou > self.threshold

    def _read(self, history: History, frame: int, num_frames: int) -> Read:
        accepted = [f for f, record in history.recent.items() if self.accepts(record)]
        listed = list_frames(accepted, self.start, frame, skipped=1, most=MOST_POINTERS)
        return Read(
            spatial_by_rank(history, listed),
            pointers_by_rank(history, frame, listed),
            longest_distance(num_frames),
        )


class Samurai(Reference):
    """SAMURAI: a motion model has a say in which mask is taken and in which frames are read."""

    presence = -1.0

    def __init__(
        self,
        *,
        alpha: float = 0.25,
        iou_threshold: float = 0.5,
        score_threshold: float = 0.0,
        motion_threshold: float = 0.0,
        stable_frames: int = 15,
        stable_iou: float = 0.3,
    ):
        super().__init__()
        self.alpha = alpha
        self.iou_threshold = iou_threshold
        self.score_threshold = score_threshold
        self.motion_threshold = motion_threshold
        self.stable_frames = stable_frames
        self.stable_iou = stable_iou
        self.stable = 0
        self.kalman = Kalman()

    def accepts(self, record: Record) -> bool:
        choice = record.choice
        moves_as_expected = choice.motion is None or choice.motion > self.motion_threshold
        return (
            choice.iou > self.iou_threshold
            and choice.score > self.score_threshold
            and moves_as_expected
        )

    def _read(self, history: History, frame: int, num_frames: int) -> Read:
        longest = longest_distance(num_frames)
        accepted = [f for f, record in history.recent.items() if self.accepts(record)]
        listed = list_frames(accepted, self.start, frame, skipped=2, most=MOST_POINTERS)
        return Read(
            spatial_by_rank(history, listed),
            pointers_by_distance(history, frame, longest),
            longest,
        )

    def _choose(self, frame: int, candidates: list[Candidates]) -> list[Choice]:
        (found,) = candidates
        boxes = {index: image_box(found.masks[index]) for index in ALTERNATIVES}
        motion = None
        if self.stable == 0:
            best = best_iou(found)
            self.kalman.initiate(measurement(boxes[best]))
            self.stable = 1
        elif self.stable < self.stable_frames:
            self.kalman.predict()
            best = best_iou(found)
            if found.ious[best] > self.stable_iou:
                self.kalman.update(measurement(boxes[best]))
                self.stable += 1
            else:
                self.stable = 0
        else:
            self.kalman.predict()
            overlaps = [box_iou(self.kalman.box(), boxes[index]) for index in ALTERNATIVES]
            ious = found.ious[list(ALTERNATIVES)]
            place = int(np.argmax(self.alpha * np.array(overlaps) + (1 - self.alpha) * ious))
            best = ALTERNATIVES[place]
            motion = overlaps[place]
            if ious[place] < self.stable_iou:
                self.stable = 0
            else:
                self.kalman.update(measurement(boxes[best]))
        return [Choice(0, best, found, True, motion)]


class Rcms(Sam2):
    """RCMS of MOSEv2: when the object is first lost, the last reliable frames are made lasting."""

    def __init__(self, *, threshold: float = 0.6, most: int = 3):
        super().__init__()
        self.threshold = threshold
        self.most = most
        self.lost = False

    def reliability(self, record: Record) -> float:
        inside = record.answer[record.answer > 0]
        sureness = float(np.mean(sigmoid(inside))) if inside.size else 0.0
        return float(sigmoid(record.choice.score)) * record.choice.iou * sureness

    def _write(self, history: History, frame: int, record: Record, conditioning: bool) -> bool:
        if not conditioning and record.choice.score <= 0 and not self.lost:
            self.lost = True
            reliable = [
                f for f, old in history.recent.items() if self.reliability(old) > self.threshold
            ]
            for f in newest(reliable, self.most):
                history.promote(f)
        return super()._write(history, frame, record, conditioning)


class Dam4Sam(Reference):
    """DAM4SAM: a memory that resolves distractors (DRM) beside one of recent appearance (RAM)."""

    def __init__(
        self,
        *,
        most_drm: int = 4,
        stride: int = 5,
        iou_threshold: float = 0.8,
        area_low: float = 0.8,
        area_high: float = 1.2,
        apart: int = 5,
        box_threshold: float = 0.7,
        memory_of_areas: int = 10,
        within: int = 300,
    ):
        super().__init__()
        self.most_drm = most_drm
        self.stride = stride
        self.iou_threshold = iou_threshold
        self.area_low = area_low
        self.area_high = area_high
        self.apart = apart
        self.box_threshold = box_threshold
        self.memory_of_areas = memory_of_areas
        self.within = within
        self.promoted: list[int] = []

    def _read(self, history: History, frame: int, num_frames: int) -> Read:
        start = frame if self.start is None else self.start
        longest = longest_distance(frame + 1 - start)
        drm = self._drm(history, frame)
        visible = visible_frames(history)
        spatial = conditioning_spatial(drm)
        spatial += [(f, k, 1.0) for k, f in enumerate(self._ram(visible, frame, drm))]
        pointers = [(f, float(frame - f), 1.0) for f in drm]
        for distance in range(1, min(MOST_POINTERS, longest) + 1):
            f = frame - distance
            if f in visible and f not in drm:
                pointers.append((f, float(distance), 1.0))
        return Read(spatial, pointers, longest)

    def _drm(self, history: History, frame: int) -> list[int]:
        """The first conditioning frame and the newest others, ascending; t-1 is left to the RAM."""
        others = [f for f in history.cond if f != self.start and f < frame - 1]
        first = [] if self.start is None else [self.start]
        return first + newest(others, self.most_drm - 1)

    def _ram(self, visible: set[int], frame: int, drm: list[int]) -> list[int]:
        """The last visible frame, then visible ones on a grid of `stride` frames, newest first."""
        if self.start is None:
            return []
        usable = {f for f in visible if f not in drm}
        slots = NUM_MASKMEM - len(drm)
        taken: list[int] = []
        f = frame - 1
        while f > self.start and f not in usable:
            f -= 1
        while f > self.start and len(taken) < slots:
            if f in usable:
                taken.append(f)
            f = ((f - 1) // self.stride) * self.stride
        return taken

    def _write(self, history: History, frame: int, record: Record, conditioning: bool) -> bool:
        super()._write(history, frame, record, conditioning)
        if conditioning or not self._is_promoted(history, frame, record):
            return False
        history.promote(frame)
        self.promoted.append(frame)
        return True

    def _is_promoted(self, history: History, frame: int, record: Record) -> bool:
        """Whether a tracked frame, already among the recent ones, resolves a distractor."""
        choice = record.choice
        if not choice.multimask or self.start is None or frame < self.start + 2:
            return False
        if self.promoted and frame - self.promoted[-1] <= self.apart:
            return False
        if choice.iou <= self.iou_threshold or record.area < 1:
            return False
        ratio = record.area / self._usual_area(history, frame)
        if not self.area_low <= ratio <= self.area_high:
            return False
        return least_box_iou(choice) <= self.box_threshold

    def _usual_area(self, history: History, frame: int) -> float:
        frames = {**history.cond, **history.recent}
        lately = [f for f in visible_frames(history) if f > frame - self.within]
        return float(np.median([frames[f].area for f in newest(lately, self.memory_of_areas)]))


class Sam2Long(Reference):
    """SAM2Long: several lineages, of which the best branches survive every frame."""

    def __init__(
        self,
        *,
        lineages: int = 3,
        iou_threshold: float = 0.1,
        certainty: float = 2.0,
        modulation: tuple[float, float] = (0.95, 1.05),
    ):
        super().__init__(lineages=lineages)
        self.iou_threshold = iou_threshold
        self.certainty = certainty
        self.modulation = modulation
        self.scores = [0.0] * lineages
        self.ordinary = True

    def accepts(self, record: Record) -> bool:
        return record.choice.iou > self.iou_threshold and record.choice.score > 0

    def choose(
        self, frame: int, candidates: list[Candidates], *, conditioning: bool, multimask: bool
    ) -> list[tuple[int, int]]:
        after_start = self.start is not None and frame == self.start + 1
        self.ordinary = conditioning or after_start
        if self.ordinary:
            self.scores = [0.0] * len(self.scores)
        return super().choose(frame, candidates, conditioning=conditioning, multimask=multimask)

    def _choose(self, frame: int, candidates: list[Candidates]) -> list[Choice]:
        if self.ordinary:
            return super()._choose(frame, candidates)
        scores = {
            (p, index): self.scores[p] + float(np.log(found.ious[index] + 1e-5))
            for p, found in enumerate(candidates)
            for index in ALTERNATIVES
        }
        # Python's sort is stable: of equal scores, the first lineage and alternative come first.
        order = sorted(scores, key=lambda pair: -scores[pair])
        if max(abs(found.score) for found in candidates) > self.certainty:
            taken = order[: len(candidates)]
        else:
            taken = sorted(distinct(order, candidates), key=lambda pair: -scores[pair])
        self.scores = [scores[pair] for pair in taken]
        return [Choice(p, index, candidates[p], True) for p, index in taken]

    def _read(self, history: History, frame: int, num_frames: int) -> Read:
        accepted = [f for f, record in history.recent.items() if self.accepts(record)]
        most = min(num_frames, MOST_POINTERS + 1) - 1
        listed = list_frames(accepted, self.start, frame, skipped=1, most=most)
        spatial = spatial_by_rank(history, listed)
        pointers = pointers_by_rank(history, frame, listed)

        frame_scales = self._scales([object_score(history, f) for f, _, _ in spatial])
        pointer_scales = self._scales([object_score(history, f) for f, _, _ in pointers])
        if len(pointers) == 1 and len(spatial) >= 2:
            pointer_scales = [self.modulation[0]]
        return Read(
            [(f, k, scale) for (f, k, _), scale in zip(spatial, frame_scales, strict=True)],
            [(f, d, scale) for (f, d, _), scale in zip(pointers, pointer_scales, strict=True)],
            longest_distance(num_frames),
        )

    def _scales(self, object_scores: list[float]) -> list[float]:
        """Key scales that rise with the object score, evenly spaced; a lone entry has 1."""
        count = len(object_scores)
        if count == 1:
            return [1.0]
        scales = [0.0] * count
        low, high = self.modulation
        ascending = sorted(range(count), key=lambda place: object_scores[place])
        for place, value in zip(ascending, np.linspace(low, high, count), strict=True):
            scales[place] = float(value)
        return scales


class Kalman:
    """DeepSORT's filter of a box: its middle, aspect ratio w/h, height, and their velocities."""

    MOVE = np.eye(8) + np.eye(8, k=4)
    LOOK = np.eye(4, 8)

    def __init__(self):
        self.mean = np.zeros(8)
        self.covariance = np.eye(8)

    def initiate(self, measured: np.ndarray) -> None:
        p, v = noise(measured[3])
        self.mean = np.concatenate([measured, np.zeros(4)])
        std = [2 * p, 2 * p, 1e-2, 2 * p, 10 * v, 10 * v, 1e-5, 10 * v]
        self.covariance = np.diag(np.square(std))

    def predict(self) -> None:
        p, v = noise(self.mean[3])
        std = [p, p, 1e-2, p, v, v, 1e-5, v]
        self.mean = self.MOVE @ self.mean
        self.covariance = self.MOVE @ self.covariance @ self.MOVE.T + np.diag(np.square(std))

    def update(self, measured: np.ndarray) -> None:
        p, _ = noise(self.mean[3])
        measurement_noise = np.diag(np.square([p, p, 1e-1, p]))
        spread = self.LOOK @ self.covariance @ self.LOOK.T + measurement_noise
        gain = self.covariance @ self.LOOK.T @ np.linalg.inv(spread)
        self.mean = self.mean + gain @ (measured - self.LOOK @ self.mean)
        self.covariance = self.covariance - gain @ spread @ gain.T

    def box(self) -> Box:
        x, y, aspect, h = (float(value) for value in self.mean[:4])
        w = aspect * h
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def snapshot(found: Candidates) -> Candidates:
    """A copy in float64, since a choice outlives the call that made it."""
    masks, ious = np.array(found.masks, np.float64), np.array(found.ious, np.float64)
    return Candidates(masks, ious, float(found.score))


def noise(height: float) -> tuple[float, float]:
    """Standard deviations of position and of velocity for a box of this height."""
    return float(height) / 20, float(height) / 160


def sigmoid(x: np.ndarray | float) -> np.ndarray | float:
    # By tanh, which does not overflow for the -1024 of an absent object.
    return 0.5 * (1 + np.tanh(np.asarray(x, np.float64) / 2))


def newest(frames: Iterable[int], most: int) -> list[int]:
    """The last of the frames, ascending."""
    ascending = sorted(frames)
    return ascending[max(0, len(ascending) - most) :]


def longest_distance(num_frames: int) -> int:
    return min(max(num_frames, 2), MOST_POINTERS + 1) - 1


def best_iou(candidates: Candidates) -> int:
    return ALTERNATIVES[int(np.argmax(candidates.ious[list(ALTERNATIVES)]))]


def object_score(history: History, frame: int) -> float:
    """The object score of a frame when it was written; a conditioning frame has 10."""
    return 10.0 if frame in history.cond else history.recent[frame].choice.score


def visible_frames(history: History) -> set[int]:
    frames = {**history.cond, **history.recent}
    return {f for f, record in frames.items() if record.area >= 1}


def conditioning_spatial(frames: Iterable[int]) -> list[tuple[int, int, float]]:
    return [(f, CONDITIONING_POSITION, 1.0) for f in sorted(frames)]


def conditioning_pointers(history: History, frame: int) -> list[tuple[int, float, float]]:
    return [(f, float(frame - f), 1.0) for f in sorted(history.cond) if f <= frame]


def pointers_by_distance(
    history: History, frame: int, longest: int
) -> list[tuple[int, float, float]]:
    pointers = conditioning_pointers(history, frame)
    for distance in range(1, min(MOST_POINTERS, longest) + 1):
        if frame - distance in history.recent:
            pointers.append((frame - distance, float(distance), 1.0))
    return pointers


def list_frames(
    accepted: Iterable[int], start: int | None, frame: int, *, skipped: int, most: int
) -> list[int]:
    """The newest accepted frames, ascending, and t-1 whatever it is."""
    first = (frame if start is None else start) + skipped
    listed = newest([f for f in accepted if first <= f < frame], most)
    if frame - 1 not in listed:
        listed.append(frame - 1)
    return listed


def spatial_by_rank(history: History, listed: list[int]) -> list[tuple[int, int, float]]:
    spatial = conditioning_spatial(history.cond)
    for k in range(1, MOST_RECENT + 1):
        # A conditioning frame takes its place in the ranks, but is not read a second time.
        if k <= len(listed) and listed[-k] in history.recent:
            spatial.append((listed[-k], k - 1, 1.0))
    return spatial


def pointers_by_rank(
    history: History, frame: int, listed: list[int]
) -> list[tuple[int, float, float]]:
    """Ranks in place of distances; the oldest frame of the list is never read."""
    pointers = conditioning_pointers(history, frame)
    for k in range(1, MOST_POINTERS + 1):
        if k >= len(listed):
            break
        if listed[-k] in history.recent:
            pointers.append((listed[-k], float(k), 1.0))
    return pointers


def distinct(order: list[tuple[int, int]], candidates: list[Candidates]) -> list[tuple[int, int]]:
    """As many (lineage, alternative) pairs as lineages, best first, that differ in their IoU."""
    most = len(candidates)
    taken: list[tuple[int, int]] = []
    seen: set[float] = set()
    for p, index in order:
        iou = float(candidates[p].ious[index])
        rounded = round(iou if candidates[p].score > 0 else -iou, 2)
        if len(taken) < most and rounded not in seen:
            seen.add(rounded)
            taken.append((p, index))
    unused = [p for p in range(most) if p not in {parent for parent, _ in taken}]
    taken += [next(pair for pair in order if pair[0] == p) for p in unused]
    taken += [pair for pair in order if pair not in taken]
    return taken[:most]


def upsample(logits: np.ndarray, factor: int) -> np.ndarray:
    """Bilinear, with half-pixel centres and clamped edges."""
    values = np.array(logits, np.float64)
    for axis in (0, 1):
        size = values.shape[axis]
        where = (np.arange(size * factor) + 0.5) / factor - 0.5
        where = np.clip(where, 0, size - 1)
        before = np.floor(where).astype(int)
        after = np.minimum(before + 1, size - 1)
        weight = (where - before).reshape((-1, 1) if axis == 0 else (1, -1))
        values = (
            np.take(values, before, axis) * (1 - weight) + np.take(values, after, axis) * weight
        )
    return values


def extent(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """First and last column and row of a mask, as (min x, min y, max x, max y)."""
    ys, xs = np.nonzero(mask)
    if not len(ys):
        return None
    return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())


def image_box(logits: np.ndarray) -> Box:
    """SAMURAI's box, in pixels of the image: from the first to the last pixel, with no +1."""
    return extent(upsample(logits, MASK_STRIDE) > 0) or (0, 0, 0, 0)


def pixel_box(mask: np.ndarray) -> Box:
    """DAM4SAM's box: it reaches to the far side of the last pixel."""
    x0, y0, x1, y1 = extent(mask) or (0, 0, -1, -1)
    return x0, y0, x1 + 1, y1 + 1


def measurement(box: Box) -> np.ndarray:
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    if h == 0:
        h = 1
    return np.array([(x0 + x1) / 2, (y0 + y1) / 2, w / h, h])


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where either box is empty."""
    if a[2] <= a[0] or a[3] <= a[1] or b[2] <= b[0] or b[3] <= b[1]:
        return 0.0
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = w * h
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 8-connected part; of equals, that whose first pixel comes first by rows."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    largest: set[tuple[int, int]] = set()
    for seed in sorted(left):
        if seed not in left:
            continue
        left.remove(seed)
        part, border = {seed}, [seed]
        while border:
            y, x = border.pop()
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            part |= around
            border += around
        if len(part) > len(largest):
            largest = part
    found = np.zeros(mask.shape, bool)
    for pixel in largest:
        found[pixel] = True
    return found


def least_box_iou(choice: Choice) -> float:
    """How far another alternative, at worst, would stretch the box of the mask that was taken."""
    masks = choice.candidates.masks > 0
    chosen = masks[choice.index]
    overlaps = []
    for index in ALTERNATIVES:
        if index == choice.index:
            continue
        beyond = largest_component(masks[index] & ~chosen)
        if beyond.any():
            overlaps.append(box_iou(pixel_box(chosen), pixel_box(chosen | beyond)))
        else:
            overlaps.append(1.0)
    return min(overlaps)
