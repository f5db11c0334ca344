"""What can an epoch choose from, and how is what was chosen read?"""

from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from wan22_jax.batch import Batch
from wan22_jax.data.cache import Cache
from wan22_jax.data.index import NOWHERE
from wan22_jax.geometry import Bucket
from wan22_jax.text import pad_text

_ENTRY = np.dtype([("cache", np.uint16), ("clip", np.int32), ("caption", np.int32)])


class Chosen(NamedTuple):
    """One example of a step."""

    cache: Cache
    clip: int  # its number in the cache
    caption: int | None  # which one; None: replaced by the empty caption

    @property
    def file(self) -> str:
        """The name of its file."""
        return self.cache.clips.file(self.clip)

    def read_caption(self) -> str:
        """Reads the caption that it trains with; raises BadInput if the record is damaged."""
        return self.cache.read_caption(self.clip, caption=self.caption)


def read_batch(
    examples: Sequence[Chosen], bucket: Bucket, *, shape_AB: tuple[int, ...], masked: bool
) -> Batch:
    """Reads examples of one bucket, A times B of them; raises BadInput where one is damaged.

    Args:
        examples: in the order of their places.
        bucket: theirs.
        shape_AB: micro-batches, and examples of each.
        masked: whether the batch has masks; an example without one then gets ones.
    """
    clips = [one.cache.read(one.clip, caption=one.caption) for one in examples]

    def split(arrays: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        array = np.asarray(arrays)
        return array.reshape(*shape_AB, *array.shape[1:])

    ones_YX = np.ones(bucket.latent_TYX[1:], ml_dtypes.bfloat16)
    masks = [ones_YX if clip.mask_YX is None else clip.mask_YX for clip in clips]
    return Batch(
        split([clip.latents_TYXC for clip in clips]),
        split(pad_text([clip.text_SE for clip in clips])),
        split(masks) if masked else None,
    )


def list_entries(caches: Sequence[tuple[Cache, float | int]]) -> dict[Bucket, np.ndarray]:
    """Lists what an epoch over caches, each with its ``num_repeats``, has of each bucket.

    Each entry is a cache, a clip in it and one of its captions, all by number.
    """
    entries: dict[Bucket, list[np.ndarray]] = {}
    for cache_number, (cache, num_repeats) in enumerate(caches):
        num_captions_N = np.diff(cache.clips.text_end_N, prepend=0)
        for bucket_number, bucket in enumerate(cache.clips.buckets):
            clips = np.flatnonzero(cache.clips.bucket_N == bucket_number)
            counts = num_captions_N[clips]
            some = np.empty(counts.sum(), _ENTRY)
            some["cache"] = cache_number
            some["clip"] = np.repeat(clips, counts)
            some["caption"] = np.arange(len(some)) - np.repeat(np.cumsum(counts) - counts, counts)
            # First captions come first, so that half a repeat takes as many clips as it can.
            some = some[np.argsort(some["caption"], kind="stable")]
            entries.setdefault(bucket, []).append(np.resize(some, int(len(some) * num_repeats)))
    return {bucket: np.concatenate(some) for bucket, some in entries.items()}


def has_masks(caches: Sequence[Cache], entries: np.ndarray) -> bool:
    """Whether any of these entries has a mask."""
    return any(
        bool(np.any(cache.clips.mask_row_N[entries["clip"][entries["cache"] == number]] != NOWHERE))
        for number, cache in enumerate(caches)
    )
