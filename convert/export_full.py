"""A full fine-tuning as one safetensors file, or as a model folder that every command takes.

The folder is that of the base model with another transformer: the VAE, the text encoder and the
tokenizer are the same files (hard links where the disk has them).
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from convert.weights import digest_network, digest_networks, write_network
from wan22_jax.errors import BadInput
from wan22_jax.full_file import make_metadata, read_full, write_full
from wan22_jax.model_folder import (
    ModelCard,
    abstract_transformer,
    read_model_card,
    write_model_card,
)
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import (
    check_tensors,
    name_tensors,
    parameter_shapes,
    stored_leaves,
    transformer_names,
)


def export_full(
    checkpoint: Path,
    out: Path,
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: str | None = None,
    model: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Writes the model that a run has trained; returns a line that says what was written.

    Args:
        checkpoint: a run of wan22-train without an adapter, or one of its checkpoints.
        out: a file, if it ends in .safetensors, else a folder.
        step: which checkpoint of the run; the newest by default.
        ema: write the average over the steps (``ema_decay``) instead of the weights themselves.
        dtype: of the weights; by default the run's ``save_dtype``, else that of its model.
        model: the base model's folder; must be given for a folder.
        overwrite: replace an existing file or folder.

    Raises:
        BadInput: no such checkpoint, another base model, ``out`` exists or is damaged.
    """
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: exists already; choose another name or add --overwrite")
    card = None if model is None else read_model_card(model)
    weights, meta = read_full(
        checkpoint,
        step=step,
        ema=ema,
        base_digest=card.digests["transformer"] if card else None,
    )
    config = meta["config"]
    dtype = str(dtype or config.get("save_dtype") or config["model"]["dtype"])
    if out.suffix == ".safetensors":
        num_bytes = write_full(weights, out, dtype=dtype, metadata=make_metadata(meta))
        what = f"{len(weights)} tensors, {dtype}, step {meta['step']}, {num_bytes / 1e9:.2f} GB"
        return f"wrote {out}: {what}; read back and equal bit by bit"
    if card is None or model is None:
        raise BadInput(
            f"{out}: a model folder takes its VAE and text encoder from that of the base model; "
            "add --model, or name a file that ends in .safetensors"
        )
    if dtype == "float16":
        raise BadInput(f"{out}: a model folder is bfloat16 or float32; choose one with --dtype")
    if out.exists() and not (out / "model.json").is_file():
        raise BadInput(f"{out}: is no model folder, so it is not replaced; choose another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        file = partial / "transformer.safetensors"
        write_full(weights, file, dtype=dtype, metadata=make_metadata(meta))
        written = _write_folder(partial, file, card, model, dtype=dtype)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"wrote {out}: {dtype}, step {meta['step']}, digest {written.digest}"


def _write_folder(
    partial: Path, file: Path, base: ModelCard, model: Path, *, dtype: str
) -> ModelCard:
    module = abstract_transformer(base.transformer, float8=False)
    tensors = name_tensors(SafetensorsFiles(file), "transformer", transformer_names())
    check_tensors(tensors, "transformer", parameter_shapes(module))
    plan = stored_leaves(module, dtype)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="transformer") as bar:
        lines = write_network(tensors, plan, partial.absolute() / "transformer", bar)
    file.unlink()
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(model / name, partial / name, copy_function=_link)
    digests = {**base.digests, "transformer": digest_network(base.transformer, lines)}
    card = replace(
        base,
        dtype=dtype,
        source=f"a full fine-tuning of {base.source}",
        digests=digests,
        digest=digest_networks(digests),
    )
    write_model_card(partial, card)
    return card


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
