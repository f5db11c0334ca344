"""What does a PyTorch model folder hold: which files, in which layout, of which sizes?

Official layout (Wan-AI/Wan2.2-TI2V-5B)::

    config.json, diffusion_pytorch_model*.safetensors (+ index)
    Wan2.2_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth     or the same names ending in .safetensors
    google/umt5-xxl/                                    tokenizer

Diffusers layout (Wan-AI/Wan2.2-TI2V-5B-Diffusers): transformer/, vae/, text_encoder/, tokenizer/.
"""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from wan22_jax.errors import BadInput
from wan22_jax.geometry import PATCH
from wan22_jax.model.transformer import TransformerConfig
from wan22_jax.model.umt5 import UMT5_XXL, UMT5Config
from wan22_jax.model.vae import WAN22_VAE, VAEConfig
from wan22_jax.tensor_files import SafetensorsFiles, TensorFiles
from wan22_jax.weights import (
    OTHER_MODEL,
    OfficialTensors,
    Shapes,
    is_other_model,
    name_tensors,
    text_encoder_names,
    transformer_names,
    vae_names,
)

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


@dataclass(frozen=True)
class Checkpoint:
    """The three networks of a folder with their sizes, and the tokenizer's folder."""

    transformer: OfficialTensors
    transformer_config: TransformerConfig
    vae: OfficialTensors
    vae_config: VAEConfig
    text_encoder: OfficialTensors
    text_encoder_config: UMT5Config
    tokenizer: Path


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens an official or a Diffusers folder; reads headers and configs, no weights.

    Raises BadInput if it is neither, is another model, or a part is missing or broken.
    """
    _refuse_other_models(folder)
    is_diffusers = (folder / "transformer").is_dir()
    if not is_diffusers and not (folder / "config.json").is_file():
        raise BadInput(
            f"{folder}: config.json (official layout) or transformer/ (Diffusers layout) was "
            "expected; give the folder that Wan2.2-TI2V-5B was downloaded into"
        )
    transformer_config = _read_transformer_config(
        folder / "transformer" / "config.json" if is_diffusers else folder / "config.json"
    )
    if is_diffusers:
        transformer: TensorFiles = SafetensorsFiles(folder / "transformer")
        vae: TensorFiles = SafetensorsFiles(folder / "vae")
        text_encoder: TensorFiles = SafetensorsFiles(folder / "text_encoder")
        tokenizer = folder / "tokenizer"
        _check_latent_statistics(folder / "vae" / "config.json")
    else:
        transformer = SafetensorsFiles(folder, prefix="diffusion_pytorch_model")
        vae = _open_either(folder / "Wan2.2_VAE")
        text_encoder = _open_either(folder / "models_t5_umt5-xxl-enc-bf16")
        tokenizer = folder / "google" / "umt5-xxl"
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise BadInput(
            f"{tokenizer}: tokenizer.json or spiece.model was expected; download this folder of "
            "Wan2.2-TI2V-5B too"
        )
    vae_tensors = name_tensors(vae, "vae", vae_names(_count_residual_blocks(vae.shapes)))
    text_tensors = name_tensors(text_encoder, "text_encoder", text_encoder_names())
    return Checkpoint(
        transformer=name_tensors(transformer, "transformer", transformer_names()),
        transformer_config=transformer_config,
        vae=vae_tensors,
        vae_config=_infer_vae_config(vae_tensors.shapes),
        text_encoder=text_tensors,
        text_encoder_config=_infer_text_config(text_tensors.shapes),
        tokenizer=tokenizer,
    )


def _refuse_other_models(folder: Path) -> None:
    if not folder.is_dir():
        raise BadInput(f"{folder}: a folder was expected; give that of Wan2.2-TI2V-5B")
    for name in ("high_noise_model", "low_noise_model", "transformer_2", "Wan2.1_VAE.pth"):
        if (folder / name).exists():
            raise BadInput(f"{folder / name}: {OTHER_MODEL}")


def _read_transformer_config(path: Path) -> TransformerConfig:
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
    if transformer.dim % (2 * transformer.num_heads):
        raise BadInput(
            f"{path}: dim {transformer.dim} does not divide into {transformer.num_heads} heads of "
            "even width; download Wan2.2-TI2V-5B again"
        )
    if is_other_model(transformer.dim, transformer.in_channels):
        raise BadInput(f"{path}: {OTHER_MODEL}")
    return transformer


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    keys = {key for names in _TRANSFORMER_FIELDS.values() for key in names}
    for key in sorted(config.keys() & (keys | {"attention_head_dim"})):
        value = config[key]
        if key == "patch_size":
            is_good = value == list(PATCH)
        else:
            is_good = type(value) is (float if key == "eps" else int) and value > 0
        if not is_good:
            raise BadInput(f"{path}: {key} cannot be {value!r}; download Wan2.2-TI2V-5B again")


def _check_latent_statistics(path: Path) -> None:
    """The statistics that normalise latents are ours; a VAE with others is another VAE."""
    config = _read_json(path)
    for name in ("latents_mean", "latents_std"):
        ours, theirs = getattr(WAN22_VAE, name), config.get(name, ())
        if len(ours) != len(theirs) or not np.allclose(ours, theirs, rtol=0, atol=1e-4):
            raise BadInput(
                f"{path}: {name} is not that of the Wan2.2 VAE (48 channels); download "
                "Wan-AI/Wan2.2-TI2V-5B-Diffusers again"
            )


def _count_residual_blocks(stored_shapes: Shapes) -> int:
    block = re.compile(
        r"encoder\.(?:downsamples\.0\.downsamples|down_blocks\.0\.resnets)\.(\d+)\."
        r"(?:residual\.2|conv1)\.weight"
    )
    blocks = [name for name in stored_shapes if block.fullmatch(name)]
    return len(blocks) or WAN22_VAE.num_res_blocks


def _infer_vae_config(shapes: Shapes) -> VAEConfig:
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
            num_res_blocks=_count_residual_blocks(shapes),
            latents_mean=WAN22_VAE.latents_mean,
            latents_std=WAN22_VAE.latents_std,
        )
    except (KeyError, IndexError, ZeroDivisionError):
        return WAN22_VAE  # the comparison with its names will say what is wrong


def _infer_text_config(shapes: Shapes) -> UMT5Config:
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
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: a JSON config was expected ({error}); download it again"
        ) from error
    if not isinstance(config, dict):
        raise BadInput(f"{path}: a JSON object was expected; download it again")
    return config


def _open_either(stem: Path) -> TensorFiles:
    safetensors, pickled = stem.with_name(stem.name + ".safetensors"), Path(f"{stem}.pth")
    if safetensors.is_file():
        return SafetensorsFiles(safetensors)
    if pickled.is_file():
        return TorchFile(pickled)
    raise BadInput(f"{pickled}: this file, or {safetensors.name}, was expected; download it")


class TorchFile:
    """The tensors of a .pth state dict, memory-mapped through PyTorch for each read."""

    def __init__(self, where: Path):
        self.where = where
        self.metadata: dict[str, str] = {}
        state = self._open()
        if not isinstance(state, dict) or not all(hasattr(v, "numpy") for v in state.values()):
            raise BadInput(f"{where}: a flat dictionary of tensors was expected; download it again")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.dtypes = {
            name: _SAFETENSORS_DTYPES.get(str(tensor.dtype), str(tensor.dtype))
            for name, tensor in state.items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Reads some rows (leading axis) of a tensor, in its stored dtype."""
        import torch

        tensor = self._open()[name][rows].clone(memory_format=torch.contiguous_format)
        if tensor.dtype == torch.bfloat16:  # unknown to numpy
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def _open(self) -> dict[str, Any]:
        # Opened anew each time: pages that one mapping has touched stay in memory as long as it.
        try:
            import torch
        except ImportError as error:
            raise BadInput(
                f"{self.where}: reading a .pth file needs PyTorch; install it with pip install "
                f"'wan22-jax[parity]', or put {self.where.stem}.safetensors beside it, or convert "
                "the folder of Wan-AI/Wan2.2-TI2V-5B-Diffusers, which needs no PyTorch"
            ) from error
        try:
            return torch.load(self.where, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"{self.where}: a complete PyTorch state dict was expected ({reason}); download "
                "it again"
            ) from error


_SAFETENSORS_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}
