"""How does a LoRA get onto disk so that a file with its final name is complete and proven?

It is written beside its final name, read back from disk and compared bit by bit, then renamed.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from wan22_jax.adapter import Adapter, load_adapter, to_header, to_tensors
from wan22_jax.errors import BadInput
from wan22_jax.lora_names import Dialect


def write_proven(
    trained: Adapter, out: Path, *, dtype: str | None = None, dialect: Dialect = "comfyui"
) -> Adapter:
    """Writes a LoRA to a safetensors file, in place of any of that name; returns it as read back.

    Args:
        trained: float32 as trained, with the metadata of its run.
        out: the file; its folder is made if need be.
        dtype: 'bfloat16', 'float16' or 'float32'; by default what the run's config says.
        dialect: of the names in it.

    Raises:
        BadInput: values that the dtype cannot hold, or the file differs when read back.
        OSError: it cannot be written; the file is named.
    """
    adapter = _cast(trained, dtype or configured_dtype(trained), source=trained.source)
    partial = out.with_name(f".{out.name}.partial")
    try:
        write_adapter(adapter, partial, dialect)
        exported = load_adapter(partial)
        _check_equal(exported, adapter, source=str(out))
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return exported


def write_adapter(adapter: Adapter, path: Path, dialect: Dialect = "comfyui") -> None:
    """Writes a safetensors file with a dialect's names and the adapter's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors.numpy.save(
        to_tensors(adapter, dialect), metadata=to_header(adapter, dialect)
    )
    try:
        with path.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
    except OSError as error:  # write and fsync do not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error


def _cast(adapter: Adapter, dtype: str, *, source: str) -> Adapter:
    matrices = {}
    for name, matrix in adapter.matrices.items():
        with np.errstate(over="ignore"):
            matrices[name] = matrix.astype(jnp.dtype(dtype))
        if not np.isfinite(matrices[name].astype(np.float32)).all():
            why = f"values beyond {dtype}; add --dtype bfloat16"
            if not np.isfinite(matrix.astype(np.float32)).all():
                why = "infinite or NaN values; choose an earlier checkpoint with --step"
            raise BadInput(f"{source}: {name} has {why}")
    return replace(adapter, matrices=matrices)


def configured_dtype(adapter: Adapter) -> str:
    """Reads the dtype that a run's config wants for its files."""
    config = json.loads(adapter.metadata["config"])
    return config.get("save_dtype") or config["adapter"]["dtype"]


def _check_equal(read: Adapter, written: Adapter, *, source: str) -> None:
    read_tensors, written_tensors = to_tensors(read), to_tensors(written)
    wrong = {
        name
        for name in read_tensors.keys() | written_tensors.keys()
        if _bits(read_tensors.get(name)) != _bits(written_tensors.get(name))
    }
    if wrong or read.metadata != written.metadata:
        raise BadInput(
            f"{source}: reads back differently from what was written "
            f"({', '.join(sorted(wrong)[:3]) or 'the metadata'}); check the disk and try again"
        )


def _bits(tensor: np.ndarray | None) -> tuple[str, tuple[int, ...], bytes] | None:
    return None if tensor is None else (tensor.dtype.name, tensor.shape, tensor.tobytes())
