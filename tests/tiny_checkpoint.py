"""Writes a small random checkpoint in the official layout: real names, small sizes."""

import json
import math
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.model.umt5 import UMT5, UMT5Config
from wan22_jax.model.vae import WAN22_VAE, VAEConfig, WanVAE
from wan22_jax.weights import parameter_shapes

TINY_TRANSFORMER = TransformerConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=32, freq_dim=16
)
TINY_VAE = VAEConfig(
    encoder_dim=8,
    decoder_dim=8,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    latents_mean=WAN22_VAE.latents_mean,
    latents_std=WAN22_VAE.latents_std,
)
TINY_TEXT_ENCODER = UMT5Config(vocab_size=256, dim=32, ffn_dim=64, num_heads=4, num_layers=2)


def write_official_folder(
    folder: Path,
    *,
    seed: int = 0,
    transformer: TransformerConfig = TINY_TRANSFORMER,
    vae: VAEConfig = TINY_VAE,
    text_encoder: UMT5Config = TINY_TEXT_ENCODER,
) -> None:
    """Writes the files of the official repository, safetensors in the place of .pth.

    The tokenizer is an empty placeholder; whoever needs to tokenise replaces it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": "WanModel",
        "model_type": "ti2v",
        "dim": transformer.dim,
        "ffn_dim": transformer.ffn_dim,
        "num_heads": transformer.num_heads,
        "num_layers": transformer.num_layers,
        "in_dim": transformer.in_channels,
        "out_dim": transformer.out_channels,
        "text_dim": transformer.text_dim,
        "text_len": transformer.text_len,
        "freq_dim": transformer.freq_dim,
        "eps": transformer.eps,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = draw_weights(
        nnx.eval_shape(lambda: WanTransformer(transformer, rngs=nnx.Rngs(0))), seed=seed
    )
    _save_shards(folder, weights)
    weights = draw_weights(nnx.eval_shape(lambda: WanVAE(vae, rngs=nnx.Rngs(0))), seed=seed + 1)
    save_file(weights, folder / "Wan2.2_VAE.safetensors")
    weights = draw_weights(
        nnx.eval_shape(lambda: UMT5(text_encoder, rngs=nnx.Rngs(0))), seed=seed + 2
    )
    save_file(
        {name: array.astype("bfloat16") for name, array in weights.items()},
        folder / "models_t5_umt5-xxl-enc-bf16.safetensors",
    )
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")


def draw_weights(module: nnx.Module, *, seed: int) -> dict[str, np.ndarray]:
    """Draws every parameter, by official name, so that activations keep about their size."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameter_shapes(module).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        kind = name.rpartition(".")[2]
        if len(shape) == 1 or kind == "gamma":
            offset = 0.0 if kind == "bias" else 1.0  # norms are about 1
            weights[name] = 0.1 * noise + offset
        else:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]))
    return weights


def _save_shards(folder: Path, weights: dict[str, np.ndarray]) -> None:
    names = sorted(weights)
    half = len(names) // 2
    shards = {
        f"diffusion_pytorch_model-0000{index}-of-00002.safetensors": part
        for index, part in ((1, names[:half]), (2, names[half:]))
    }
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in weights.values())},
        "weight_map": {name: file for file, part in shards.items() for name in part},
    }
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
