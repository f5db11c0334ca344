"""wan22-export: how does a training run become a file that ComfyUI loads, or a model folder?

A LoRA is written here, all weights of a full fine-tuning in ``export_full.py``. The file is
written beside its final name, read back from disk and compared bit by bit, then renamed: what
carries the final name is complete and proven.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from convert.export_full import export_full
from wan22_jax.adapter import Adapter, load_adapter, to_comfyui
from wan22_jax.errors import BadInput, run_command
from wan22_jax.full_file import is_full
from wan22_jax.model_folder import read_model_card

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-export", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, or one of its checkpoints"
    )
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument(
        "--out", type=Path, required=True, help="file to write, *.safetensors, or folder"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the run's config")
    parser.add_argument("--model", type=Path, help="refuse unless trained on this model folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args))


def export_adapter(
    checkpoint: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    base_digest: str | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Writes the LoRA of a training run to a safetensors file; returns it as read back.

    Args:
        checkpoint: a run of wan22-train, its checkpoints folder or one of its checkpoints.
        out: the file; its folder is made if need be.
        step: which checkpoint of the run; the newest by default.
        dtype: one of DTYPES; by default that of the run's ``[adapter]`` table.
        base_digest: digest of the transformer that the LoRA must have been trained on.
        overwrite: replace an existing file.

    Raises:
        BadInput: no such checkpoint, another base model, values that the dtype cannot hold, or
            the file exists already or differs when read back.
    """
    if out.suffix != ".safetensors":
        raise BadInput(f"{out}: the name of a LoRA file must end in .safetensors")
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: exists already; choose another name or add --overwrite")
    if not checkpoint.is_dir():
        raise BadInput(f"{checkpoint}: is not a folder; give a run folder made by wan22-train")
    trained = load_adapter(checkpoint, step=step, base_digest=base_digest)
    adapter = _cast(trained, dtype or _configured_dtype(trained), source=str(checkpoint))
    partial = out.with_name(f".{out.name}.partial")
    try:
        write_adapter(adapter, partial)
        exported = load_adapter(partial)
        _check_equal(exported, adapter, source=str(out))
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return exported


def write_adapter(adapter: Adapter, path: Path) -> None:
    """Writes a safetensors file with ComfyUI's names and the adapter's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors.numpy.save(to_comfyui(adapter), metadata=adapter.metadata)
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


def _configured_dtype(adapter: Adapter) -> str:
    return json.loads(adapter.metadata["config"])["adapter"]["dtype"]


def _check_equal(read: Adapter, written: Adapter, *, source: str) -> None:
    read_tensors, written_tensors = to_comfyui(read), to_comfyui(written)
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


def _run(args: argparse.Namespace) -> None:
    if is_full(args.checkpoint, args.step):
        line = export_full(
            args.checkpoint,
            args.out,
            step=args.step,
            dtype=args.dtype,
            model=args.model,
            overwrite=args.overwrite,
        )
        sys.stdout.write(f"{line}\n")
        return
    base_digest = read_model_card(args.model).digests["transformer"] if args.model else None
    adapter = export_adapter(
        args.checkpoint,
        args.out,
        step=args.step,
        dtype=args.dtype,
        base_digest=base_digest,
        overwrite=args.overwrite,
    )
    tensors = to_comfyui(adapter)
    dtype = next(iter(adapter.matrices.values())).dtype
    sys.stdout.write(
        f"wrote {args.out}: {len(tensors)} tensors, {dtype}, rank {adapter.rank}, "
        f"alpha {adapter.alpha:g}, step {adapter.metadata['step']}, "
        f"{args.out.stat().st_size / 1e6:.1f} MB; read back and equal bit by bit\n"
    )


if __name__ == "__main__":
    sys.exit(main())
