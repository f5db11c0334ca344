"""How does a whole transformer, fine-tuned or with LoRAs merged into it, get onto disk?

========== =================================================================================
official   one safetensors file with the official names, for ComfyUI and diffusion-pipe
fp8_scaled the same with the linears of the blocks in eight bits, for ComfyUI
diffusers  a folder with ``transformer/`` and ``vae/``, each for ``from_pretrained``
model      a model folder that every command of this project takes
========== =================================================================================

Tensors are streamed, one at a time. What is written is written beside its final name, read back
and compared bit by bit, then loaded through the reader of its format for one forward pass, which
is compared with that of the trained model; then it gets its name.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from flax import nnx
from tqdm import tqdm

from convert.written_network import digest_network, digest_networks, write_network
from wan22_jax.adapter import Adapter
from wan22_jax.errors import BadInput
from wan22_jax.full_file import count_bytes, describe_merge, write_full
from wan22_jax.model.transformer import TransformerConfig
from wan22_jax.model.vae import VAEConfig, WanVAE
from wan22_jax.model_folder import (
    FLOAT8,
    ModelCard,
    abstract_transformer,
    check_arrays,
    open_array,
    read_model_card,
    write_model_card,
)
from wan22_jax.model_tensors import FolderTensors, HeldTensors, MergedTensors, Tensors
from wan22_jax.outputs import check_output, replacing
from wan22_jax.proof import Variant, prove_model
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import (
    OfficialTensors,
    check_tensors,
    name_tensors,
    parameter_shapes,
    stacked_shapes,
    stored_leaves,
    transformer_names,
    vae_names,
)

Format = Literal["official", "fp8_scaled", "diffusers", "model"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SHARD_BYTES = 5 * 10**9
_STEM = "diffusion_pytorch_model"  # of Diffusers' files


class WholeModel(NamedTuple):
    """What is to be written, and what it must compute.

    Attributes:
        tensors: the weights.
        trained: what training has of them: the same, or base and LoRA apart.
        metadata: for the header of a file.
        origin: what it is, for the card of a model folder.
        folder: the base model's; None if it is not known where that is.
    """

    tensors: Tensors
    trained: Variant
    metadata: Mapping[str, str]
    origin: str
    folder: Path | None


def choose_format(wanted: str | None, out: Path, *, dtype: str | None) -> Format:
    """Returns the format that is wanted, or that the name of the output stands for.

    Raises:
        BadInput: name and format, or a dtype that is wanted and the format, do not go together.
    """
    is_file = out.suffix == ".safetensors"
    if wanted is None:
        return "official" if is_file else "model"
    if wanted not in FORMATS:
        raise BadInput(f"--format {wanted} is that of a LoRA; a model is {', '.join(FORMATS)}")
    if is_file != (wanted in ("official", "fp8_scaled")):
        kind = "a folder" if is_file else "a file that ends in .safetensors"
        raise BadInput(f"{out}: --format {wanted} is {kind}; choose another --out")
    if wanted == "fp8_scaled" and dtype is not None:
        raise BadInput("--dtype: fp8_scaled is float8 and bfloat16; leave --dtype out")
    return next(known for known in FORMATS if known == wanted)


def merge_loras(
    folder: Path, adapters: Sequence[tuple[Adapter, float]], *, together: Adapter, origin: str
) -> WholeModel:
    """Describes the model of a folder with LoRAs merged into it.

    Args:
        folder: of the base model.
        adapters: each with its strength.
        together: one that does what they do, for the proof.
        origin: see ``WholeModel``.

    Raises:
        BadInput: the folder is not a complete model, or an adapter does not fit it.
    """
    base = FolderTensors(folder)
    return WholeModel(
        MergedTensors(base, adapters),
        Variant(base, together),
        describe_merge(adapters),
        origin,
        folder,
    )


def write_model(
    model: WholeModel, out: Path, *, kind: Format, dtype: str, overwrite: bool = False
) -> str:
    """Writes a model; returns a line that says what was written and how it was proven.

    Args:
        model: see ``WholeModel``.
        out: a file that ends in .safetensors, or a folder; see ``choose_format``.
        kind: what to write.
        dtype: of the weights, "bfloat16", "float16" or "float32"; fp8_scaled is bfloat16 beside
            its float8 weights.
        overwrite: replace an existing file, or a folder of the same kind.

    Raises:
        BadInput: ``out`` exists, the base model's folder is needed, values that the dtype cannot
            hold, or what was written is not what was trained. Nothing stays then.
    """
    _check_out(out, kind, base=model.folder, overwrite=overwrite)
    dtype = FLOAT8 if kind == "fp8_scaled" else dtype
    card = None if model.folder is None else read_model_card(model.folder)
    if kind in ("official", "fp8_scaled"):
        with replacing(out) as partial:
            num_bytes = write_full(model.tensors, partial, dtype=dtype, metadata=model.metadata)
            written = _open_files(partial)
            proof = _prove(model, written, card, dtype=dtype, out=out)
        what = f"{len(model.tensors.shapes)} tensors, {dtype}, {num_bytes / 1e9:.2f} GB"
        return f"wrote {out}: {what}; equal bit by bit; {proof}"
    if card is None or model.folder is None:
        raise BadInput(
            f"{out}: a folder takes its config and VAE from that of the base model; add --model, "
            "or name a file that ends in .safetensors"
        )
    if kind == "model" and dtype == "float16":
        raise BadInput(f"{out}: a model folder is bfloat16 or float32; choose one with --dtype")
    with replacing(out) as partial:
        if kind == "diffusers":
            _write_diffusers(partial, model, card, dtype=dtype)
            written, what = _open_files(partial / "transformer"), dtype
        else:
            digest = _write_folder(partial, model, card, dtype=dtype)
            written, what = FolderTensors(partial), f"{dtype}, digest {digest}"
        proof = _prove(model, written, card, dtype=dtype, out=out)
    return f"wrote {out}: {what}; equal bit by bit; {proof}"


def diffusers_transformer_config(config: TransformerConfig) -> dict[str, Any]:
    """Makes the config.json of a WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.dim // config.num_heads,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def diffusers_vae_config(config: VAEConfig) -> dict[str, Any]:
    """Makes the config.json of an AutoencoderKLWan of Wan2.2's kind."""
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config.encoder_dim,
        "decoder_base_dim": config.decoder_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "in_channels": 12,
        "is_residual": True,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "temperal_downsample": [False, True, True],
        "z_dim": config.z_dim,
    }


def _check_out(out: Path, kind: Format, *, base: Path | None, overwrite: bool) -> None:
    check_output(out)
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: exists already; choose another name or add --overwrite")
    if base is not None and out.resolve() == base.resolve():
        raise BadInput(f"{out}: is the base model, so it is not replaced; choose another --out")
    marks = {"model": "model.json", "diffusers": "transformer/config.json"}
    if not out.exists() or (out.is_file() and kind not in marks):
        return
    if kind not in marks or not (out / marks[kind]).is_file():
        raise BadInput(f"{out}: is no folder of this kind, so it is not replaced; choose another")


def _open_files(where: Path) -> OfficialTensors:
    return name_tensors(SafetensorsFiles(where), "transformer", transformer_names())


def _prove(
    model: WholeModel, written: Tensors, card: ModelCard | None, *, dtype: str, out: Path
) -> str:
    if card is None:
        return "no forward pass, since the base model's folder is not known; --model names it"
    return prove_model(
        model.trained,
        model.tensors,
        written,
        dtype=dtype,
        config=card.transformer,
        source=str(out),
    )


def _write_diffusers(partial: Path, model: WholeModel, card: ModelCard, *, dtype: str) -> None:
    assert model.folder is not None
    table = transformer_names()
    names = {name: table.to_diffusers(name) for name in model.tensors.shapes}
    config = diffusers_transformer_config(card.transformer)
    _write_shards(partial / "transformer", model.tensors, names, config, dtype=dtype)
    module = nnx.eval_shape(lambda: WanVAE(card.vae, rngs=nnx.Rngs(0)))
    check_arrays(model.folder / "vae", stacked_shapes(module))
    arrays = {
        name: open_array((model.folder / "vae").absolute() / name).read().result()
        for name in stacked_shapes(module)
    }
    table = vae_names(card.vae.num_res_blocks)
    names = {name: table.to_diffusers(name) for name in arrays}
    config = diffusers_vae_config(card.vae)
    _write_shards(partial / "vae", HeldTensors(arrays), names, config, dtype="float32")


def _write_shards(
    folder: Path,
    tensors: Tensors,
    names: Mapping[str, str],
    config: Mapping[str, Any],
    *,
    dtype: str,
) -> None:
    """Writes config, shards of at most ``_SHARD_BYTES`` and, of more than one, their index."""
    shards: list[dict[str, str]] = [{}]
    total = in_shard = 0
    for official, name in names.items():
        num_bytes = count_bytes(tensors, official, dtype)
        if shards[-1] and in_shard + num_bytes > _SHARD_BYTES:
            shards.append({})
            in_shard = 0
        shards[-1][official] = name
        in_shard += num_bytes
        total += num_bytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{_STEM}{part}.safetensors"
        write_full(tensors, folder / file, dtype=dtype, metadata={"format": "pt"}, names=shard)
        weight_map |= dict.fromkeys(shard.values(), file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{_STEM}.safetensors.index.json", index)
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _write_folder(partial: Path, model: WholeModel, base: ModelCard, *, dtype: str) -> str:
    assert model.folder is not None
    parts = ("vae", "text_encoder", "tokenizer")
    if lost := [name for name in parts if not (model.folder / name).is_dir()]:
        raise BadInput(
            f"{model.folder}: has no {', '.join(lost)}; run wan22-convert again with --overwrite"
        )
    file = partial / "transformer.safetensors"
    write_full(model.tensors, file, dtype=dtype, metadata={"format": "pt"})
    module = abstract_transformer(base.transformer, float8=False)
    tensors = _open_files(file)
    check_tensors(tensors, "transformer", parameter_shapes(module))
    plan = stored_leaves(module, dtype)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc="transformer") as bar:
        lines = write_network(tensors, plan, partial.absolute() / "transformer", bar)
    file.unlink()
    for name in parts:
        shutil.copytree(model.folder / name, partial / name, copy_function=_link)
    digests = {**base.digests, "transformer": digest_network(base.transformer, lines)}
    card = replace(
        base,
        dtype=dtype,
        source=f"{model.origin} {base.source}",
        digests=digests,
        digest=digest_networks(digests),
    )
    write_model_card(partial, card)
    return card.digest


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
