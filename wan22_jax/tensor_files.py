"""Which tensors do some safetensors files hold, and how is one read without the others?

Nothing stays mapped between two reads, so the memory of a process that goes through a checkpoint
of any size is that of the rows it is reading.
"""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

import ml_dtypes  # noqa: F401  (makes bfloat16 a dtype of numpy, which safetensors asks for)
import numpy as np
from safetensors import SafetensorError, safe_open

from wan22_jax.errors import BadInput


@runtime_checkable
class TensorFiles(Protocol):
    """Tensors by name, read when asked."""

    where: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors writes them: F32, BF16, ...

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Reads some rows (leading axis) of a tensor."""
        ...


class SafetensorsFiles:
    """The tensors of one safetensors file, or of a folder of shards.

    In a folder, the shards are those that its index names, or else every safetensors file; only
    files whose names start with ``prefix`` count. Raises BadInput if there is no such file, one
    is cut short or a name comes twice.
    """

    def __init__(self, where: Path, *, prefix: str = ""):
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_by_name: dict[str, Path] = {}
        for file in _list_shards(where, prefix):
            self._add(file)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Reads some rows (leading axis) of a tensor, in its stored dtype."""
        with safe_open(self._file_by_name[name], framework="numpy") as tensors:
            start, stop, _ = rows.indices(self.shapes[name][0])
            return tensors.get_slice(name)[start:stop]

    def _add(self, file: Path) -> None:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    if name in self._file_by_name:
                        raise BadInput(
                            f"{file}: {name} is also in {self._file_by_name[name].name}; keep "
                            "one checkpoint a folder"
                        )
                    entry = tensors.get_slice(name)
                    self.shapes[name] = tuple(entry.get_shape())
                    self.dtypes[name] = entry.get_dtype()
                    self._file_by_name[name] = file
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"{file}: a complete safetensors file was expected ({error}); download it again"
            ) from error


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
        names = set(json.loads(indexes[0].read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{indexes[0]}: an index with a weight_map was expected ({error}); download it again"
        ) from error
    shards = sorted(where / name for name in names)
    lost = [shard.name for shard in shards if not shard.is_file()]
    if lost:
        raise BadInput(f"{where}: missing {', '.join(lost)} of its index; download the model again")
    return shards
