"""How many clips of a bucket make a micro-batch and a step, and how many steps make an epoch?"""

from collections.abc import Mapping
from typing import NamedTuple

from wan22_jax.geometry import Bucket

Sizes = tuple[tuple[float, int], ...]  # (resolution, clips of a micro-batch)


class Batching(NamedTuple):
    """How clips are put together.

    The size of a micro-batch is that of the resolution nearest to the side of a square with the
    bucket's area; of two as near, the one that is named first (diffusion-pipe, section 1.1).
    """

    sizes: Sizes  # one or more
    image_sizes: Sizes  # of buckets with one frame
    accumulation: int = 1  # micro-batches of a step ...
    num_shards: int = 1  # devices, or groups of them, that take one of these sizes each
    clips_per_step: int | None = None  # ... or as many as have so many clips

    def micro_batch(self, bucket: Bucket) -> int:
        """Clips of one forward pass, of all devices together."""
        side = (bucket.width_px * bucket.height_px) ** 0.5
        sizes = self.image_sizes if bucket.frames == 1 else self.sizes
        return min(sizes, key=lambda entry: abs(entry[0] - side))[1] * self.num_shards

    def micro_batches(self, bucket: Bucket) -> int:
        """Forward passes of one optimizer step; 0 if its clips do not divide into them."""
        if self.clips_per_step is None:
            return self.accumulation
        count, rest = divmod(self.clips_per_step, self.micro_batch(bucket))
        return 0 if rest else count

    def per_step(self, bucket: Bucket) -> int:
        """Clips of one optimizer step."""
        return self.clips_per_step or self.micro_batch(bucket) * self.accumulation

    def __str__(self) -> str:
        sizes, images = _describe(self.sizes), _describe(self.image_sizes)
        return f"{sizes}, of images {images}" if images != sizes else sizes


def make_batching(
    size: int | list[list[int]],
    image_size: int | list[list[int]],
    *,
    accumulation: int = 1,
    num_shards: int = 1,
    per_step: int | None = None,
) -> Batching:
    """Makes it of the config's values: one size for all, or ``[[resolution, size], ...]``."""
    return Batching(_read(size), _read(image_size), accumulation, num_shards, per_step)


class EpochLength(NamedTuple):
    """How many steps go over the data once."""

    steps: dict[Bucket, int]  # as many as there are clips for
    kept: int  # of all buckets, after ``subsample_ratio``

    @property
    def left_out(self) -> int:
        """Steps that ``subsample_ratio`` leaves out of an epoch, others every time."""
        return sum(self.steps.values()) - self.kept


def count_steps(
    entries: Mapping[Bucket, int], batching: Batching, *, subsample_ratio: float | int | None = None
) -> EpochLength:
    """Counts the steps of an epoch; a step takes entries of one bucket, and whole ones only.

    Args:
        entries: of each bucket, repeats and captions counted.
        batching: how many of them a step takes.
        subsample_ratio: share of its steps that an epoch takes; None for all.
    """
    steps = {bucket: number // batching.per_step(bucket) for bucket, number in entries.items()}
    total = sum(steps.values())
    return EpochLength(steps, total if subsample_ratio is None else int(total * subsample_ratio))


def _read(size: int | list[list[int]]) -> Sizes:
    if isinstance(size, int):
        return ((1.0, size),)
    return tuple((float(resolution), clips) for resolution, clips in size)


def _describe(sizes: Sizes) -> str:
    if len({clips for _, clips in sizes}) == 1:
        return str(sizes[0][1])
    return ", ".join(f"{clips} at {resolution:g}" for resolution, clips in sizes)
