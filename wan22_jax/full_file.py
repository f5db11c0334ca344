"""How do all weights of a model get into one safetensors file, and out of a training run?

The file holds the official names without a prefix, as Wan2.2 and diffusion-pipe write them. It is
written beside its final name, tensor by tensor, read back and compared bit by bit, then renamed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wan22_jax.adapter_targets import trains_all
from wan22_jax.checkpoint import read_saved_meta, read_trainable
from wan22_jax.errors import BadInput
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import stored_dtype

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def read_full(
    path: Path, *, step: int | None = None, ema: bool = False, base_digest: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the weights that a full fine-tuning has trained, by official name, and the meta.

    Args:
        path: a folder that wan22-train wrote, its checkpoints or one of them.
        step: which checkpoint; the last one by default.
        ema: the average over the steps instead of the weights themselves.
        base_digest: digest of the transformer that it must have started from.

    Raises:
        BadInput: no such checkpoint, one of an adapter, or of another base model.
    """
    weights, meta = read_trainable(path, step, ema=ema)
    if not trains_all(meta):
        raise BadInput(f"{path}: holds a LoRA, not a whole model; see wan22-export --help")
    if base_digest not in (None, meta["base_digest"]):
        raise BadInput(
            f"{path}: was trained from base model {meta['base_digest']}, this model is "
            f"{base_digest}; use the model folder that it was trained from"
        )
    return weights, meta


def is_full(path: Path, step: int | None = None) -> bool:
    """Whether a run, or a checkpoint of one, is of a full fine-tuning."""
    return path.is_dir() and trains_all(read_saved_meta(path, step))


def make_metadata(meta: Mapping[str, Any]) -> dict[str, str]:
    """Makes the header of a file from what a checkpoint says of its run."""
    return {
        "format": "pt",
        "base_digest": meta["base_digest"],
        "step": str(meta["step"]),
        "config": json.dumps(meta["config"]),
    }


def write_full(
    weights: Mapping[str, Any], out: Path, *, dtype: str, metadata: Mapping[str, str]
) -> int:
    """Writes the weights to a safetensors file, in place of any of that name.

    Args:
        weights: by official name, arrays of JAX or NumPy; one at a time is copied to the host.
        out: the file; its folder is made if need be.
        dtype: "bfloat16", "float16" or "float32"; what a model of any dtype keeps in float32 (see
            ``weights.keeps_float32``) is float32 here too.
        metadata: strings for the header.

    Returns:
        How many bytes the file has.

    Raises:
        BadInput: values that the dtype cannot hold, or the file differs when read back.
        OSError: it cannot be written; the file is named.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(_make_header(weights, dtype, metadata))
                for name in weights:
                    file.write(_cast(weights, name, dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # write and fsync do not say which file
            raise OSError(error.errno, error.strerror, str(out)) from error
        written = SafetensorsFiles(partial)
        for name in weights:
            if written.read(name).tobytes() != _cast(weights, name, dtype).tobytes():
                raise BadInput(
                    f"{out}: reads back differently from what was written ({name}); check the "
                    "disk and try again"
                )
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out.stat().st_size


def _make_header(weights: Mapping[str, Any], dtype: str, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, array in weights.items():
        kept_as = stored_dtype(name, dtype)
        end = start + array.size * kept_as.itemsize
        entries[name] = {
            "dtype": _DTYPES[kept_as.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _cast(weights: Mapping[str, Any], name: str, dtype: str) -> np.ndarray:
    trained = np.asarray(weights[name])
    with np.errstate(over="ignore"):
        array = trained.astype(stored_dtype(name, dtype))
    if not np.isfinite(array.astype(np.float32)).all():
        why = f"values beyond {dtype}; choose bfloat16"
        if not np.isfinite(trained.astype(np.float32)).all():
            why = "infinite or NaN values; choose an earlier checkpoint"
        raise BadInput(f"{name} has {why}")
    return array
