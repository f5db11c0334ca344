"""Which training shapes does a dataset file ask for, and which one does a clip get?

The arithmetic is diffusion-pipe's (utils/dataset.py): aspect ratios rounded to 3 decimals, sizes
rounded half to even to multiples of 32, the nearest aspect ratio by logarithm, the longest frame
bucket that the clip fills at 24 fps. Two departures: ``size_buckets`` keep their own aspect
ratios (there, sorting mixes them up), and a size or length that the model cannot take is refused
instead of rounded.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from wan22_jax.data.video import MediaInfo
from wan22_jax.errors import BadInput
from wan22_jax.geometry import FPS, SIZE_MULTIPLE, Bucket, check_bucket

Side = float | int
MAX_RATIO = 100  # of width to height; the other way round, rounding leaves nothing of it
MAX_SIDE_PX = 16384  # far above what trains; below what fills the memory


class BucketRule(NamedTuple):
    """Groups of buckets; a clip trains once in every group that holds its shape.

    One group per resolution; ``size_buckets`` make a single group. Each entry pairs a bucket with
    the aspect ratio (width / height) that it stands for, which rounding may shift.
    """

    groups: tuple[tuple[tuple[float, Bucket], ...], ...]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every bucket once, in order."""
        return tuple(dict.fromkeys(bucket for group in self.groups for _, bucket in group))


def make_rule(
    *,
    source: str,
    resolutions: Sequence[Side | Sequence[Side]] | None,
    frame_buckets: Sequence[int],
    enable_ar_bucket: bool = False,
    min_ar: float | int | None = None,
    max_ar: float | int | None = None,
    num_ar_buckets: int | None = None,
    ar_buckets: Sequence[Side | Sequence[Side]] | None = None,
    size_buckets: Sequence[Sequence[int]] | None = None,
) -> BucketRule:
    """Lists the buckets that a dataset file's keys (same names) ask for.

    Args:
        source: the file they stand in, for messages.
        resolutions: square sides in pixels, or [width, height] pairs of which only the area counts.
        frame_buckets: clip lengths in frames at 24 fps, each 4n + 1; 1 (images) is always added.
        enable_ar_bucket: several aspect ratios instead of the square alone.
        min_ar: lowest width / height; with the next two, spaced geometrically.
        max_ar: highest width / height.
        num_ar_buckets: how many aspect ratios.
        ar_buckets: the aspect ratios themselves, or [width, height] pairs.
        size_buckets: [width, height, frames] triples that replace all of the above.

    Raises:
        BadInput: a key is missing, or asks for a shape that the model cannot take.
    """
    if size_buckets is not None:
        return BucketRule((_list_sizes(size_buckets, source),))
    if not resolutions:
        raise BadInput(f"{source}: resolutions is missing; give one, such as resolutions = [512]")
    for frames in frame_buckets:
        check_bucket(
            Bucket(SIZE_MULTIPLE, SIZE_MULTIPLE, frames), source=f"{source}: frame_buckets"
        )
    if enable_ar_bucket:
        ratios = _list_ratios(min_ar, max_ar, num_ar_buckets, ar_buckets, source)
    else:
        ratios = [1.0]
        for side in resolutions:
            if not isinstance(side, Sequence):  # a number is the size itself: nothing to round
                square = Bucket(int(side), int(side), 1)
                check_bucket(square, source=f"{source}: resolutions")
    lengths = sorted({1, *frame_buckets})
    return BucketRule(
        tuple(
            tuple(
                (ratio, Bucket(*_fit_area(side, ratio), frames))
                for ratio in ratios
                for frames in lengths
            )
            for side in _list_sides(resolutions, source)
        )
    )


def assign_buckets(info: MediaInfo, rule: BucketRule, *, source: str) -> tuple[Bucket, ...]:
    """Finds a clip's bucket in each group: the nearest aspect ratio, then the longest that fits.

    Args:
        info: what the file holds.
        rule: the buckets.
        source: the file, for messages.

    Raises:
        BadInput: the clip is too short for every video bucket, or no bucket takes images.
    """
    frames = 1 if info.is_image else info.frames_24
    found = []
    for group in rule.groups:
        open_to_it = [
            (abs(math.log(info.width_px / info.height_px) - math.log(ratio)), -bucket.frames, rank)
            for rank, (ratio, bucket) in enumerate(group)
            if (bucket.frames == 1) == (frames == 1) and bucket.frames <= frames
        ]
        if not open_to_it:
            raise BadInput(f"{source}: {_explain(frames, group)}")
        found.append(group[min(open_to_it)[2]][1])
    return tuple(dict.fromkeys(found))


def _list_sizes(sizes: Sequence[Sequence[int]], source: str) -> tuple[tuple[float, Bucket], ...]:
    where = f"{source}: size_buckets"
    if not sizes or any(len(size) != 3 for size in sizes):
        raise BadInput(f"{where}: expected a list of [width, height, frames]")
    buckets = [check_bucket(Bucket(*size), source=where) for size in sizes]
    for bucket in buckets:
        _check_side(max(bucket[:2]), where)
    return tuple((bucket.width_px / bucket.height_px, bucket) for bucket in buckets)


def _list_ratios(
    min_ar: float | int | None,
    max_ar: float | int | None,
    num_ar_buckets: int | None,
    ar_buckets: Sequence[Side | Sequence[Side]] | None,
    source: str,
) -> list[float]:
    if ar_buckets:
        for ar in ar_buckets:
            sides = _list_numbers(ar, "ar_buckets", source)
            if min(sides) <= 0:
                raise BadInput(f"{source}: ar_buckets: {ar} is not above 0")
            _check_side(max(sides), f"{source}: ar_buckets")
        ratios = [ar[0] / ar[1] if isinstance(ar, Sequence) else ar for ar in ar_buckets]
    elif min_ar and max_ar and num_ar_buckets and min_ar <= max_ar:
        ratios = np.geomspace(min_ar, max_ar, num_ar_buckets)
    else:
        raise BadInput(
            f"{source}: enable_ar_bucket needs min_ar <= max_ar and num_ar_buckets, or ar_buckets"
        )
    rounded = sorted({round(float(ratio), 3) for ratio in ratios})
    if not 1 / MAX_RATIO <= rounded[0] <= rounded[-1] <= MAX_RATIO:
        raise BadInput(
            f"{source}: an aspect ratio of {rounded[0]} to {rounded[-1]} was asked for; "
            f"width / height must lie between {1 / MAX_RATIO} and {MAX_RATIO}"
        )
    return rounded


def _list_sides(resolutions: Sequence[Side | Sequence[Side]], source: str) -> list[float]:
    sides = set()
    for given in resolutions:
        if min(_list_numbers(given, "resolutions", source)) < SIZE_MULTIPLE:
            raise BadInput(f"{source}: resolutions: {given} is below {SIZE_MULTIPLE} pixels")
        _check_side(max(_list_numbers(given, "resolutions", source)), f"{source}: resolutions")
        side = math.sqrt(given[0] * given[1]) if isinstance(given, Sequence) else given
        sides.add(round(float(side), 3))
    return sorted(sides)


def _list_numbers(given: Side | Sequence[Side], key: str, source: str) -> Sequence[Side]:
    if not isinstance(given, Sequence):
        return [given]
    if len(given) != 2:
        raise BadInput(f"{source}: {key}: expected a number or [width, height], got {given}")
    return given


def _check_side(side: Side, where: str) -> None:
    if side > MAX_SIDE_PX:
        raise BadInput(f"{where}: {side} is above {MAX_SIDE_PX} pixels")


def _fit_area(side: float, ratio: float) -> tuple[int, int]:
    width = math.sqrt(side * side * ratio)
    height = side * side / width
    round_to_multiple = [int(round(x / SIZE_MULTIPLE) * SIZE_MULTIPLE) for x in (width, height)]
    return max(round_to_multiple[0], SIZE_MULTIPLE), max(round_to_multiple[1], SIZE_MULTIPLE)


def _explain(frames: int, group: tuple[tuple[float, Bucket], ...]) -> str:
    if frames == 1:
        return "no bucket takes images; add one of 1 frame or remove the file"
    lengths = [bucket.frames for _, bucket in group if bucket.frames > 1]
    if not lengths:
        return "no bucket takes videos; add one to frame_buckets, or remove the file"
    return (
        f"too short: {frames} frames at {FPS} fps, the shortest video bucket needs {min(lengths)}; "
        "add a shorter frame bucket or remove the file"
    )
