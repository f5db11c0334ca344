"""How do encoded clips and captions get to disk, whatever happens meanwhile?

Shards are only ever added. Every file appears by rename, so a killed run loses the clip in hand
and a full disk leaves nothing half-written.
"""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors import SafetensorError
from safetensors.numpy import save

from wan22_jax.data.cache import HEADER, INDEX, VERSION, check_header, check_shard
from wan22_jax.data.index import (
    NOWHERE,
    PACKED,
    ClipEntry,
    KeySet,
    Shard,
    pack_keys,
    write_index,
)
from wan22_jax.errors import BadInput, is_full_disk
from wan22_jax.geometry import Bucket

SHARD_BYTES = 2**30  # few enough files for a million clips


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
        if (folder / HEADER).is_file():
            check_header(folder, encoders=encoders)
        else:
            header = {"format": "wan22_jax cache", "version": VERSION, "encoders": encoders}
            _write_atomically(folder / HEADER, json.dumps(header).encode())
        yield CacheWriter(folder, shard_bytes=shard_bytes)
    finally:
        os.close(lock)


class CacheWriter:
    """Adds records to a cache folder that ``open_writer`` holds."""

    def __init__(self, folder: Path, *, shard_bytes: int):
        self.folder = folder
        self._shard_bytes = shard_bytes
        self._pending = folder / "pending" / "0000"
        self._pending.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob("*.partial"), *self._pending.glob("*.partial")]:
            leftover.unlink()
        self._read_shards()
        self._waiting: dict[str, int] = {}  # key -> bytes
        for path in sorted(self._pending.glob("*.safetensors")):
            if self._is_in_shards(path.stem):  # killed between closing a shard and tidying up
                path.unlink()
            else:
                self._waiting[path.stem] = path.stat().st_size
        self._waiting_bytes = sum(self._waiting.values())

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or self._is_in_shards(key)

    def add(self, key: str, array: np.ndarray, *, note: str = "") -> None:
        """Stores an array as bfloat16; once this returns, a killed run will not lose it.

        Args:
            key: made by ``cache.make_*_key``.
            array: of any float dtype.
            note: what the record says of itself: a text its caption.
        """
        tensors = {"array": np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))}
        record = save(tensors, metadata={"note": note} if note else None)
        path = self._pending / f"{key}.safetensors"
        _write_atomically(path, record)
        self._waiting[key] = len(record)
        self._waiting_bytes += len(record)
        if self._waiting_bytes >= self._shard_bytes:
            self._close_shard()

    def finish(self, clips: Iterable[ClipEntry], *, buckets: Sequence[Bucket]) -> None:
        """Declares the data set complete: these clips, made for these buckets."""
        if self._waiting:
            self._close_shard()
        clips = list(clips)

        def write(path: Path) -> None:
            write_index(path, clips, buckets=buckets, shards=self._shards, keys_R=self._keys_R)

        _replace(self.folder / INDEX, write)

    def _is_in_shards(self, key: str) -> bool:
        return bool(self._in_shards.find(pack_keys([key]))[0] != NOWHERE)

    def _read_shards(self) -> None:
        found = list_shards(self.folder)
        self._shards = [shard for shard, _ in found]
        self._keys_R = np.concatenate([np.empty(0, PACKED), *(keys for _, keys in found)])
        self._in_shards = KeySet(self._keys_R)

    def _close_shard(self) -> None:
        numbers = [int(shard.name[5:10]) for shard in self._shards]
        name = f"0000-{max(numbers, default=-1) + 1:05d}"
        records = [self._pending / f"{key}.safetensors" for key in self._waiting]
        write_shard(
            self.folder / f"{name}.array_record",
            (path.read_bytes() for path in records),
            pack_keys(self._waiting),
        )
        self._read_shards()
        for path in records:
            path.unlink()
        self._waiting.clear()
        self._waiting_bytes = 0


def list_shards(folder: Path) -> list[tuple[Shard, np.ndarray]]:
    """Lists the complete shards of a cache, each with its packed keys.

    Raises:
        BadInput: a file of one is gone.
    """
    shards = []
    for path in sorted(folder.glob("[0-9]*.keys")):
        keys_R = np.fromfile(path, PACKED)
        shard = Shard(f"{path.stem}.array_record", len(keys_R))
        check_shard(folder, shard)
        shards.append((shard, keys_R))
    return shards


def write_shard(path: Path, records: Iterable[bytes], keys_R: np.ndarray) -> None:
    """Writes a shard and then its keys; both appear by rename."""

    def write(partial: Path) -> None:
        # Grain reads single records at random: one record a chunk, and bfloat16 barely compresses.
        writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
        writer.close()

    _replace(path, write)
    _write_atomically(path.with_suffix(".keys"), keys_R.tobytes())


def _make_and_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock-0000", os.O_CREAT | os.O_RDWR)
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


# Files of versions 1 and 2. Only files of ours: diffusion-pipe keeps its own cache in a folder of
# the same name.
_OURS = ("[0-9]*.keys", "[0-9]*.json", "[0-9]*.array_record", "pending/*.*", "pending/*/*", "lock")


def _clear(folder: Path) -> None:
    for name in (INDEX, "clips.json"):  # first: without it nothing looks complete
        (folder / name).unlink(missing_ok=True)
    for pattern in (*_OURS, HEADER):
        for path in folder.glob(pattern):
            path.unlink()


def _write_atomically(path: Path, data: bytes) -> None:
    _replace(path, lambda partial: partial.write_bytes(data))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (RuntimeError, SafetensorError) as error:  # of libraries in C++ and Rust
        partial.unlink(missing_ok=True)
        if is_full_disk(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise
