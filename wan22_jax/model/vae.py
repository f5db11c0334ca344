"""How video becomes latents and back: the Wan2.2 VAE (16 x 16 x 4 compression, 48 channels).

A clip is read in chunks: the first holds 4n + 1 frames, every later one 4n. Layers that look back
in time take the frames before a chunk from a ``History``; at the start of the clip these are
zeros, except where frame 0 passes a temporal resampling untouched. The whole-clip form is a first
chunk that holds everything. Source: Wan-Video/Wan2.2, wan/modules/vae2_2.py (42bf4cf).

Axes here: T Y X are frames, rows and columns at whatever resolution a layer works in. Activations
are channels last; arithmetic is in the dtype of the parameters, norm statistics, softmax, latents
and returned video in float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from wan22_jax.geometry import SPACE_STRIDE, TIME_STRIDE
from wan22_jax.model.vae_layers import (
    AttentionBlock,
    ChannelNorm,
    Conv,
    DownStage,
    History,
    ResidualBlock,
    UpStage,
)

PIXEL_PATCH = 2  # pixels per row and column folded into channels before the encoder


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; any sequence is kept as a tuple, so that a config can key a program."""

    encoder_dim: int
    decoder_dim: int
    z_dim: int
    dim_mult: Sequence[int]
    num_res_blocks: int  # per encoder stage; a decoder stage has one more
    latents_mean: Sequence[float | int]
    latents_std: Sequence[float | int]

    def __post_init__(self):
        for name, kind in (("dim_mult", int), ("latents_mean", float), ("latents_std", float)):
            object.__setattr__(self, name, tuple(kind(value) for value in getattr(self, name)))


# fmt: off
WAN22_VAE = VAEConfig(
    encoder_dim=160, decoder_dim=256, z_dim=48, dim_mult=(1, 2, 4, 4), num_res_blocks=2,
    latents_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    latents_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)
# fmt: on


class WanVAE(nnx.Module):
    """Encodes video to normalised latents and decodes them."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.conv1 = Conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), rngs=rngs)
        self.conv2 = Conv(config.z_dim, config.z_dim, (1, 1, 1), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(
        self, video_BTYX3: Float[Array | np.ndarray, "B T Y X 3"]
    ) -> Float[Array, "B t y x C"]:
        """Returns the normalised mean, float32; memory grows with the clip.

        Args:
            video_BTYX3: pixels in [-1, 1], 4n + 1 frames, sides multiples of 16.

        Raises:
            ValueError: the frames or sides do not divide so.
        """
        _check_video(video_BTYX3.shape, is_first=True)
        return self._encode(jnp.asarray(video_BTYX3), History())

    def decode(
        self, latents_BTYXC: Float[Array | np.ndarray, "B T Y X C"]
    ) -> Float[Array, "B t y x 3"]:
        """Returns the video, float32, not clamped to [-1, 1]; memory grows with the clip.

        Args:
            latents_BTYXC: normalised latents; T frames of them become 4T - 3 of video.
        """
        return self._decode(jnp.asarray(latents_BTYXC), History())

    def encode_chunks(self, chunks: Iterable[jax.Array | np.ndarray]) -> Iterator[jax.Array]:
        """Yields the latents of each chunk; memory does not grow with the number of chunks.

        Equal to ``encode`` of the chunks put together. Compiles one program for the first chunk
        and one for all later ones of a shape.

        Args:
            chunks: consecutive parts [B, T, Y, X, 3] of one clip: 1 frame, then 4 each (or 4n + 1,
                then 4n each); in [-1, 1], or uint8, which is scaled on the device.

        Raises:
            ValueError: a chunk has another number of frames, or sides that are not multiples of 16.
        """
        graphdef, state = nnx.split(self)
        past = None
        for video_BTYX3 in chunks:
            _check_video(video_BTYX3.shape, is_first=past is None)
            latents_BTYXC, past = _encode_chunk(graphdef, state, past, jnp.asarray(video_BTYX3))
            yield latents_BTYXC

    def decode_chunks(
        self, latents_BTYXC: Float[Array | np.ndarray, "B T Y X C"]
    ) -> Iterator[jax.Array]:
        """Yields the video of one latent frame after the other: 1 frame, then 4 each.

        Equal to ``decode``; memory does not grow with the clip. Compiles one program for the first
        frame and one for all later ones.
        """
        graphdef, state = nnx.split(self)
        past = None
        for i in range(latents_BTYXC.shape[1]):
            frame_B1YXC = jnp.asarray(latents_BTYXC[:, i : i + 1])
            video_BTYX3, past = _decode_chunk(graphdef, state, past, frame_B1YXC)
            yield video_BTYX3

    def _encode(self, video_BTYX3: jax.Array, history: History) -> jax.Array:
        if video_BTYX3.dtype == jnp.uint8:
            video_BTYX3 = video_BTYX3.astype(jnp.float32) / 255 * 2 - 1
        x_BTYXC = _fold_pixels(video_BTYX3.astype(self.conv1.weight[...].dtype))
        moments_BTYXC = self.conv1(self.encoder(x_BTYXC, history)).astype(jnp.float32)
        mean, std = self._latent_statistics()
        return (moments_BTYXC[..., : self.config.z_dim] - mean) / std

    def _decode(self, latents_BTYXC: jax.Array, history: History) -> jax.Array:
        mean, std = self._latent_statistics()
        z_BTYXC = latents_BTYXC.astype(jnp.float32) * std + mean
        x_BTYXC = self.conv2(z_BTYXC.astype(self.conv2.weight[...].dtype))
        return _unfold_pixels(self.decoder(x_BTYXC, history)).astype(jnp.float32)

    def _latent_statistics(self) -> tuple[jax.Array, jax.Array]:
        mean, std = self.config.latents_mean, self.config.latents_std
        shape = (1, 1, 1, 1, self.config.z_dim)
        return jnp.array(mean).reshape(shape), jnp.array(std).reshape(shape)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _encode_chunk(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    past: tuple[jax.Array, ...] | None,
    video_BTYX3: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    history = History(past)
    latents_BTYXC = nnx.merge(graphdef, state)._encode(video_BTYX3, history)
    return latents_BTYXC, tuple(history.kept)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_chunk(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    past: tuple[jax.Array, ...] | None,
    latents_BTYXC: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    history = History(past)
    video_BTYX3 = nnx.merge(graphdef, state)._decode(latents_BTYXC, history)
    return video_BTYX3, tuple(history.kept)


class Encoder(nnx.Module):
    """Folded pixels [B, T, Y, X, 12] to moments [B, T/4, Y/8, X/8, 2 z_dim]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = [config.encoder_dim * mult for mult in (1, *config.dim_mult)]
        last = len(config.dim_mult) - 1
        self.conv1 = Conv(3 * PIXEL_PATCH**2, widths[0], (3, 3, 3), rngs=rngs)
        self.downsamples = nnx.List(
            DownStage(
                widths[i],
                widths[i + 1],
                config.num_res_blocks,
                time_factor=2 if 0 < i < last else 1,
                space_factor=2 if i < last else 1,
                rngs=rngs,
            )
            for i in range(last + 1)
        )
        self.middle = nnx.List(
            [
                ResidualBlock(widths[-1], widths[-1], rngs=rngs),
                AttentionBlock(widths[-1], rngs=rngs),
                ResidualBlock(widths[-1], widths[-1], rngs=rngs),
            ]
        )
        head = Conv(widths[-1], 2 * config.z_dim, (3, 3, 3), rngs=rngs)
        self.head: nnx.Dict[Any] = nnx.Dict({"0": ChannelNorm((widths[-1], 1, 1, 1)), "2": head})

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        x_BTYXC = self.conv1(x_BTYXC, history.before(x_BTYXC, 2))
        for part in (*self.downsamples, *self.middle):
            x_BTYXC = part(x_BTYXC, history)
        x_BTYXC = jax.nn.silu(self.head["0"](x_BTYXC))
        return self.head["2"](x_BTYXC, history.before(x_BTYXC, 2))


class Decoder(nnx.Module):
    """Latents [B, T, Y, X, z_dim] to folded pixels [B, 4T - 3 or 4T, 8Y, 8X, 12]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        mults = config.dim_mult[::-1]
        widths = [config.decoder_dim * mult for mult in (mults[0], *mults)]
        last = len(mults) - 1
        self.conv1 = Conv(config.z_dim, widths[0], (3, 3, 3), rngs=rngs)
        self.middle = nnx.List(
            [
                ResidualBlock(widths[0], widths[0], rngs=rngs),
                AttentionBlock(widths[0], rngs=rngs),
                ResidualBlock(widths[0], widths[0], rngs=rngs),
            ]
        )
        self.upsamples = nnx.List(
            UpStage(
                widths[i],
                widths[i + 1],
                config.num_res_blocks + 1,
                time_factor=2 if i < last - 1 else 1,
                space_factor=2 if i < last else 1,
                rngs=rngs,
            )
            for i in range(last + 1)
        )
        head = Conv(widths[-1], 3 * PIXEL_PATCH**2, (3, 3, 3), rngs=rngs)
        self.head: nnx.Dict[Any] = nnx.Dict({"0": ChannelNorm((widths[-1], 1, 1, 1)), "2": head})

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        x_BTYXC = self.conv1(x_BTYXC, history.before(x_BTYXC, 2))
        for part in (*self.middle, *self.upsamples):
            x_BTYXC = part(x_BTYXC, history)
        x_BTYXC = jax.nn.silu(self.head["0"](x_BTYXC))
        return self.head["2"](x_BTYXC, history.before(x_BTYXC, 2))


def _fold_pixels(video_BTYX3: jax.Array) -> jax.Array:
    """Folds 2 x 2 pixels into channels c * 4 + dx * 2 + dy: columns before rows."""
    batch, time, rows, columns, _ = video_BTYX3.shape
    patch = PIXEL_PATCH
    cells = video_BTYX3.reshape(batch, time, rows // patch, patch, columns // patch, patch, 3)
    return cells.transpose(0, 1, 2, 4, 6, 5, 3).reshape(*cells.shape[:3], columns // patch, -1)


def _unfold_pixels(x_BTYXC: jax.Array) -> jax.Array:
    batch, time, rows, columns, _ = x_BTYXC.shape
    patch = PIXEL_PATCH
    cells = x_BTYXC.reshape(batch, time, rows, columns, 3, patch, patch)
    cells = cells.transpose(0, 1, 2, 6, 3, 5, 4)
    return cells.reshape(batch, time, rows * patch, columns * patch, 3)


def _check_video(shape: tuple[int, ...], *, is_first: bool) -> None:
    _, time, rows, columns, _ = shape
    rule = f"{TIME_STRIDE}n + 1" if is_first else f"{TIME_STRIDE}n"
    if time < 1 or time % TIME_STRIDE != int(is_first):
        part = "the first (or only) chunk" if is_first else "a later chunk"
        raise ValueError(f"{part} of a clip must hold {rule} frames, not {time}")
    if rows % SPACE_STRIDE or columns % SPACE_STRIDE:
        raise ValueError(
            f"rows and columns must be multiples of {SPACE_STRIDE}, not {rows} x {columns}"
        )
