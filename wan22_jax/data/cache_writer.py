"""How do encoded clips and captions get to disk, whatever happens meanwhile?

Shards are only ever added. Every file appears by rename, so a killed run loses the clip in hand
and a full disk leaves nothing half-written.

Several processes, on one host or many, may fill one cache: process i of n encodes the records
whose keys' hashes are i modulo n, into shards of its own. Nothing has to be agreed on, which file
systems that are shared between hosts would not guarantee. Whoever finds all records there writes
the index. A lock for each i keeps a second process from taking the same part; where the file
system knows no locks, that is left to the user.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors import SafetensorError
from safetensors.numpy import save

from wan22_jax.data.cache import HEADER, INDEX, VERSION, check_header, check_shard, mend_shards
from wan22_jax.data.index import (
    BAD_INDEX,
    NO_OPTIONS,
    NOWHERE,
    PACKED,
    ClipEntry,
    Index,
    KeySet,
    Shard,
    load_keys,
    pack_keys,
    write_index,
)
from wan22_jax.errors import BadInput, is_full_disk
from wan22_jax.geometry import Bucket

SHARD_BYTES = 2**30  # few enough files for a million clips


class Process(NamedTuple):
    """One of those that fill a cache together."""

    number: int  # from 0
    num_processes: int

    @property
    def name(self) -> str:
        """Sets its files apart from those of others."""
        return f"{self.number:04d}"


ALONE = Process(0, 1)


@contextmanager
def open_writer(
    folder: Path,
    *,
    encoders: str,
    regenerate: bool = False,
    shard_bytes: int = SHARD_BYTES,
    process: Process = ALONE,
) -> Iterator["CacheWriter"]:
    """Opens or starts a cache for writing.

    Args:
        folder: made if it does not exist.
        encoders: ``name_encoders`` of the model in use.
        regenerate: drop what is there first.
        shard_bytes: size at which pending records become a shard.
        process: which part of the records this process adds.

    Raises:
        BadInput: another process is writing this part, other encoders made what is there, or the
            folder cannot be written.
    """
    if regenerate and process.num_processes > 1:
        raise BadInput(
            f"{folder}: --regenerate_cache would drop what the other processes have encoded; "
            "delete this folder instead and start them without it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror})") from None
    with hold_lock(folder, process.name):
        if regenerate:
            _clear(folder)
        if not (folder / HEADER).is_file():
            header = {"format": "wan22_jax cache", "version": VERSION, "encoders": encoders}
            _write_atomically(folder / HEADER, json.dumps(header).encode(), writer=process.name)
        check_header(folder, encoders=encoders)  # after another process may have been quicker
        yield CacheWriter(folder, shard_bytes=shard_bytes, process=process)


class CacheWriter:
    """Adds records to a cache folder that ``open_writer`` holds."""

    def __init__(self, folder: Path, *, shard_bytes: int, process: Process):
        self.folder = folder
        self.process = process
        self._shard_bytes = shard_bytes
        self._pending = folder / "pending" / process.name
        self._pending.mkdir(parents=True, exist_ok=True)
        self._adopt_pending()
        partial = f"*.{process.name}.partial"
        for leftover in [*folder.glob(partial), *self._pending.glob("*.partial")]:
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

    def owns(self, key: str) -> bool:
        """Whether it is this process that adds the record."""
        return int(key[-8:], 16) % self.process.num_processes == self.process.number

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
        _write_atomically(path, record, writer=self.process.name)
        self._waiting[key] = len(record)
        self._waiting_bytes += len(record)
        if self._waiting_bytes >= self._shard_bytes:
            self._close_shard()

    def finish(
        self,
        clips: Iterable[ClipEntry],
        *,
        buckets: Sequence[Bucket],
        options: Mapping[str, str] = NO_OPTIONS,
    ) -> int:
        """Declares the data set complete, these clips made for these buckets, if it is.

        Args:
            clips: in the order that rows count.
            buckets: every bucket that the dataset file asks for.
            options: what else it asks for, see ``Folder.options``.

        Returns:
            How many records other processes have not added yet; 0 if the data set is complete.
        """
        if self._waiting:
            self._close_shard()
        self._read_shards()  # those of other processes too
        clips = list(clips)
        keys = [key for clip in clips for key in clip.keys]
        rows = self._in_shards.find(pack_keys(keys))
        if missing := {keys[i] for i in np.flatnonzero(rows == NOWHERE)}:
            if own := [key for key in missing if self.owns(key)]:
                raise ValueError(f"records that were not added: {own}")
            return len(missing)

        def write(path: Path) -> None:
            write_index(
                path,
                clips,
                buckets=buckets,
                options=options,
                shards=self._shards,
                keys_R=self._keys_R,
            )

        replace_file(self.folder / INDEX, write, writer=self.process.name)
        return 0

    def _adopt_pending(self) -> None:
        # An earlier run of more processes was killed: this run has none of that number.
        for folder in sorted((self.folder / "pending").glob("[0-9]" * 4)):
            other = int(folder.name)
            if (
                other < self.process.num_processes
                or other % self.process.num_processes != self.process.number
            ):
                continue
            with hold_lock(self.folder, folder.name):
                for path in folder.glob("*.safetensors"):
                    path.rename(self._pending / path.name)
                shutil.rmtree(folder)

    def _is_in_shards(self, key: str) -> bool:
        return bool(self._in_shards.find(pack_keys([key]))[0] != NOWHERE)

    def _read_shards(self) -> None:
        found = list_shards(self.folder)
        self._shards = [shard for shard, _ in found]
        self._keys_R = np.concatenate([np.empty(0, PACKED), *(keys for _, keys in found)])
        self._in_shards = KeySet(self._keys_R)

    def _close_shard(self) -> None:
        records = [self._pending / f"{key}.safetensors" for key in self._waiting]
        write_shard(
            name_shard(self.folder, self.process),
            (path.read_bytes() for path in records),
            pack_keys(self._waiting),
            writer=self.process.name,
        )
        self._read_shards()
        for path in records:
            path.unlink()
        self._waiting.clear()
        self._waiting_bytes = 0


def list_shards(folder: Path) -> list[tuple[Shard, np.ndarray]]:
    """Lists the complete shards of a cache, each with its packed keys.

    Raises:
        BadInput: a file of one is gone, or its keys are damaged.
    """
    shards = []
    for path in sorted(folder.glob("[0-9]*.keys")):
        name = f"{path.stem}.array_record"
        try:
            keys_R = load_keys(path)
        except ValueError:
            raise BadInput(f"{path}: is damaged; {mend_shards([name])}") from None
        shard = Shard(name, len(keys_R))
        check_shard(folder, shard)
        shards.append((shard, keys_R))
    return shards


def name_shard(folder: Path, process: Process) -> Path:
    """Names the next shard of a process.

    No name comes twice, not even that of a shard that somebody deleted: the index may still tell
    what was in that one.
    """
    names = [path.name for path in folder.glob(f"{process.name}-*.keys")]
    names += [name for name in _list_indexed(folder) if name.startswith(process.name)]
    numbers = [int(Path(name).stem[5:]) for name in names]
    return folder / f"{process.name}-{max(numbers, default=-1) + 1:05d}.array_record"


def _list_indexed(folder: Path) -> list[str]:
    try:
        return [shard.name for shard in Index(folder / INDEX).shards]
    except (FileNotFoundError, *BAD_INDEX):  # there is none, or none that anybody could read
        return []


def write_shard(path: Path, records: Iterable[bytes], keys_R: np.ndarray, *, writer: str) -> None:
    """Writes a shard and then its keys; both appear by rename."""

    def write(partial: Path) -> None:
        # Grain reads single records at random: one record a chunk, and bfloat16 barely compresses.
        shard = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        for record in records:
            shard.write(record)
        shard.close()

    replace_file(path, write, writer=writer)
    _write_atomically(path.with_suffix(".keys"), keys_R.tobytes(), writer=writer)


@contextmanager
def hold_lock(folder: Path, name: str) -> Iterator[None]:
    """Keeps others from writing a part of a cache; a killed process lets go of its locks.

    Raises:
        BadInput: another process holds it, or the folder cannot be written.
    """
    try:
        lock = os.open(folder / f"lock-{name}", os.O_CREAT | os.O_RDWR)
    except PermissionError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BadInput(
            f"{folder}: another wan22-cache is writing here; wait until it is done"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(lock)
            raise
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def hold_other_locks(folder: Path) -> Iterator[None]:
    """Keeps everybody from writing a cache; the caller holds the lock of ``ALONE``.

    Raises:
        BadInput: a process is writing.
    """
    with ExitStack() as stack:
        for lock in folder.glob("lock-*"):
            name = lock.name.removeprefix("lock-")
            if name != ALONE.name:
                stack.enter_context(hold_lock(folder, name))
        yield


# Files of versions 1 and 2. Only files of ours: diffusion-pipe keeps its own cache in a folder of
# the same name.
_OURS = ("[0-9]*.keys", "[0-9]*.json", "[0-9]*.array_record", "pending/*.*", "pending/*/*", "lock")


def _clear(folder: Path) -> None:
    with hold_other_locks(folder):
        for pattern in (INDEX, "clips.json", *_OURS, HEADER):  # the first makes it look complete
            for path in folder.glob(pattern):
                path.unlink()


def replace_file(path: Path, write: Callable[[Path], object], *, writer: str) -> None:
    """Lets a file appear whole or not at all; ``write`` is told where to put it.

    Raises:
        OSError: among others, that the disk is full, whichever library notices.
    """
    partial = path.with_name(f"{path.name}.{writer}.partial")
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


def _write_atomically(path: Path, data: bytes, *, writer: str) -> None:
    replace_file(path, lambda partial: partial.write_bytes(data), writer=writer)
