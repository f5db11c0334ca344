"""How large is each network of a checkpoint: what do its configs say, and what its tensors?"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wan22_jax.errors import BadInput
from wan22_jax.geometry import PATCH
from wan22_jax.model.transformer import TI2V_5B, TransformerConfig
from wan22_jax.model.umt5 import UMT5_XXL, UMT5Config
from wan22_jax.model.vae import WAN22_VAE, VAEConfig
from wan22_jax.weights import OTHER_MODEL, Shapes, is_other_model

_HEAD_WIDTH = 128
_MOST, _MOST_LAYERS = 2**16, 2**10  # sizes beyond those of any model would cost memory and time
# Our field: the official one, Diffusers' one. A field that a config leaves out has our default.
_TRANSFORMER_FIELDS = {
    "dim": ("dim", "dim"),
    "ffn_dim": ("ffn_dim", "ffn_dim"),
    "num_heads": ("num_heads", "num_attention_heads"),
    "num_layers": ("num_layers", "num_layers"),
    "in_channels": ("in_dim", "in_channels"),
    "out_channels": ("out_dim", "out_channels"),
    "text_dim": ("text_dim", "text_dim"),
    "text_len": ("text_len", "text_len"),
    "freq_dim": ("freq_dim", "freq_dim"),
    "patch_size": ("patch_size", "patch_size"),
    "eps": ("eps", "eps"),
}


def read_transformer_config(path: Path) -> TransformerConfig:
    """Reads an official or a Diffusers config; BadInput if it is not one of TI2V-5B."""
    config = _read_json(path)
    _check_numbers(config, path)
    if "attention_head_dim" in config:
        config["dim"] = config["attention_head_dim"] * config.get("num_attention_heads", 0)
    fields: dict[str, Any] = {
        ours: config[theirs]
        for ours, names in _TRANSFORMER_FIELDS.items()
        for theirs in names
        if theirs in config
    }
    lost = [name for name in ("dim", "ffn_dim", "num_heads", "num_layers") if name not in fields]
    if lost:
        raise BadInput(f"{path}: {', '.join(lost)} missing; download Wan2.2-TI2V-5B again")
    transformer = TransformerConfig(**fields)
    if transformer.dim % (2 * transformer.num_heads) or transformer.dim > _MOST:
        raise BadInput(
            f"{path}: dim {transformer.dim} cannot be that of {transformer.num_heads} heads of "
            "even width; download Wan2.2-TI2V-5B again"
        )
    if is_other_model(transformer.dim, transformer.in_channels):
        raise BadInput(f"{path}: {OTHER_MODEL}")
    return transformer


def infer_transformer_config(shapes: Shapes, where: Path) -> TransformerConfig:
    """Tells the sizes from the tensors of a file without config: heads are 128 wide, as in all Wan.

    Raises BadInput if the tensors are those of another model; where there are too few of them,
    the sizes are those of TI2V-5B, and the comparison with its names will say what is wrong.
    """
    try:
        dim, channels = shapes["patch_embedding.weight"][:2]
        config = TransformerConfig(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_heads=dim // _HEAD_WIDTH,
            num_layers=sum(name.endswith(".norm3.weight") for name in shapes),
            in_channels=channels,
            out_channels=shapes["head.head.weight"][0] // math.prod(PATCH),
            text_dim=shapes["text_embedding.0.weight"][1],
            freq_dim=shapes["time_embedding.0.weight"][1],
        )
    except (KeyError, IndexError, ValueError):
        return TI2V_5B
    if is_other_model(dim, channels):
        raise BadInput(f"{where}: {OTHER_MODEL}")
    if dim % _HEAD_WIDTH or not all(dataclasses.astuple(config)):
        raise BadInput(
            f"{where}: its sizes cannot be told from a width of {dim}; put the model's config.json "
            "beside it"
        )
    return config


def is_transformer_config(path: Path) -> bool:
    """Whether a config.json that lies beside a file belongs to a transformer."""
    keys = {"ffn_dim", "num_layers", "attention_head_dim"}
    return path.is_file() and bool(_read_json(path).keys() & keys)


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    keys = {key for names in _TRANSFORMER_FIELDS.values() for key in names}
    for key in sorted(config.keys() & (keys | {"attention_head_dim"})):
        value = config[key]
        if key == "patch_size":
            is_good = value == list(PATCH)
        elif key == "eps":
            is_good = type(value) is float and 0 < value < 1
        else:
            most = _MOST_LAYERS if key == "num_layers" else _MOST
            is_good = type(value) is int and 0 < value <= most
        if not is_good:
            shown = f"{value!r:.60}"
            raise BadInput(f"{path}: {key} cannot be {shown}; download Wan2.2-TI2V-5B again")


def check_latent_statistics(path: Path) -> None:
    """Raises BadInput if a VAE's config has other latent statistics than ours."""
    config = _read_json(path)
    for name in ("latents_mean", "latents_std"):
        ours, theirs = getattr(WAN22_VAE, name), config.get(name)
        if not _are_near(theirs, ours):
            raise BadInput(
                f"{path}: {name} is not that of the Wan2.2 VAE (48 channels); download "
                "Wan-AI/Wan2.2-TI2V-5B-Diffusers again"
            )


def _are_near(theirs: Any, ours: Sequence[float]) -> bool:
    return (
        isinstance(theirs, list)
        and len(theirs) == len(ours)
        and all(type(number) in (int, float) and abs(number) < 1e3 for number in theirs)
        and np.allclose(ours, theirs, rtol=0, atol=1e-4)
    )


def count_residual_blocks(stored_shapes: Shapes) -> int:
    """Counts the residual blocks of a stage of the VAE's encoder, whatever the naming."""
    block = re.compile(
        r"(?:[\w.]+\.)?encoder\.(?:downsamples\.0\.downsamples|down_blocks\.0\.resnets)\.(\d+)\."
        r"(?:residual\.2|conv1)\.weight"
    )
    blocks = [name for name in stored_shapes if block.fullmatch(name)]
    return len(blocks) or WAN22_VAE.num_res_blocks


def infer_vae_config(shapes: Shapes) -> VAEConfig:
    """Tells the VAE's sizes from its tensors; the real ones where there are too few of them."""
    stage = "encoder.downsamples.{}.downsamples.0.residual.6.weight"
    try:
        encoder_dim = shapes["encoder.conv1.weight"][0]
        num_stages = next(s for s in range(len(shapes)) if stage.format(s) not in shapes)
        dim_mult = tuple(shapes[stage.format(s)][0] // encoder_dim for s in range(num_stages))
        return VAEConfig(
            encoder_dim=encoder_dim,
            decoder_dim=shapes["decoder.head.0.gamma"][0] // dim_mult[0],
            z_dim=shapes["conv2.weight"][0],
            dim_mult=dim_mult,
            num_res_blocks=count_residual_blocks(shapes),
            latents_mean=WAN22_VAE.latents_mean,
            latents_std=WAN22_VAE.latents_std,
        )
    except (KeyError, IndexError, ZeroDivisionError):
        return WAN22_VAE  # the comparison with its names will say what is wrong


def infer_text_config(shapes: Shapes) -> UMT5Config:
    """Tells the text encoder's sizes from its tensors, as ``infer_vae_config``."""
    try:
        vocab_size, dim = shapes["token_embedding.weight"]
        return UMT5Config(
            vocab_size=vocab_size,
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.fc1.weight"][0],
            num_heads=shapes["blocks.0.pos_embedding.embedding.weight"][1],
            num_layers=sum(name.endswith(".norm1.weight") for name in shapes),
        )
    except (KeyError, IndexError, ValueError):
        return UMT5_XXL  # the comparison with its names will say what is wrong


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{path}: a JSON config was expected ({error}); download it again"
        ) from error
    if not isinstance(config, dict):
        raise BadInput(f"{path}: a JSON object was expected; download it again")
    return config
