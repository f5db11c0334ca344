"""How does a LoRA get onto disk so that a file with its final name is complete and proven?

It is written beside its final name, read back from disk through the reader of its dialect, compared
bit by bit and in what it computes, then renamed. What it computes is a forward pass of the model
where its folder is given, as wan22-export does. A run that saves while it trains compares the
products of the matrices instead: a forward pass would read the whole model from disk again, and
the bits say already that the file holds the state of that step.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from wan22_jax.adapter import Adapter, check_fit, load_adapter, to_header, to_tensors
from wan22_jax.errors import BadInput
from wan22_jax.lora_names import Dialect
from wan22_jax.model_folder import read_model_card
from wan22_jax.model_tensors import FolderTensors, stacked_weight_shapes
from wan22_jax.outputs import replacing
from wan22_jax.proof import prove_adapter
from wan22_jax.weights import cast_finite


class Proven(NamedTuple):
    """A LoRA as read back from its file, and how it was compared with the trained one."""

    adapter: Adapter
    proof: str


def write_proven(
    trained: Adapter,
    out: Path,
    *,
    dtype: str | None = None,
    dialect: Dialect = "comfyui",
    model: Path | None = None,
) -> Proven:
    """Writes a LoRA to a safetensors file, in place of any of that name; returns it as read back.

    Args:
        trained: as trained, with the metadata of its run.
        out: the file; its folder is made if need be.
        dtype: 'bfloat16', 'float16' or 'float32'; by default what the run's config says, or as it
            is where there is no config.
        dialect: of the names in it.
        model: folder of the model that it was trained on, to compare forward passes.

    Raises:
        BadInput: it does not fit the model, values that the dtype cannot hold, or the file differs
            when read back.
        OSError: it cannot be written; the file is named.
    """
    base = None if model is None else FolderTensors(model)
    if base is not None:
        check_fit(trained, stacked_weight_shapes(base))
    dtype = dtype or configured_dtype(trained)
    adapter = _cast(trained, dtype, source=trained.source)
    with replacing(out) as partial:
        write_adapter(adapter, partial, dialect)
        exported = load_adapter(partial)
        _check_equal(exported, adapter, source=str(out))
        exported = replace(exported, source=str(out))
        if model is None:
            proof = prove_adapter(trained, exported, dtype=dtype)
        else:
            config = read_model_card(model).transformer
            proof = prove_adapter(trained, exported, dtype=dtype, base=base, config=config)
    return Proven(exported, proof)


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
    remedy = "choose an earlier checkpoint with --step"
    matrices = {
        name: cast_finite(matrix, jnp.dtype(dtype), what=f"{source}: {name}", remedy=remedy)
        for name, matrix in adapter.matrices.items()
    }
    return replace(adapter, matrices=matrices)


def configured_dtype(adapter: Adapter) -> str:
    """Reads the dtype that a run's config wants for its files; without one, as it is."""
    if "config" not in adapter.metadata:
        return next(iter(adapter.matrices.values())).dtype.name
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
