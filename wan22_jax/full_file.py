"""How do all weights of a model get into safetensors files, and out of a training run?

A file holds the official names without a prefix, as Wan2.2 and diffusion-pipe write them, unless
others are asked for. With the dtype "float8" it is what ComfyUI calls fp8_scaled: the linears of
the blocks are float8_e4m3fn, each beside its ``scale_weight``, and a marker says so. A file is
written tensor by tensor, read back and compared by SHA-256.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from wan22_jax.adapter import Adapter, describe_sizes, digest_config
from wan22_jax.adapter_targets import trains_all
from wan22_jax.checkpoint import find_trainable, read_arrays, read_saved_meta, read_trainable
from wan22_jax.errors import BadInput
from wan22_jax.model_folder import FLOAT8, quantise_layer, unquantised_dtype
from wan22_jax.model_tensors import HeldTensors, Tensors
from wan22_jax.tensor_files import DTYPES, SafetensorsFiles
from wan22_jax.weights import cast_finite, stored_dtype

_SCALE, _MARKER = "scale_weight", "scaled_fp8"  # ComfyUI's


def read_full(
    path: Path, *, step: int | None = None, ema: bool = False, base_digest: str | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Opens the weights that a full fine-tuning has trained, by official name, and their meta.

    They are read one by one, but for those of a schedule-free optimizer, which are made of two.

    Args:
        path: a folder that wan22-train wrote, its checkpoints or one of them.
        step: which checkpoint; the last one by default.
        ema: the average over the steps instead of the weights themselves.
        base_digest: digest of the transformer that it must have started from.

    Raises:
        BadInput: no such checkpoint, one of an adapter, or of another base model.
    """
    checkpoint, items, meta = find_trainable(path, step, ema=ema)
    if not trains_all(meta):
        raise BadInput(f"{path}: holds a LoRA, not a whole model; see wan22-export --help")
    if base_digest not in (None, meta["base_digest"]):
        raise BadInput(
            f"{path}: was trained from base model {meta['base_digest']}, this model is "
            f"{base_digest}; use the model folder that it was trained from"
        )
    item, *others = items
    if others:
        return HeldTensors(read_trainable(path, step, ema=ema)[0]), meta
    return _CheckpointTensors(checkpoint, item, meta["arrays"][item]), meta


class _CheckpointTensors:
    """The arrays of an item of a checkpoint, as ``Tensors``."""

    def __init__(self, checkpoint: Path, item: str, described: Mapping[str, str]):
        """``described`` has dtype and shape of each, such as "float32[2, 3]"."""
        self._checkpoint, self._item = checkpoint, item
        self.shapes = {
            name: tuple(json.loads(text[text.index("[") :])) for name, text in described.items()
        }

    def read(self, name: str) -> np.ndarray:
        return read_arrays(self._checkpoint, self._item, [name])[name]


def is_full(path: Path, step: int | None = None) -> bool:
    """Whether a run, or a checkpoint of one, is of a full fine-tuning."""
    return path.is_dir() and trains_all(read_saved_meta(path, step))


def make_metadata(meta: Mapping[str, Any]) -> dict[str, str]:
    """Makes the header of a file from what a checkpoint says of its run."""
    return {
        "format": "pt",
        "base_digest": meta["base_digest"],
        "step": str(meta["step"]),
        "config_digest": digest_config(meta["config"]),
        "config": json.dumps(meta["config"]),
    }


def describe_merge(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, str]:
    """Makes the header of a file of a model with LoRAs merged into it, with their strengths."""
    kept = ("base_digest", "step", "config_digest")
    loras = [
        {"file": Path(adapter.source).name, "strength": strength, **describe_sizes(adapter)}
        | {key: adapter.metadata[key] for key in kept if key in adapter.metadata}
        for adapter, strength in adapters
    ]
    return {"format": "pt", "merged_loras": json.dumps(loras)}


def write_full(
    tensors: Tensors,
    out: Path,
    *,
    dtype: str,
    metadata: Mapping[str, str],
    names: Mapping[str, str] | None = None,
) -> int:
    """Writes weights to a safetensors file; one that is not right when read back is deleted.

    Args:
        tensors: by official name; one at a time is in memory.
        out: the file, not under its final name yet; its folder is made if need be.
        dtype: "bfloat16", "float16", "float32" or "float8"; what a model of any dtype keeps in
            float32 (see ``weights.keeps_float32``) is float32 here too. Beside float8 linears the
            rest is bfloat16.
        metadata: strings for the header.
        names: which tensors to write, by official name, and what to call them; all by default.

    Returns:
        How many bytes the file has.

    Raises:
        BadInput: values that the dtype cannot hold, or the file differs when read back.
        OSError: it cannot be written; the file is named.
    """
    names = {name: name for name in tensors.shapes} if names is None else names
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        digests = []
        try:
            with out.open("wb") as file:
                file.write(_make_header(tensors, names, dtype, metadata))
                for official in names:
                    for array in _encode(tensors, official, dtype):
                        content = array.tobytes()
                        digests.append(sha256(content).digest())
                        file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # write and fsync do not say which file
            raise OSError(error.errno, error.strerror, str(out)) from error
        _read_back(out, tensors, names, dtype, digests)
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return out.stat().st_size


def count_bytes(tensors: Tensors, name: str, dtype: str) -> int:
    """Returns how many bytes a tensor takes in a file of this dtype."""
    planned = _plan(name, tensors.shapes[name], name, dtype)
    return sum(int(np.prod(shape)) * kept_as.itemsize for _, kept_as, shape in planned)


def _read_back(
    out: Path,
    tensors: Tensors,
    names: Mapping[str, str],
    dtype: str,
    digests: Sequence[bytes],
) -> None:
    written = SafetensorsFiles(out)
    entries = [
        entry
        for official, name in names.items()
        for entry, _, _ in _plan(official, tensors.shapes[official], name, dtype)
    ]
    for entry, digest in zip(entries, digests, strict=True):
        if sha256(written.read(entry).tobytes()).digest() != digest:
            raise BadInput(
                f"{out}: reads back differently from what was written ({entry}); check the disk "
                "and try again"
            )


def _make_header(
    tensors: Tensors, names: Mapping[str, str], dtype: str, metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for official, name in names.items():
        for entry, kept_as, shape in _plan(official, tensors.shapes[official], name, dtype):
            end = start + int(np.prod(shape)) * kept_as.itemsize
            entries[entry] = {
                "dtype": _NAMES[kept_as],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            start = end
    if dtype == FLOAT8:
        marker = {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [start, start]}
        entries[_MARKER] = marker
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


_NAMES = {kept_as: name for name, kept_as in DTYPES.items()}
_Planned = tuple[str, np.dtype, tuple[int, ...]]


def _plan(official: str, shape: tuple[int, ...], name: str, dtype: str) -> Iterator[_Planned]:
    """What is written of one tensor: names, dtypes and shapes."""
    if dtype == FLOAT8 and _is_linear(official, shape):
        yield name, DTYPES["F8_E4M3"], shape
        yield f"{name.removesuffix('weight')}{_SCALE}", DTYPES["F32"], ()
    else:
        yield name, np.dtype(stored_dtype(official, unquantised_dtype(dtype))), shape


def _is_linear(official: str, shape: tuple[int, ...]) -> bool:
    is_weight = official.startswith("blocks.") and official.endswith(".weight")
    return is_weight and len(shape) == 2


def _encode(tensors: Tensors, official: str, dtype: str) -> list[np.ndarray]:
    """The arrays that ``_plan`` describes."""
    trained = np.asarray(tensors.read(official))
    remedy = "choose an earlier checkpoint, or smaller strengths of LoRAs"
    if dtype == FLOAT8 and _is_linear(official, trained.shape):
        trained = cast_finite(trained, None, what=official, remedy=remedy)
        return [np.asarray(part) for part in quantise_layer(trained)]
    kept_as = stored_dtype(official, unquantised_dtype(dtype))
    return [cast_finite(trained, kept_as, what=official, remedy=remedy)]
