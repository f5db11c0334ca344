"""wan22-export: how does a training run become a file that ComfyUI loads, or a model folder?

A LoRA is written here, all weights of a full fine-tuning in ``export_full.py``. The file is
written beside its final name, read back from disk and compared bit by bit, then renamed: what
carries the final name is complete and proven.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.export_full import export_full
from wan22_jax.adapter import Adapter, load_adapter, to_tensors
from wan22_jax.adapter_file import write_proven
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
    average = parser.add_mutually_exclusive_group()
    average.add_argument("--ema", action="store_true", help="the average that ema_decay makes")
    average.add_argument("--raw", action="store_true", help="the weights themselves (default)")
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
    ema: bool = False,
    dtype: str | None = None,
    base_digest: str | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Writes the LoRA of a training run to a safetensors file; returns it as read back.

    Args:
        checkpoint: a run of wan22-train, its checkpoints folder or one of its checkpoints.
        out: the file; its folder is made if need be.
        step: which checkpoint of the run; the newest by default.
        ema: write the average over the steps (``ema_decay``) instead of the weights themselves.
        dtype: one of DTYPES; by default the run's ``save_dtype``, else that of ``[adapter]``.
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
    trained = load_adapter(checkpoint, step=step, ema=ema, base_digest=base_digest)
    return write_proven(trained, out, dtype=dtype)


def _run(args: argparse.Namespace) -> None:
    shared = {name: getattr(args, name) for name in ("step", "ema", "dtype", "overwrite")}
    if is_full(args.checkpoint, args.step):
        line = export_full(args.checkpoint, args.out, model=args.model, **shared)
        sys.stdout.write(f"{line}\n")
        return
    base_digest = read_model_card(args.model).digests["transformer"] if args.model else None
    adapter = export_adapter(args.checkpoint, args.out, base_digest=base_digest, **shared)
    tensors = to_tensors(adapter)
    dtype = next(iter(adapter.matrices.values())).dtype
    sys.stdout.write(
        f"wrote {args.out}: {len(tensors)} tensors, {dtype}, {adapter}, "
        f"step {adapter.metadata['step']}, "
        f"{args.out.stat().st_size / 1e6:.1f} MB; read back and equal bit by bit\n"
    )


if __name__ == "__main__":
    sys.exit(main())
