"""Is every record of a cache whole, and which ones does nothing need any more?"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from wan22_jax.data.cache import DAMAGE, INDEX, Cache, mend_shards, unpack_record
from wan22_jax.data.cache_writer import (
    ALONE,
    SHARD_BYTES,
    hold_other_locks,
    name_shard,
    replace_file,
    write_shard,
)
from wan22_jax.data.index import NOWHERE, Index, Shard, read_keys, rewrite_index
from wan22_jax.errors import BadInput
from wan22_jax.geometry import LATENT_CHANNELS, Bucket
from wan22_jax.text import TEXT_LEN

SHOWN_PROBLEMS = 5


class Found(NamedTuple):
    """What ``verify_cache`` read."""

    num_records: dict[str, int]  # by kind
    num_bytes: int
    num_unused: int  # of the records, those that no clip needs
    problems: tuple[str, ...]  # a line for each damaged record
    shards: tuple[str, ...]  # the files that hold these


def verify_cache(cache: Cache) -> Found:
    """Reads every record of a cache: whole, finite, of the shape that its clip needs.

    Memory does not grow with the cache but for a few bytes a record.
    """
    clips = cache.clips
    clip_R = np.full(clips.num_records, NOWHERE, np.int32)
    num_captions_N = np.diff(clips.text_end_N, prepend=0)
    clip_R[clips.text_row_C] = np.repeat(np.arange(len(clips)), num_captions_N)
    clip_R[clips.latents_row_N] = np.arange(len(clips))
    masked = np.flatnonzero(clips.mask_row_N != NOWHERE)
    clip_R[clips.mask_row_N[masked]] = masked
    num_records, num_bytes, problems, shards = Counter(), 0, [], set()
    rows = tqdm(range(clips.num_records), desc="records", unit="record", disable=None)
    for row in rows:
        kind = clips.key(row).partition("-")[0]
        number = int(clip_R[row])
        bucket = None if number == NOWHERE else clips.buckets[clips.bucket_N[number]]
        num_records[kind] += 1
        try:
            record = cache.read_record(row)
            problem = _find_problem(kind, unpack_record(record), bucket)
            num_bytes += len(record)
        except DAMAGE as error:
            problem = f"cannot be read ({error})"
        if problem:
            whose = "no clip" if number == NOWHERE else clips.file(number)
            problems.append(f"{kind} of {whose}: {problem}")
            shards.add(cache.name_shard(row))
    unused = np.count_nonzero(~_find_used(cache))
    return Found(dict(num_records), num_bytes, int(unused), tuple(problems), tuple(sorted(shards)))


def collect_garbage(folder: Path, *, shard_bytes: int = SHARD_BYTES) -> int:
    """Drops the records of a complete cache that no clip needs; returns how many.

    Shards that hold some are written again without them, then the index, and then the old ones
    go; a run killed meanwhile leaves a whole cache that takes more space. Trainings that read the
    cache must not be running. The caller holds the writer's lock.

    Raises:
        BadInput: another process is writing, or a record that is needed is damaged.
    """
    cache = Cache(folder, Index(folder / INDEX))
    shards, used_R = cache.clips.shards, _find_used(cache)
    rows = np.split(np.arange(len(used_R)), np.cumsum([shard.num_records for shard in shards]))
    kept, stale = [], []
    for shard, own in zip(shards, rows[:-1], strict=True):  # after the last cut there is nothing
        if used_R[own].all():
            kept.append(shard)
        else:
            stale.append((shard, own[used_R[own]]))
    if not stale:
        return 0
    with hold_other_locks(folder):
        for some in _join_small(folder, stale, shard_bytes):
            try:
                kept.append(_copy_records(cache, some))
            except DAMAGE as error:
                raise BadInput(
                    f"{folder}: a record is damaged ({error}); wan22-cache --verify says which"
                ) from None
        replace_file(
            folder / INDEX,
            lambda path: rewrite_index(
                path, cache.clips, shards=kept, keys_R=read_keys(folder, kept)
            ),
            writer=ALONE.name,
        )
        for shard, _ in stale:
            (folder / shard.name).with_suffix(".keys").unlink()
            (folder / shard.name).unlink()
    return int(np.count_nonzero(~used_R))


def describe_found(cache: Cache, found: Found) -> str:
    """One line of counts.

    Raises:
        BadInput: records are damaged; names the first of them.
    """
    if found.problems:
        shown = "; ".join(found.problems[:SHOWN_PROBLEMS])
        more = len(found.problems) - SHOWN_PROBLEMS
        raise BadInput(
            f"{cache.folder}: {len(found.problems)} of {sum(found.num_records.values())} records "
            f"are damaged: {shown}{f'; and {more} more' if more > 0 else ''}; "
            f"{mend_shards(found.shards)}"
        )
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(found.num_records.items()))
    unused = f", {found.num_unused} unused (--gc drops them)" if found.num_unused else ""
    return (
        f"{cache.folder}: {len(cache.clips)} clips, {counts}, {found.num_bytes / 1e6:.1f} MB, "
        f"all whole{unused}"
    )


def _find_used(cache: Cache) -> np.ndarray:
    used_R = np.zeros(cache.clips.num_records, bool)
    for rows in (cache.clips.latents_row_N, cache.clips.text_row_C, cache.clips.mask_row_N):
        used_R[rows[rows != NOWHERE]] = True
    if cache.uncond_row != NOWHERE:
        used_R[cache.uncond_row] = True
    return used_R


def _find_problem(kind: str, array: np.ndarray, bucket: Bucket | None) -> str | None:
    if not np.isfinite(array.astype(np.float32)).all():
        return "is not finite"
    if kind == "text":
        fits = array.ndim == 2 and 1 <= len(array) <= TEXT_LEN
        return None if fits else f"has shape {array.shape}, expected up to {TEXT_LEN} rows"
    if kind == "mask" and not ((array >= 0) & (array <= 1)).all():
        return "is not within 0 and 1"
    if bucket is None:
        return None
    expected = (*bucket.latent_TYX, LATENT_CHANNELS) if kind == "latents" else bucket.latent_TYX[1:]
    return None if array.shape == expected else f"has shape {array.shape}, expected {expected}"


def _join_small(
    folder: Path, shards: list[tuple[Shard, np.ndarray]], shard_bytes: int
) -> Iterator[np.ndarray]:
    """Yields the rows of each shard to come; sizes are estimates."""
    rows, size = [np.empty(0, np.int64)], 0.0
    for shard, some in shards:
        rows.append(some)
        size += (folder / shard.name).stat().st_size * len(some) / shard.num_records
        if size >= shard_bytes:
            yield np.concatenate(rows)
            rows, size = rows[:1], 0.0
    if sum(map(len, rows)):
        yield np.concatenate(rows)


def _copy_records(cache: Cache, rows: np.ndarray) -> Shard:
    path = name_shard(cache.folder, ALONE)
    records = (cache.read_record(row) for row in rows.tolist())
    write_shard(path, records, cache.clips.packed_keys(rows), writer=ALONE.name)
    return Shard(path.name, len(rows))
