"""wan22-lora: how are LoRAs converted, resized, merged, and extracted from two models?

=======  ========================================================================================
convert  another dialect of names (or another dtype); without --dtype the values stay, bit by bit
resize   a lower rank, the best possible one: --rank, or --energy to keep in every layer
merge    several LoRAs with strengths, FILE[:STRENGTH], into one LoRA, or into a model (--model)
extract  the LoRA between two models, each a model folder or official or Diffusers safetensors
=======  ========================================================================================

A LoRA is a file of any dialect or a run of wan22-train. What is written is proven as by
wan22-export.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

from convert.export import DTYPES, check_lora_file, describe_file
from convert.lora_algebra import Cut, cut_lora, extract_lora
from convert.whole_model import FORMATS, choose_format, merge_loras, write_model
from wan22_jax.adapter import Adapter, load_adapter
from wan22_jax.adapter_file import write_proven
from wan22_jax.adapter_join import describe, join_loras, parse_lora
from wan22_jax.errors import BadInput, run_command
from wan22_jax.lora_names import DIALECTS, Dialect
from wan22_jax.model.transformer import TransformerConfig
from wan22_jax.model_folder import (
    is_model_folder,
    read_model_card,
    read_transformer_digest,
    unquantised_dtype,
)
from wan22_jax.model_tensors import FolderTensors, Tensors
from wan22_jax.proof import Variant, predict
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import name_tensors, transformer_names


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, help_text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--out", type=Path, required=True, help="what to write")
        command.add_argument("--dtype", choices=DTYPES, help="of what is written")
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
        return command

    convert = add_command("convert", "write a LoRA in another dialect")
    resize = add_command("resize", "cut a LoRA to a lower rank")
    merge = add_command("merge", "add LoRAs up, or into a model")
    extract = add_command("extract", "find the LoRA between two models")
    for command in (convert, resize):
        command.add_argument("--lora", type=Path, required=True, help="file, or training run")
        command.add_argument("--model", type=Path, help="its base, to prove by a forward pass")
    for command in (convert, resize, merge):
        average = "of runs, the average that ema_decay makes"
        command.add_argument("--ema", action="store_true", help=average)
    for command in (convert, resize, extract):
        command.add_argument("--format", choices=DIALECTS, default="comfyui", help="of the names")
    size = resize.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="the highest rank of a linear")
    size.add_argument("--energy", type=float, help="share of the squared norm to keep, e.g. 0.95")
    merge.add_argument(
        "--lora", action="append", required=True, help="FILE[:STRENGTH], once or several times"
    )
    merge.add_argument("--model", type=Path, help="the base model's folder, to merge into it")
    merge.add_argument(
        "--format",
        choices=tuple(dict.fromkeys((*DIALECTS, *FORMATS))),
        help="of a LoRA as above; of a model official, fp8_scaled, diffusers or model",
    )
    for name in ("--base", "--tuned"):
        extract.add_argument(
            name, type=Path, required=True, help="model folder, .safetensors file or its folder"
        )
    extract.add_argument("--rank", type=int, default=32, help="of the LoRA")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing here needs a GPU
    logging.set_verbosity(logging.ERROR)  # Orbax warns of files that a model folder has not
    run = {"convert": _convert, "resize": _resize, "merge": _merge, "extract": _extract}
    return run_command(lambda: run[args.command](args))


def _convert(args: argparse.Namespace) -> None:
    check_lora_file(args.out, overwrite=args.overwrite)
    _write_lora(describe(_load(args, args.lora)), args, dtype=args.dtype, model=args.model)


def _resize(args: argparse.Namespace) -> None:
    check_lora_file(args.out, overwrite=args.overwrite)
    if args.rank is not None and args.rank < 1:
        raise BadInput(f"--rank: 1 or more expected, got {args.rank}")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise BadInput(f"--energy: a share in (0, 1] expected, got {args.energy}; 0.95 is usual")
    adapter = _load(args, args.lora)
    if args.rank is not None and args.rank > max(adapter.ranks.values()):
        raise BadInput(
            f"{args.lora}: has {adapter}, --rank {args.rank} is more; a higher rank adds nothing"
        )
    resized, cuts = cut_lora(adapter, rank=args.rank, energy=args.energy)
    _say_cuts(cuts, before=adapter.ranks)
    _write_lora(resized, args, dtype=args.dtype or _stored_dtype(adapter), model=args.model)


def _merge(args: argparse.Namespace) -> None:
    adapters = []
    for word in args.lora:
        path, strength = parse_lora(word)
        adapters.append((_load(args, path), strength))
    joined = join_loras(adapters, source=" and ".join(args.lora))
    if args.model is None:
        dialect = args.format or "comfyui"
        if dialect not in DIALECTS:
            raise BadInput(f"--format {dialect} is that of a whole model; add --model")
        check_lora_file(args.out, overwrite=args.overwrite)
        args.format = dialect
        dtypes = {_stored_dtype(adapter) for adapter, _ in adapters}
        default = dtypes.pop() if len(dtypes) == 1 else "float32"
        _write_lora(joined, args, dtype=args.dtype or default)
        return
    kind = choose_format(args.format, args.out, dtype=args.dtype)
    model = merge_loras(args.model, adapters, together=joined, origin="LoRAs merged into")
    dtype = args.dtype or unquantised_dtype(read_model_card(args.model).dtype)
    _say(write_model(model, args.out, kind=kind, dtype=dtype, overwrite=args.overwrite))


def _extract(args: argparse.Namespace) -> None:
    check_lora_file(args.out, overwrite=args.overwrite)
    if args.rank < 1:
        raise BadInput(f"--rank: 1 or more expected, got {args.rank}")
    base, tuned = _open_model(args.base), _open_model(args.tuned)
    if args.out.resolve() in (args.base.resolve(), args.tuned.resolve()):
        raise BadInput(f"{args.out}: is a model to read, so it is not replaced; choose another")
    differing = [
        f"{name} is {_shape(base, name)} and {_shape(tuned, name)}"
        for name in dict.fromkeys((*base.shapes, *tuned.shapes))
        if _shape(base, name) != _shape(tuned, name)
    ]
    if differing:
        raise BadInput(
            f"{args.base} and {args.tuned}: are not of one model ({'; '.join(differing[:3])}, "
            f"{len(differing)} in all); choose two of the same sizes"
        )
    source = f"{args.tuned} without {args.base}"
    adapter, cuts, left_out = extract_lora(base, tuned, rank=args.rank, source=source)
    _say_cuts(cuts)
    if left_out:
        _say(
            f"warning: {len(left_out)} other tensors differ, which a LoRA cannot hold: "
            f"{', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}"
        )
    folder = next((path for path in (args.base, args.tuned) if is_model_folder(path)), None)
    if folder is not None:
        _say(_compare(read_model_card(folder).transformer, base, tuned, adapter))
    model = args.base if is_model_folder(args.base) else None
    if digest := read_transformer_digest(model):
        adapter.metadata["base_digest"] = digest
    _write_lora(adapter, args, dtype=args.dtype or "bfloat16", model=model)


def _load(args: argparse.Namespace, path: Path) -> Adapter:
    if args.ema and path.is_file():
        raise BadInput(f"{path}: --ema is of training runs, a file holds one LoRA; leave it out")
    return load_adapter(path, ema=args.ema, base_digest=read_transformer_digest(args.model))


def _write_lora(
    adapter: Adapter, args: argparse.Namespace, *, dtype: str | None, model: Path | None = None
) -> None:
    dialect: Dialect = args.format
    proven = write_proven(
        adapter,
        args.out,
        dtype=dtype or _stored_dtype(adapter),
        dialect=dialect,
        model=model,
    )
    _say(describe_file(args.out, proven, dialect))


def _compare(config: TransformerConfig, base: Tensors, tuned: Tensors, adapter: Adapter) -> str:
    start, wanted, got = predict(config, [Variant(base), Variant(tuned), Variant(base, adapter)])
    change = float(np.linalg.norm(wanted - start)) or 1.0
    error = float(np.linalg.norm(got - wanted)) / change
    return f"forward pass: relative error {error:.1e} of what the tuned model changes"


def _say_cuts(cuts: Mapping[str, Cut], before: Mapping[str, int] | None = None) -> None:
    for target, cut in cuts.items():
        old = "" if before is None else f"{before[target]} -> "
        _say(
            f"{target:<13} rank {old}{cut.rank}: relative error {cut.error:.1e}, "
            f"{100 * cut.kept:.2f} % of the energy"
        )


def _open_model(path: Path) -> Tensors:
    if is_model_folder(path):
        return FolderTensors(path)
    if not path.exists():
        raise BadInput(f"{path}: no such model folder or file")
    if (path / "transformer").is_dir():
        path = path / "transformer"
    tensors = name_tensors(SafetensorsFiles(path), "transformer", transformer_names())
    if tensors.unknown or not tensors.shapes:
        unknown = ", ".join(tensors.unknown[:3]) or "it holds no tensors"
        raise BadInput(f"{path}: is not a Wan transformer ({unknown}); choose another file")
    return tensors


def _shape(tensors: Tensors, name: str) -> list[int] | None:
    return list(tensors.shapes[name]) if name in tensors.shapes else None


def _stored_dtype(adapter: Adapter) -> str:
    """The dtype that holds every value of a LoRA as it is; of float64 it is float32."""
    dtypes = {matrix.dtype.name for matrix in adapter.matrices.values()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(DTYPES) else "float32"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
