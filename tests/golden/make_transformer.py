"""Makes transformer.npz: what Diffusers' Wan transformer, with and without PEFT's LoRA, computes.

Run with the ``parity`` extra: ``python tests/golden/make_transformer.py`` writes the arrays,
``--check`` recomputes them and compares. Weights, adapters and inputs are drawn from numpy seeds by
the functions below, which the tests share, so that only outputs and gradients are stored:

    velocity/<case>          [2, T, Y, X, C]
    velocity/lora            the case "mixed" through the adapter
    gradient/latents, /text  of the loss: mean squared difference to draw_target(), case "mixed"
    gradient/<name>          by official parameter name, thinned to at most THIN entries
    lora_gradient/<name>     of the same loss through the adapter, by ComfyUI's names

The reference runs in float64, in which Diffusers' casts to float32 are turned too. It takes the
time sinusoid from float32 angles, the original from float64 ones: here it is given the latter.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

GOLDEN = Path(__file__).with_name("transformer.npz")
SIZES: dict[
    str, Any
] = {  # the heads have 28 channels: 12 of them turn with the frame, 8 and 8 with row and column
    "dim": 56,
    "ffn_dim": 80,
    "num_heads": 2,
    "num_layers": 2,
    "in_channels": 6,
    "out_channels": 6,
    "text_dim": 20,
    "text_len": 14,
    "freq_dim": 32,
}
CASES = {  # sigma of each latent frame, latent rows and columns, text tokens
    "t2v": (((0.875, 0.875, 0.875), (0.25, 0.25, 0.25)), (4, 6), 5),
    "i2v": (((0, 0.625, 0.625), (0, 0.9355, 0.9355)), (4, 6), 5),
    "mixed": (((0.7331, 0.7331, 0.7331), (0, 0.3, 0.3)), (4, 6), 9),
    "image": (((1.0,), (0.0123,)), (6, 10), 14),
}
RANK, ALPHA = 3, 5.0
THIN = 128


def draw_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draws float32 weights for official names; each depends on its name and shape only."""
    return {name: _draw_weight(name, shape) for name, shape in shapes.items()}


def draw_adapter(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draws a LoRA on every linear of the blocks, with ComfyUI's names; both matrices act."""
    adapter = {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            prefix = "diffusion_model." + name.removesuffix(".weight")
            for side, size in (("lora_A", (RANK, shape[1])), ("lora_B", (shape[0], RANK))):
                adapter[f"{prefix}.{side}.weight"] = _draw_weight(f"{prefix}.{side}", size)
    return adapter


def draw_inputs(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws latents [2, T, Y, X, C], sigma [2, T] and text [2, S, E]."""
    sigma, grid, num_text = CASES[case]
    sigma_BT = np.array(sigma, np.float32)
    rng = np.random.default_rng([1, zlib.crc32(case.encode())])
    latents = rng.standard_normal((*sigma_BT.shape, *grid, SIZES["in_channels"]), np.float32)
    text = rng.standard_normal((len(sigma_BT), num_text, SIZES["text_dim"]), np.float32)
    return latents, sigma_BT, text


def draw_target() -> np.ndarray:
    """Draws the velocity that the loss of the case "mixed" compares with."""
    shape = draw_inputs("mixed")[0].shape
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def thin(array: np.ndarray) -> np.ndarray:
    """Picks at most THIN entries of an array, evenly, the first and the last among them."""
    flat = np.asarray(array).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(flat.size, THIN)).round().astype(int)]


def _draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng([3, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        values = 1 + 0.3 * values
    elif name.endswith("modulation"):
        values = 0.5 * values
    elif name.endswith("bias"):
        values = 0.2 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def _compute() -> dict[str, Any]:
    import torch

    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        model, official = _make_reference()
        arrays = {}
        for case in CASES:
            with torch.no_grad():
                arrays[f"velocity/{case}"] = _run(model, *_prepare(case)).numpy()
        latents, timestep, text = _prepare("mixed")
        _differentiate(model, latents.requires_grad_(), timestep, text.requires_grad_())
        arrays["gradient/latents"] = latents.grad.movedim(1, -1).numpy()
        arrays["gradient/text"] = text.grad[:, : CASES["mixed"][2]].numpy()
        for name, parameter in model.named_parameters():
            arrays[f"gradient/{official[name]}"] = thin(parameter.grad.numpy())

        adapted = _add_adapter(model, official)
        velocity = _differentiate(model, *_prepare("mixed"))
        arrays["velocity/lora"] = velocity.detach().numpy()
        for name, parameter in adapted.items():
            arrays[f"lora_gradient/{name}"] = parameter.grad.numpy()
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _make_reference():
    """Returns the model and its parameters' official names."""
    import torch
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=SIZES["num_heads"],
        attention_head_dim=SIZES["dim"] // SIZES["num_heads"],
        **{name: SIZES[name] for name in SIZES if name not in ("dim", "num_heads", "text_len")},
    ).double()
    model.condition_embedder.timesteps_proj = _make_sinusoid(SIZES["freq_dim"])
    names = json.loads(GOLDEN.with_name("diffusers_names.json").read_text())["transformer"]
    official = {theirs: ours for ours, theirs in names.items()}
    shapes = {official[name]: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = draw_weights(shapes)
    model.load_state_dict(
        {name: torch.from_numpy(weights[official[name]]) for name in model.state_dict()}
    )
    return model, official


def _make_sinusoid(freq_dim: int):
    import torch

    class Sinusoid(torch.nn.Module):
        def forward(self, timestep: torch.Tensor) -> torch.Tensor:
            exponent = torch.arange(freq_dim // 2, dtype=torch.float64) / (freq_dim // 2)
            angle = timestep.double()[:, None] * 10000.0**-exponent
            return torch.cat([angle.cos(), angle.sin()], dim=-1)

    return Sinusoid()


def _add_adapter(model, official: dict[str, str]):
    """Attaches PEFT's adapter, the only part that trains then; returns it by ComfyUI's names."""
    import torch
    from peft import LoraConfig

    shapes = {official[name]: tuple(value.shape) for name, value in model.state_dict().items()}
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    adapted = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            linear, side = name.removesuffix(".default.weight").rsplit(".", 1)
            ours = official[f"{linear}.weight"].removesuffix(".weight")
            adapted[f"diffusion_model.{ours}.{side}.weight"] = parameter
    drawn = draw_adapter(shapes)
    if adapted.keys() != drawn.keys():
        raise AssertionError(f"PEFT adapts other layers: {adapted.keys() ^ drawn.keys()}")
    for name, parameter in adapted.items():
        parameter.data = torch.from_numpy(drawn[name]).double()
    return adapted


def _prepare(case: str):
    """Returns the inputs as Diffusers takes them, the text padded to text_len with zeros."""
    import torch

    latents, sigma_BT, text = draw_inputs(case)
    timestep_BT = 1000 * sigma_BT  # float32, as both the trainer and the sampler round it
    if (timestep_BT == timestep_BT[:, :1]).all():
        timestep = timestep_BT[:, 0]
    else:
        tokens_a_frame = math.prod(latents.shape[2:4]) // 4
        timestep = np.repeat(timestep_BT, tokens_a_frame, axis=1)
    text = np.pad(text, ((0, 0), (0, SIZES["text_len"] - text.shape[1]), (0, 0)))
    return (
        torch.from_numpy(latents).double().movedim(-1, 1),
        torch.from_numpy(timestep).double(),
        torch.from_numpy(text).double(),
    )


def _run(model, latents, timestep, text):
    return model(latents, timestep, text, return_dict=False)[0].movedim(1, -1)


def _differentiate(model, latents, timestep, text):
    """Leaves the gradients of the loss on everything that wants one; returns the velocity."""
    import torch

    velocity = _run(model, latents, timestep, text)
    ((velocity - torch.from_numpy(draw_target())) ** 2).mean().backward()
    return velocity


def main() -> int:
    from golden_file import write_or_check  # beside this script, which is run as one

    return write_or_check(GOLDEN, _compute(), about=__doc__)


if __name__ == "__main__":
    raise SystemExit(main())
