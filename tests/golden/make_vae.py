"""Makes vae.npz: what Diffusers' AutoencoderKLWan computes with small seeded weights.

Run with the ``parity`` extra: ``python tests/golden/make_vae.py`` writes the arrays, ``--check``
recomputes them and compares. Weights and inputs are drawn from numpy seeds by the functions below,
which the tests share, so that only outputs are stored. Diffusers does not normalise latents and
clamps the video: the first is done here, the second is kept from mattering by a small last layer.
"""

import re
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("vae.npz")
SIZES = {  # everything of the test model but the statistics of its latents
    "encoder_dim": 8,
    "decoder_dim": 8,
    "z_dim": 6,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 1,
}
LATENTS_MEAN = (-0.3, 0.1, 0.4, -0.05, 0.2, -0.6)
LATENTS_STD = (0.5, 1.2, 0.8, 0.4, 1.6, 0.9)
CLIPS = {1: (48, 32), 5: (32, 16), 17: (16, 32)}  # frames: rows, columns


def draw_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draws float32 weights for official names; each depends on its name and shape only."""
    return {name: _draw_weight(name, shape) for name, shape in shapes.items()}


def draw_video(frames: int) -> np.ndarray:
    """Draws pixels [2, frames, rows, columns, 3] in [-1, 1]."""
    rng = np.random.default_rng([1, frames])
    return rng.uniform(-1, 1, (2, frames, *CLIPS[frames], 3)).astype(np.float32)


def draw_latents(frames: int) -> np.ndarray:
    """Draws normalised latents [1, (frames + 3) / 4, rows / 16, columns / 16, z_dim]."""
    rows, columns = CLIPS[frames]
    shape = (1, (frames + 3) // 4, rows // 16, columns // 16, SIZES["z_dim"])
    return np.random.default_rng([2, frames]).standard_normal(shape).astype(np.float32)


def _draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng([3, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape)
    if name.endswith("gamma"):
        values = 1 + 0.3 * values
    elif name.endswith("bias"):
        values = 0.2 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    if name.startswith("decoder.head.2."):
        values = 0.3 * values  # keeps the video inside [-1, 1], where Diffusers' clamp is idle
    return values.astype(np.float32)


def _compute() -> dict[str, np.ndarray]:
    import torch

    vae = _make_reference()
    mean = torch.tensor(LATENTS_MEAN).reshape(1, -1, 1, 1, 1)
    std = torch.tensor(LATENTS_STD).reshape(1, -1, 1, 1, 1)
    arrays = {}
    with torch.no_grad():
        for frames in CLIPS:
            video = torch.from_numpy(draw_video(frames)).movedim(-1, 1)
            latents = (vae.encode(video).latent_dist.mode() - mean) / std
            arrays[f"latents_{frames}"] = latents.movedim(1, -1).numpy()
            latents = torch.from_numpy(draw_latents(frames)).movedim(-1, 1)
            decoded = vae.decode(latents * std + mean).sample.movedim(1, -1).numpy()
            if np.abs(decoded).max() >= 1:
                raise AssertionError("the decoded video reaches the clamp: shrink the last layer")
            arrays[f"video_{frames}"] = decoded
    return arrays


def _make_reference():
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=SIZES["encoder_dim"],
        decoder_base_dim=SIZES["decoder_dim"],
        z_dim=SIZES["z_dim"],
        dim_mult=list(SIZES["dim_mult"]),
        num_res_blocks=SIZES["num_res_blocks"],
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=list(LATENTS_MEAN),
        latents_std=list(LATENTS_STD),
    ).eval()
    names = {_name_officially(name): name for name in vae.state_dict()}
    shapes = {name: tuple(vae.state_dict()[theirs].shape) for name, theirs in names.items()}
    weights = {names[name]: torch.from_numpy(w) for name, w in draw_weights(shapes).items()}
    vae.load_state_dict(weights)
    return vae


def _name_officially(name: str) -> str:
    for theirs, official in (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"conv_in", "conv1"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"down_blocks\.(\d)\.resnets", r"downsamples.\1.downsamples"),
        (r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.1"),
        (r"up_blocks\.(\d)\.resnets", r"upsamples.\1.upsamples"),
        (r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.2"),
        (r"norm1\.", "residual.0."),
        (r"(amples\.\d)\.conv1\.", r"\1.residual.2."),
        (r"(middle\.\d)\.conv1\.", r"\1.residual.2."),
        (r"norm2\.", "residual.3."),
        (r"(amples\.\d)\.conv2\.", r"\1.residual.6."),
        (r"(middle\.\d)\.conv2\.", r"\1.residual.6."),
        (r"conv_shortcut", "shortcut"),
    ):
        name = re.sub(theirs, official, name)
    return name


def main() -> int:
    from golden_file import write_or_check  # beside this script, which is run as one

    return write_or_check(GOLDEN, _compute(), about=__doc__)


if __name__ == "__main__":
    raise SystemExit(main())
