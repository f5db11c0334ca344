"""Which tensors do some safetensors files hold, and how is one read without the others?

A file is eight bytes (the length of the header), a JSON header that gives each tensor a dtype, a
shape and two offsets, and the numbers. Nothing of the header is believed before it is compared
with the length of the file, and nothing is read but the rows that are asked for: no file, however
damaged, costs more memory than it has bytes. Nothing stays mapped between two reads.
"""

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from wan22_jax.errors import BadInput

# Names as safetensors writes them.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_METADATA = "__metadata__"
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST_AXES = 16
_MOST_NUMBERS = 2**48  # of the axes that are not 0, so that numpy takes the shape of any tensor


@runtime_checkable
class TensorFiles(Protocol):
    """Tensors by name, read when asked."""

    where: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors writes them: F32, BF16, ...
    metadata: dict[str, str]  # what the files say beside the tensors
    paths: list[Path]  # of the files themselves

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Reads some rows (leading axis) of a tensor."""
        ...


class SafetensorsFiles:
    """The tensors of one safetensors file, or of a folder of shards.

    In a folder, the shards are those that its index names, or else every safetensors file; only
    files whose names start with ``prefix`` count.

    Raises:
        BadInput: there is no such file, a name comes twice, or a file is not what its header says:
            cut short, with offsets that overlap or leave its end, or a dtype that is unknown.
    """

    def __init__(self, where: Path, *, prefix: str = ""):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        self.paths = _list_shards(where, prefix)
        for file in self.paths:
            self._add(file)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Reads some rows (leading axis) of a tensor, in its stored dtype; a scalar whole."""
        place, shape, dtype = self._places[name], self.shapes[name], DTYPES[self.dtypes[name]]
        start = 0
        if shape:
            start, stop, _ = rows.indices(shape[0])
            shape = (max(stop - start, 0), *shape[1:])
        row_bytes = dtype.itemsize * math.prod(shape[1:])
        numbers = math.prod(shape)
        offset = place.offset + start * row_bytes
        content = np.empty(numbers * dtype.itemsize, np.uint8)
        with place.file.open("rb", buffering=0) as file:  # np.fromfile takes six times as long
            file.seek(offset)
            filled = 0
            while filled < content.size:
                num_bytes = file.readinto(content[filled:].data)
                if not num_bytes:
                    raise BadInput(
                        f"{place.file}: {name} has become shorter; download the file again"
                    )
                filled += num_bytes
        return content.view(dtype).reshape(shape)

    def _add(self, file: Path) -> None:
        try:
            metadata, tensors = _read_header(file)
        except (ValueError, RecursionError, OSError) as error:
            raise BadInput(
                f"{file}: a complete safetensors file was expected ({error}); download it again"
            ) from error
        self.metadata |= metadata
        for name, (dtype, shape, offset) in tensors.items():
            if name in self._places:
                raise BadInput(
                    f"{file}: {name} is also in {self._places[name].file.name}; keep one "
                    "checkpoint a folder"
                )
            self.shapes[name], self.dtypes[name] = shape, dtype
            self._places[name] = _Place(file, offset)


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int  # from the start of the file


def _read_header(file: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], int]]]:
    """Returns the metadata, and dtype, shape and offset of each tensor; ValueError says why not."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("this is no regular file")
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        data_bytes = status.st_size - 8 - length
        if data_bytes < 0:
            raise ValueError(
                f"it has {status.st_size} bytes and should have {8 + length} before the first "
                "tensor"
            )
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"its header cannot have {length} bytes")
        header = json.loads(content.read(length).decode(), object_pairs_hook=_refuse_twins)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{_METADATA} should hold texts")
    tensors = {name: _parse_entry(name, entry) for name, entry in header.items()}
    expected = 0
    for name, (_, _, start, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if start != expected:
            raise ValueError(f"{name} starts at {start}, where {expected} was expected")
        expected = end
    if expected != data_bytes:
        raise ValueError(f"it has {data_bytes} bytes of tensors and should have {expected}")
    return metadata, {
        name: (dtype, shape, 8 + length + start)
        for name, (dtype, shape, start, _) in tensors.items()
    }


def _parse_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} should have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has the dtype {dtype!r}, which is unknown here")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"{name} has an impossible shape")
    if math.prod(size or 1 for size in shape) > _MOST_NUMBERS:
        raise ValueError(f"{name} has the impossible shape {shape}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has impossible data_offsets")
    start, end = offsets
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != num_bytes:
        raise ValueError(f"{name} has {end - start} bytes, {dtype} of {shape} has {num_bytes}")
    return dtype, tuple(shape), start, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _refuse_twins(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"{key} comes twice")
        entries[key] = value
    return entries


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not name.startswith(".")


def _list_shards(where: Path, prefix: str) -> list[Path]:
    if not where.is_dir():
        return [where]
    indexes = sorted(where.glob(prefix + "*.safetensors.index.json"))
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes)
        raise BadInput(f"{where}: one checkpoint was expected, its indexes are {names}; keep one")
    if not indexes:
        shards = sorted(where.glob(prefix + "*.safetensors"))
        if not shards:
            raise BadInput(f"{where}: no {prefix}*.safetensors here; download the model again")
        return shards
    try:
        index = json.loads(indexes[0].read_text(), object_pairs_hook=_refuse_twins)
        names = set(index["weight_map"].values())
        if not names:
            raise ValueError("it names no file")
        if strange := [name for name in names if not _is_shard(name)]:
            raise ValueError(f"{min(strange):.100} is no safetensors file of this folder")
        shards = sorted(where / name for name in names)
        lost = [shard.name for shard in shards if not shard.is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BadInput(
            f"{indexes[0]}: an index with a weight_map was expected ({error}); download it again"
        ) from error
    if lost:
        raise BadInput(f"{where}: missing {', '.join(lost)} of its index; download the model again")
    return shards
