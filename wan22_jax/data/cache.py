"""Where do encoded clips and captions lie on disk, and how do they get there and back?

A cache folder holds

  cache.json                 which encoders made it; written first
  00000.array_record, ...    shards; a record is one safetensors file with one array
  00000.json, ...            the keys of a shard's records, in order; its presence = complete
  pending/<key>.safetensors  encoded, not in a shard yet
  clips.json                 the data set: each clip's file, bucket and two keys; written last

Latents and captions are records of their own, keyed by content, so that an edited caption
re-encodes one text and nothing else. Shards are only ever added. Every file appears by rename, so
a killed run loses the clip in hand and a full disk leaves nothing half-written.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from wan22_jax.batch import CachedClip
from wan22_jax.errors import BadInput, is_full_disk
from wan22_jax.geometry import Bucket

CACHE_FOLDER = Path("cache", "wan2.2_5b")  # below the clips' folder, as in diffusion-pipe
SHARD_BYTES = 2**30  # few enough files for a million clips
VERSION = 1  # of the layout above and of the way from file to pixels (data/video.py)
_HEADER, _MANIFEST = "cache.json", "clips.json"
REMEDY = "run wan22-cache on this dataset"


class ClipEntry(NamedTuple):
    """One clip of a cached data set."""

    file: str  # name in the clips' folder
    bucket: Bucket
    latents_key: str
    text_keys: tuple[str, ...]  # of its captions, one or more
    start: int = 0  # first frame, at the rate of the model
    mask_key: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The records that it needs."""
        return self.latents_key, *self.text_keys, *filter(None, [self.mask_key])


def name_encoders(digests: Mapping[str, str]) -> str:
    """Names the encoders of a model card by their content digests; another name, another cache."""
    return f"vae {digests['vae'][:16]}, text_encoder {digests['text_encoder'][:16]}"


def make_latents_key(media_digest: str, bucket: Bucket, *, cut: str = "single_beginning") -> str:
    """Names the latents of one clip of a file in a bucket; ``cut`` says which frames it has."""
    return f"latents-{_hash(f'{media_digest} {bucket} {cut}')}"


def make_text_key(caption: str) -> str:
    """Names the embedding of a caption."""
    return f"text-{_hash(caption)}"


class Cache:
    """A complete cache folder, open for reading from any number of threads."""

    def __init__(self, folder: Path, clips: Sequence[ClipEntry]):
        self.folder = folder
        self.clips = tuple(clips)
        rows: dict[str, int] = {}
        shards, num_rows = [], 0
        for path, keys in _list_shards(folder):
            rows |= {key: num_rows + position for position, key in enumerate(keys)}
            num_rows += len(keys)
            shards.append(f"{path}[0:{len(keys)}]")  # a length given here is not read from disk
        for clip in clips:
            if not set(clip.keys) <= rows.keys():
                raise BadInput(f"{folder}: has no record of {clip.file}; {REMEDY}")
        self._rows = rows
        self._records = ArrayRecordDataSource(shards)

    def read(self, clip: ClipEntry) -> CachedClip:
        """Reads one clip with its first caption; bfloat16, as stored.

        Raises:
            BadInput: its record is damaged.
        """
        try:
            latents, text = (
                _unpack(self._records[self._rows[key]])
                for key in (clip.latents_key, clip.text_keys[0])
            )
        except (RuntimeError, ValueError, IndexError, SafetensorError) as error:
            raise BadInput(
                f"{self.folder}: the record of {clip.file} is damaged ({error}); "
                "run wan22-cache with --regenerate_cache"
            ) from None
        return CachedClip(latents, text)


def open_cache(folder: Path, *, encoders: str, buckets: Sequence[Bucket]) -> Cache:
    """Opens the cache of one clips' folder.

    Args:
        folder: the cache folder.
        encoders: ``name_encoders`` of the model in use.
        buckets: every bucket that the dataset file asks for now.

    Raises:
        BadInput: no complete cache, or one made by other encoders or for other buckets.
    """
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        raise BadInput(f"{folder}: holds no complete cache; {REMEDY}")
    _check_encoders(folder, encoders)
    tree = json.loads(manifest.read_text("utf-8"))
    cached_for = [Bucket(*bucket) for bucket in tree["buckets"]]
    if set(cached_for) != set(buckets):
        raise BadInput(
            f"{folder}: was cached for {_join(cached_for)}, the dataset file now asks for "
            f"{_join(buckets)}; {REMEDY} again (what is still right is kept)"
        )
    clips = [
        ClipEntry(file, Bucket(*bucket), latents_key, tuple(text_keys), start, mask_key)
        for file, bucket, latents_key, text_keys, start, mask_key in tree["clips"]
    ]
    return Cache(folder, clips)


@contextmanager
def open_writer(
    folder: Path, *, encoders: str, regenerate: bool = False, shard_bytes: int = SHARD_BYTES
) -> Iterator["CacheWriter"]:
    """Opens or starts a cache for writing, for one process at a time.

    Args:
        folder: made if it does not exist.
        encoders: ``name_encoders`` of the model in use.
        regenerate: drop what is there first.
        shard_bytes: size at which pending records become a shard.

    Raises:
        BadInput: another process is writing, other encoders made what is there, or the folder
            cannot be written.
    """
    lock = _make_and_lock(folder)
    try:
        if regenerate:
            _clear(folder)
        if (folder / _HEADER).is_file():
            _check_encoders(folder, encoders)
        else:
            header = {"format": "wan22_jax cache", "version": VERSION, "encoders": encoders}
            _write_json(folder / _HEADER, header)
        yield CacheWriter(folder, shard_bytes=shard_bytes)
    finally:
        os.close(lock)


class CacheWriter:
    """Adds records to a cache folder that ``open_writer`` holds."""

    def __init__(self, folder: Path, *, shard_bytes: int):
        self.folder = folder
        self._pending = folder / "pending"
        self._shard_bytes = shard_bytes
        self._pending.mkdir(exist_ok=True)
        for leftover in [*folder.glob("*.partial"), *self._pending.glob("*.partial")]:
            leftover.unlink()
        self._in_shards = {key for _, keys in _list_shards(folder) for key in keys}
        self._waiting: dict[str, int] = {}  # key -> bytes
        for path in sorted(self._pending.glob("*.safetensors")):
            if path.stem in self._in_shards:  # killed between closing a shard and tidying up
                path.unlink()
            else:
                self._waiting[path.stem] = path.stat().st_size

    def __contains__(self, key: str) -> bool:
        return key in self._in_shards or key in self._waiting

    def add(self, key: str, array: np.ndarray) -> None:
        """Stores an array as bfloat16; once this returns, a killed run will not lose it."""
        path = self._pending / f"{key}.safetensors"
        record = save({"array": np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))})
        _write_atomically(path, record)
        self._waiting[key] = len(record)
        if sum(self._waiting.values()) >= self._shard_bytes:
            self._close_shard()

    def finish(self, clips: Iterable[ClipEntry], *, buckets: Sequence[Bucket]) -> None:
        """Declares the data set complete: these clips, made for these buckets."""
        clips = list(clips)
        if missing := [c.file for c in clips if not all(key in self for key in c.keys)]:
            raise ValueError(f"clips without records: {missing}")
        if self._waiting:
            self._close_shard()
        _write_json(
            self.folder / _MANIFEST, {"version": VERSION, "buckets": buckets, "clips": clips}
        )

    def _close_shard(self) -> None:
        number = max((int(path.stem) for path, _ in _list_shards(self.folder)), default=-1) + 1
        shard = self.folder / f"{number:05d}.array_record"
        _write_shard(shard, [self._pending / f"{key}.safetensors" for key in self._waiting])
        _write_json(shard.with_suffix(".json"), list(self._waiting))
        for key in self._waiting:
            (self._pending / f"{key}.safetensors").unlink()
        self._in_shards.update(self._waiting)
        self._waiting.clear()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def _join(buckets: Iterable[Bucket]) -> str:
    return ", ".join(map(str, sorted(buckets)))


def _list_shards(folder: Path) -> list[tuple[Path, list[str]]]:
    shards = []
    for index in sorted(folder.glob("[0-9]*.json")):
        shard = index.with_suffix(".array_record")
        if not shard.is_file():
            raise BadInput(f"{shard}: is gone; run wan22-cache with --regenerate_cache")
        shards.append((shard, json.loads(index.read_text("utf-8"))))
    return shards


def _check_encoders(folder: Path, encoders: str) -> None:
    header = json.loads((folder / _HEADER).read_text("utf-8"))
    if header["version"] != VERSION:
        raise BadInput(
            f"{folder}: has cache version {header['version']}, this program writes {VERSION}; "
            "run wan22-cache with --regenerate_cache"
        )
    if header["encoders"] != encoders:
        raise BadInput(
            f"{folder}: was made by other encoders ({header['encoders']}); "
            f"this model has {encoders}; "
            "run wan22-cache with --regenerate_cache, or use the model that made it"
        )


def _unpack(record: bytes) -> np.ndarray:
    # safetensors.numpy.load knows bfloat16 in files only.
    ((_, tensor),) = deserialize(record)
    return np.frombuffer(tensor["data"], ml_dtypes.bfloat16).reshape(tensor["shape"])


def _make_and_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process lets go of it
    except BlockingIOError:
        os.close(lock)
        raise BadInput(
            f"{folder}: another wan22-cache is writing here; wait until it is done"
        ) from None
    return lock


def _clear(folder: Path) -> None:
    # Only files of ours: diffusion-pipe keeps its own cache in a folder of the same name.
    (folder / _MANIFEST).unlink(missing_ok=True)  # first: without it nothing looks complete
    for pattern in ("[0-9]*.json", "[0-9]*.array_record", "pending/*", _HEADER):
        for path in folder.glob(pattern):
            path.unlink()


def _write_json(path: Path, tree: object) -> None:
    _write_atomically(path, json.dumps(tree).encode())


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_shard(shard: Path, records: Iterable[Path]) -> None:
    partial = shard.with_name(shard.name + ".partial")
    try:
        # Grain reads single records at random: one record a chunk, and bfloat16 barely compresses.
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        for record in records:
            writer.write(record.read_bytes())
        writer.close()
        partial.rename(shard)
    except RuntimeError as error:
        partial.unlink(missing_ok=True)
        if is_full_disk(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(shard)) from error
        raise
