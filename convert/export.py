"""wan22-export: how does a training run become a file or a folder that other programs load?

A LoRA becomes one file in the dialect of ComfyUI, Diffusers or kohya. A full fine-tuning, or a LoRA
that is merged into its base, becomes a whole model: see ``whole_model.py``. Everything is written
beside its final name, read back from disk and compared bit by bit and in what it computes, then
renamed: what carries the final name is complete and proven.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging

from convert.whole_model import (
    FORMATS,
    WholeModel,
    choose_format,
    merge_loras,
    write_model,
)
from wan22_jax.adapter import load_adapter, to_tensors
from wan22_jax.adapter_file import Proven, write_proven
from wan22_jax.checkpoint import read_saved_meta
from wan22_jax.errors import BadInput, one_line, run_command
from wan22_jax.full_file import is_full, make_metadata, read_full
from wan22_jax.lora_names import DIALECTS, Dialect
from wan22_jax.model_folder import find_model_folder, read_transformer_digest
from wan22_jax.outputs import check_output
from wan22_jax.proof import Variant

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-export", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="run folder, or one of its checkpoints")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add("--out", type=Path, required=True, help="file to write, *.safetensors, or folder")
    add(
        "--format",
        choices=tuple(dict.fromkeys((*DIALECTS, *FORMATS))),
        help="of a LoRA: comfyui (default), diffusers, kohya; of a model: official (default for a "
        "file), fp8_scaled, diffusers, model (default for a folder)",
    )
    add("--merge", action="store_true", help="the model with the LoRA merged into it")
    average = parser.add_mutually_exclusive_group()
    average.add_argument("--ema", action="store_true", help="the average that ema_decay makes")
    average.add_argument("--raw", action="store_true", help="the weights themselves (default)")
    add("--dtype", choices=DTYPES, help="default: that of the run's config")
    add("--model", type=Path, help="the model folder that it was trained on, else it is refused")
    add("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # a GPU may be training
    logging.set_verbosity(logging.ERROR)  # Orbax warns of files that a model folder has not
    return run_command(lambda: _run(args))


def export_adapter(
    checkpoint: Path,
    out: Path,
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: str | None = None,
    dialect: Dialect = "comfyui",
    base_digest: str | None = None,
    model: Path | None = None,
    overwrite: bool = False,
) -> Proven:
    """Writes the LoRA of a training run to a safetensors file; returns it as read back.

    Args:
        checkpoint: a run of wan22-train, its checkpoints folder or one of its checkpoints.
        out: the file; its folder is made if need be.
        step: which checkpoint of the run; the newest by default.
        ema: write the average over the steps (``ema_decay``) instead of the weights themselves.
        dtype: one of DTYPES; by default the run's ``save_dtype``, else that of ``[adapter]``.
        dialect: of the names in the file.
        base_digest: digest of the transformer that the LoRA must have been trained on.
        model: folder of that model, to prove the file with.
        overwrite: replace an existing file.

    Raises:
        BadInput: no such checkpoint, another base model, values that the dtype cannot hold, or
            the file exists already or is not the LoRA when read back.
    """
    check_lora_file(out, overwrite=overwrite)
    if not checkpoint.is_dir():
        raise BadInput(f"{checkpoint}: is not a folder; give a run folder made by wan22-train")
    trained = load_adapter(checkpoint, step=step, ema=ema, base_digest=base_digest)
    return write_proven(trained, out, dtype=dtype, dialect=dialect, model=model)


def check_lora_file(out: Path, *, overwrite: bool) -> None:
    """Raises BadInput if a LoRA cannot be written to this path."""
    if out.suffix != ".safetensors":
        raise BadInput(f"{out}: the name of a LoRA file must end in .safetensors")
    check_output(out)
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: exists already; choose another name or add --overwrite")
    if out.is_dir():
        raise BadInput(f"{out}: is a folder, so it is not replaced; choose another name")


def describe_file(out: Path, proven: Proven, dialect: Dialect) -> str:
    """Says what a LoRA file holds."""
    adapter = proven.adapter
    dtype = next(iter(adapter.matrices.values())).dtype
    step = adapter.metadata.get("step")  # of any maker
    step = "" if step is None else f", step {one_line(step):.24}"
    return (
        f"wrote {out}: {len(to_tensors(adapter, dialect))} tensors, {dtype}, {adapter}{step}, "
        f"{out.stat().st_size / 1e6:.1f} MB, names of {dialect}; read back and equal bit by bit; "
        f"{proven.proof}"
    )


def _run(args: argparse.Namespace) -> None:
    full = is_full(args.checkpoint, args.step)
    if full and args.merge:
        raise BadInput(f"{args.checkpoint}: is a whole model already; leave --merge out")
    line = _export_model(args, full=full) if full or args.merge else _export_lora(args)
    sys.stdout.write(f"{line}\n")


def _export_lora(args: argparse.Namespace) -> str:
    dialect: Dialect = args.format or "comfyui"
    if dialect not in DIALECTS:
        raise BadInput(
            f"--format {dialect} is that of a whole model, {args.checkpoint} holds a LoRA; add "
            f"--merge, or choose one of {', '.join(DIALECTS)}"
        )
    digest = read_transformer_digest(args.model)
    shared = {name: getattr(args, name) for name in ("step", "ema", "dtype", "overwrite")}
    model = args.model
    if model is None and args.checkpoint.is_dir():
        model = _find_base(args)
    proven = export_adapter(
        args.checkpoint, args.out, dialect=dialect, base_digest=digest, model=model, **shared
    )
    return describe_file(args.out, proven, dialect)


def _export_model(args: argparse.Namespace, *, full: bool) -> str:
    kind = choose_format(args.format, args.out, dtype=args.dtype)
    folder = args.model or _find_base(args)
    digest = read_transformer_digest(args.model)
    if full:
        tensors, meta = read_full(args.checkpoint, step=args.step, ema=args.ema, base_digest=digest)
        model = WholeModel(
            tensors, Variant(tensors), make_metadata(meta), "a full fine-tuning of", folder
        )
        config = meta["config"]
    else:
        if folder is None:
            raise BadInput("--merge needs the base model's folder; name it with --model")
        adapter = load_adapter(args.checkpoint, step=args.step, ema=args.ema, base_digest=digest)
        model = merge_loras(folder, [(adapter, 1.0)], together=adapter, origin="a LoRA merged into")
        config = read_saved_meta(args.checkpoint, args.step)["config"]
    dtype = str(args.dtype or config.get("save_dtype") or config["model"]["dtype"])
    return write_model(model, args.out, kind=kind, dtype=dtype, overwrite=args.overwrite)


def _find_base(args: argparse.Namespace) -> Path | None:
    meta = read_saved_meta(args.checkpoint, args.step)
    where = meta["config"].get("model", {}).get("ckpt_path")
    return None if where is None else find_model_folder(Path(where), meta["base_digest"])


if __name__ == "__main__":
    sys.exit(main())
