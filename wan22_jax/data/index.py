"""Which clips does a cache hold, and in which records do their parts lie?

One file answers, mapped and not read, so that a million clips open at once and cost no memory of
the process. Axes: N clips, C captions of all clips in a row, R records of all shards in a row.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from wan22_jax.geometry import Bucket

PACKED = np.dtype("S17")  # a key: the first letter of its kind, 16 bytes of its hash
_KINDS = {kind[0]: kind for kind in ("latents", "text", "mask")}
_LETTERS = {ord(letter) for letter in _KINDS}
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64}
# What opening a damaged index raises.
BAD_INDEX = (ValueError, KeyError, TypeError, AttributeError, IndexError)
NO_OPTIONS: Mapping[str, str] = MappingProxyType({})
NOWHERE = -1  # in place of a row: there is no such record


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


class Shard(NamedTuple):
    """A file of records."""

    name: str
    num_records: int


class KeySet:
    """Finds the rows of packed keys; 25 bytes a key."""

    def __init__(self, keys_R: np.ndarray):
        self._row_R = np.argsort(keys_R, kind="stable")
        self._sorted_R = keys_R[self._row_R]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the first row of each key, or NOWHERE."""
        if not len(self._sorted_R):
            return np.full(len(keys), NOWHERE)
        at = np.searchsorted(self._sorted_R, keys)
        at[at == len(self._sorted_R)] = 0
        return np.where(self._sorted_R[at] == keys, self._row_R[at], NOWHERE)


def pack_keys(keys: Iterable[str]) -> np.ndarray:
    """Packs keys as ``cache.make_*_key`` makes them."""
    return np.array([key[:1].encode() + bytes.fromhex(key[-32:]) for key in keys], PACKED)


def unpack_key(packed: bytes) -> str:
    """Undoes ``pack_keys`` for one key."""
    packed = packed.ljust(PACKED.itemsize, b"\0")  # NumPy drops zeros at the end
    return f"{_KINDS[chr(packed[0])]}-{packed[1:].hex()}"


def write_index(
    path: Path,
    clips: Sequence[ClipEntry],
    *,
    buckets: Sequence[Bucket],
    options: Mapping[str, str],
    shards: Sequence[Shard],
    keys_R: np.ndarray,
) -> None:
    """Writes the index of a data set.

    Args:
        path: the file; not written atomically.
        clips: in the order that rows count.
        buckets: every bucket that the dataset file asks for.
        options: what else it asks for, by key.
        shards: the files that hold the records.
        keys_R: the packed keys of the shards' records.

    Raises:
        ValueError: a clip has no record.
    """
    rows = KeySet(keys_R)
    latents_row_N = rows.find(pack_keys(clip.latents_key for clip in clips))
    text_row_C = rows.find(pack_keys(key for clip in clips for key in clip.text_keys))
    masked = [number for number, clip in enumerate(clips) if clip.mask_key is not None]
    mask_row_N = np.full(len(clips), NOWHERE)
    mask_row_N[masked] = rows.find(pack_keys(clips[number].mask_key or "" for number in masked))
    found = (latents_row_N, text_row_C, mask_row_N[masked])
    if any(np.any(row == NOWHERE) for row in found):
        raise ValueError(f"{path}: clips without records")
    used = sorted({clip.bucket for clip in clips})
    numbers = {bucket: number for number, bucket in enumerate(used)}
    names = [os.fsencode(clip.file) for clip in clips]
    arrays = {
        "asked": np.array(buckets, np.int32).reshape(-1, 3),
        "options": np.frombuffer(json.dumps(dict(options)).encode(), np.uint8),
        "buckets": np.array(used, np.int32).reshape(-1, 3),
        "bucket_N": np.array([numbers[clip.bucket] for clip in clips], np.uint16),
        "start_N": np.array([clip.start for clip in clips], np.int32),
        "file": np.frombuffer(b"".join(names), np.uint8),
        "file_end_N": np.cumsum([len(name) for name in names], dtype=np.int64),
        "latents_row_N": latents_row_N.astype(np.int64),
        "mask_row_N": mask_row_N.astype(np.int64),
        "text_row_C": text_row_C.astype(np.int64),
        "text_end_N": np.cumsum([len(clip.text_keys) for clip in clips], dtype=np.int64),
        "keys_R": keys_R.view(np.uint8).reshape(-1, PACKED.itemsize),
    }
    _save(path, arrays, shards)


def load_keys(path: Path) -> np.ndarray:
    """Reads the packed keys of one shard; raises ValueError if they are none."""
    data = path.read_bytes()
    if not data or len(data) % PACKED.itemsize or not set(data[:: PACKED.itemsize]) <= _LETTERS:
        raise ValueError(f"{path}: holds no keys")
    return np.frombuffer(data, PACKED)


def read_keys(folder: Path, shards: Sequence[Shard]) -> np.ndarray:
    """Reads the packed keys of the records of some shards."""
    paths = [(folder / shard.name).with_suffix(".keys") for shard in shards]
    return np.concatenate([np.empty(0, PACKED), *map(load_keys, paths)])


def rewrite_index(
    path: Path, index: "Index", *, shards: Sequence[Shard], keys_R: np.ndarray
) -> None:
    """Writes an index of the same clips for other shards, which hold their records too.

    Args:
        path: the file; not the one that ``index`` maps.
        index: what is to be written again.
        shards: the files that hold the records now.
        keys_R: the packed keys of the shards' records.
    """
    found = KeySet(keys_R)
    arrays = dict(index.arrays)
    for name in ("latents_row_N", "mask_row_N", "text_row_C"):
        row = np.array(arrays[name])
        is_there = row != NOWHERE
        row[is_there] = found.find(index.packed_keys(row[is_there]))
        arrays[name] = row
    arrays["keys_R"] = keys_R.view(np.uint8).reshape(-1, PACKED.itemsize)
    _save(path, arrays, shards)


class Index:
    """An index, open for reading from any number of threads.

    Attributes:
        asked: every bucket that the dataset file asked for.
        options: what else it asked for.
        buckets: those that have clips.
        shards: the files of records.
        bucket_N: number in ``buckets`` of each clip.
        latents_row_N, mask_row_N, text_row_C: the record of each part; NOWHERE without a mask.
        text_end_N: in ``text_row_C``, where the captions of each clip end.
        arrays: all that the file holds, as ``write_index`` names it.

    Raises:
        FileNotFoundError: there is none.
        BAD_INDEX: it is not what was written.
    """

    def __init__(self, path: Path):
        metadata, arrays = _map_arrays(path)
        if metadata["checksum"] != _sum(arrays, metadata["shards"]):
            raise ValueError("its checksum is another")
        self.shards = [Shard(*shard) for shard in json.loads(metadata["shards"])]
        self.asked = [Bucket(*bucket) for bucket in arrays["asked"].tolist()]
        self.options: dict[str, str] = json.loads(arrays["options"].tobytes())
        self.buckets = [Bucket(*bucket) for bucket in arrays["buckets"].tolist()]
        self.bucket_N = arrays["bucket_N"]
        self.latents_row_N = arrays["latents_row_N"]
        self.mask_row_N = arrays["mask_row_N"]
        self.text_row_C = arrays["text_row_C"]
        self.text_end_N = arrays["text_end_N"]
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.bucket_N)

    def __getitem__(self, number: int) -> ClipEntry:
        mask_row = self.mask_row(number)
        return ClipEntry(
            self.file(number),
            self.buckets[self.bucket_N[number]],
            self.key(self.latents_row(number)),
            tuple(map(self.key, self.text_rows(number))),
            int(self.arrays["start_N"][number]),
            None if mask_row == NOWHERE else self.key(mask_row),
        )

    @property
    def num_records(self) -> int:
        """Of all shards, needed or not."""
        return len(self.arrays["keys_R"])

    def describe_changes(self, buckets: Sequence[Bucket], options: Mapping[str, str]) -> str:
        """Says what a dataset file asks for now that it did not then; empty if nothing."""
        if set(self.asked) != set(buckets):
            then, now = (", ".join(map(str, sorted(some))) for some in (self.asked, buckets))
            return f"was cached for {then}, the dataset file now asks for {now}"
        changes = [
            f"{key} was {self.options.get(key, 'not set')}, is {options.get(key, 'not set')}"
            for key in sorted(self.options | dict(options))
            if self.options.get(key) != options.get(key)
        ]
        said = f"the dataset file has changed since it was cached ({'; '.join(changes)})"
        return said if changes else ""

    def file(self, number: int) -> str:
        """The name of a clip's file."""
        return os.fsdecode(self.arrays["file"][_span(self.arrays["file_end_N"], number)].tobytes())

    def latents_row(self, number: int) -> int:
        """The record of a clip's latents."""
        return int(self.latents_row_N[number])

    def mask_row(self, number: int) -> int:
        """The record of a clip's mask, or NOWHERE."""
        return int(self.mask_row_N[number])

    def text_rows(self, number: int) -> list[int]:
        """The records of a clip's captions."""
        return self.text_row_C[_span(self.text_end_N, number)].tolist()

    def key(self, row: int) -> str:
        """The key of a record."""
        return unpack_key(self.arrays["keys_R"][row].tobytes())

    def packed_keys(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The packed keys of some records."""
        return self.arrays["keys_R"][rows].reshape(-1).view(PACKED)

    def find(self, key: str) -> int:
        """The row of a key, or NOWHERE; looks at all of them."""
        (packed,) = pack_keys([key])
        found = np.flatnonzero(self.packed_keys() == packed)
        return int(found[0]) if len(found) else NOWHERE


def _span(end_N: np.ndarray, number: int) -> slice:
    return slice(int(end_N[number - 1]) if number else 0, int(end_N[number]))


def _save(path: Path, arrays: dict[str, np.ndarray], shards: Sequence[Shard]) -> None:
    text = json.dumps(shards)
    metadata = {"checksum": _sum(arrays, text), "shards": text}
    save_file(arrays, path, metadata=metadata)
    # Of the same data set the same bytes: safetensors writes metadata in an order of chance.
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": metadata}
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(size))


def _sum(arrays: Mapping[str, np.ndarray], shards: str) -> str:
    """One wrong row would train a clip with another's caption, and nothing would tell."""
    crc = zlib.crc32(shards.encode())
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _map_arrays(path: Path) -> tuple[Mapping[str, str], dict[str, np.ndarray]]:
    # safetensors' own reader copies what it gives.
    data = np.memmap(path, mode="r")
    begin = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8:begin].tobytes())
    metadata = header.pop("__metadata__")
    return metadata, {
        name: data[slice(*(begin + offset for offset in tensor["data_offsets"]))]
        .view(_DTYPES[tensor["dtype"]])
        .reshape(tensor["shape"])
        for name, tensor in header.items()
    }
