"""How video becomes latents and back: the Wan2.2 VAE (16 x 16 x 4 compression, 48 channels).

A clip is read in chunks: the first holds 4n + 1 frames, every later one 4n. Layers that look back
in time take the frames before a chunk from a ``History``; at the start of the clip these are
zeros, except where frame 0 passes a temporal resampling untouched. The whole-clip form is a first
chunk that holds everything. Source: Wan-Video/Wan2.2, wan/modules/vae2_2.py (42bf4cf).

Axes here: T Y X are frames, rows and columns at whatever resolution a layer works in. Activations
are channels last; arithmetic is in the dtype of the parameters, norm statistics, softmax, latents
and returned video in float32.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from wan22_jax.geometry import SPACE_STRIDE, TIME_STRIDE

PIXEL_PATCH = 2  # pixels per row and column folded into channels before the encoder


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; tuples, so that a config can key a compiled program."""

    encoder_dim: int
    decoder_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int  # per encoder stage; a decoder stage has one more
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]


WAN22_VAE = VAEConfig(
    encoder_dim=160,
    decoder_dim=256,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    # fmt: off
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
    # fmt: on
)


class WanVAE(nnx.Module):
    """Encodes video to normalised latents and decodes them."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.conv1 = Conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), rngs=rngs)
        self.conv2 = Conv(config.z_dim, config.z_dim, (1, 1, 1), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video_BTYX3: Float[Array, "B T Y X 3"]) -> Float[Array, "B t y x C"]:
        """Returns the normalised mean, float32; memory grows with the clip.

        Args:
            video_BTYX3: pixels in [-1, 1], 4n + 1 frames, sides multiples of 16.

        Raises:
            ValueError: the frames or sides do not divide so.
        """
        _check_video(video_BTYX3.shape, is_first=True)
        return self._encode(video_BTYX3, History())

    def decode(self, latents_BTYXC: Float[Array, "B T Y X C"]) -> Float[Array, "B t y x 3"]:
        """Returns the video, float32, not clamped to [-1, 1]; memory grows with the clip.

        Args:
            latents_BTYXC: normalised latents; T frames of them become 4T - 3 of video.
        """
        return self._decode(latents_BTYXC, History())

    def encode_chunks(
        self, chunks: Iterable[Float[Array, "B T Y X 3"]]
    ) -> Iterator[Float[Array, "B t y x C"]]:
        """Yields the latents of each chunk; memory does not grow with the number of chunks.

        Equal to ``encode`` of the chunks put together. Compiles one program for the first chunk
        and one for all later ones of a shape.

        Args:
            chunks: consecutive parts of one clip: 1 frame, then 4 each (or 4n + 1, then 4n each).

        Raises:
            ValueError: a chunk has another number of frames, or sides that are not multiples of 16.
        """
        graphdef, state = nnx.split(self)
        past = None
        for video_BTYX3 in chunks:
            _check_video(video_BTYX3.shape, is_first=past is None)
            latents_BTYXC, past = _encode_chunk(graphdef, state, past, video_BTYX3)
            yield latents_BTYXC

    def decode_chunks(
        self, latents_BTYXC: Float[Array, "B T Y X C"]
    ) -> Iterator[Float[Array, "B t y x 3"]]:
        """Yields the video of one latent frame after the other: 1 frame, then 4 each.

        Equal to ``decode``; memory does not grow with the clip. Compiles one program for the first
        frame and one for all later ones.
        """
        graphdef, state = nnx.split(self)
        past = None
        for i in range(latents_BTYXC.shape[1]):
            frame_B1YXC = latents_BTYXC[:, i : i + 1]
            video_BTYX3, past = _decode_chunk(graphdef, state, past, frame_B1YXC)
            yield video_BTYX3

    def _encode(self, video_BTYX3: jax.Array, history: "History") -> jax.Array:
        x_BTYXC = _fold_pixels(video_BTYX3.astype(self.conv1.weight[...].dtype))
        moments_BTYXC = self.conv1(self.encoder(x_BTYXC, history)).astype(jnp.float32)
        mean, std = self._latent_statistics()
        return (moments_BTYXC[..., : self.config.z_dim] - mean) / std

    def _decode(self, latents_BTYXC: jax.Array, history: "History") -> jax.Array:
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


class History:
    """The frames before a chunk, for each layer that looks back, in the order of the layers."""

    def __init__(self, past: tuple[jax.Array, ...] | None = None):
        """Without a past, the chunk is the first of its clip."""
        self.is_first = past is None
        self.kept: list[jax.Array] = []  # the past of the next chunk
        self._past = iter(past or ())

    def extend(self, x_BTYXC: jax.Array, num_frames: int) -> jax.Array:
        """Puts the layer's last ``num_frames`` frames before x: zeros if there are none yet."""
        batch, _, *frame = x_BTYXC.shape
        if self.is_first:
            past_BTYXC = jnp.zeros((batch, num_frames, *frame), x_BTYXC.dtype)
        else:
            past_BTYXC = next(self._past)
        extended_BTYXC = jnp.concatenate([past_BTYXC, x_BTYXC], axis=1)
        self.kept.append(extended_BTYXC[:, -num_frames:])
        return extended_BTYXC


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
        self.middle = _make_middle(widths[-1], rngs=rngs)
        self.head = _make_head(widths[-1], 2 * config.z_dim, rngs=rngs)

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        x_BTYXC = self.conv1(history.extend(x_BTYXC, 2))
        for stage in self.downsamples:
            x_BTYXC = stage(x_BTYXC, history)
        x_BTYXC = _run_middle(self.middle, x_BTYXC, history)
        return _run_head(self.head, x_BTYXC, history)


class Decoder(nnx.Module):
    """Latents [B, T, Y, X, z_dim] to folded pixels [B, 4T - 3 or 4T, 8Y, 8X, 12]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        mults = config.dim_mult[::-1]
        widths = [config.decoder_dim * mult for mult in (mults[0], *mults)]
        last = len(mults) - 1
        self.conv1 = Conv(config.z_dim, widths[0], (3, 3, 3), rngs=rngs)
        self.middle = _make_middle(widths[0], rngs=rngs)
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
        self.head = _make_head(widths[-1], 3 * PIXEL_PATCH**2, rngs=rngs)

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        x_BTYXC = self.conv1(history.extend(x_BTYXC, 2))
        x_BTYXC = _run_middle(self.middle, x_BTYXC, history)
        for stage in self.upsamples:
            x_BTYXC = stage(x_BTYXC, history)
        return _run_head(self.head, x_BTYXC, history)


class DownStage(nnx.Module):
    """Residual blocks and a strided resampling, beside a shortcut that averages."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        num_blocks: int,
        *,
        time_factor: int,
        space_factor: int,
        rngs: nnx.Rngs,
    ):
        layers: list[nnx.Module] = _make_blocks(num_in, num_out, num_blocks, rngs=rngs)
        if space_factor == 2:
            layers.append(Downsample(num_out, in_time=time_factor == 2, rngs=rngs))
        self.downsamples = nnx.List(layers)
        self.num_out = num_out
        self.time_factor = time_factor
        self.space_factor = space_factor

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        path_BTYXC = x_BTYXC
        for layer in self.downsamples:
            path_BTYXC = layer(path_BTYXC, history)
        return path_BTYXC + self._average(x_BTYXC, is_first=history.is_first)

    def _average(self, x_BTYXC: jax.Array, *, is_first: bool) -> jax.Array:
        """Folds cells of time x space x space into channels and averages groups of these."""
        ft, fs = self.time_factor, self.space_factor
        if is_first:  # a zero frame in front, so that frame 0 is alone in its cell
            x_BTYXC = jnp.pad(x_BTYXC, ((0, 0), (ft - 1, 0), (0, 0), (0, 0), (0, 0)))
        batch, time, rows, columns, width = x_BTYXC.shape
        cells = x_BTYXC.reshape(batch, time // ft, ft, rows // fs, fs, columns // fs, fs, width)
        cells = cells.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # ... C, dt, dy, dx
        return jnp.mean(cells.reshape(*cells.shape[:4], self.num_out, -1), axis=-1)


class UpStage(nnx.Module):
    """Residual blocks and an upsampling, beside a shortcut that repeats channels."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        num_blocks: int,
        *,
        time_factor: int,
        space_factor: int,
        rngs: nnx.Rngs,
    ):
        layers: list[nnx.Module] = _make_blocks(num_in, num_out, num_blocks, rngs=rngs)
        if space_factor == 2:
            layers.append(Upsample(num_out, in_time=time_factor == 2, rngs=rngs))
        self.upsamples = nnx.List(layers)
        self.num_out = num_out
        self.time_factor = time_factor
        self.space_factor = space_factor

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        path_BTYXC = x_BTYXC
        for layer in self.upsamples:
            path_BTYXC = layer(path_BTYXC, history)
        if self.space_factor == 1:  # the last stage has no shortcut
            return path_BTYXC
        return path_BTYXC + self._repeat(x_BTYXC, is_first=history.is_first)

    def _repeat(self, x_BTYXC: jax.Array, *, is_first: bool) -> jax.Array:
        """Repeats channels in place and spreads them over time x space x space."""
        ft, fs = self.time_factor, self.space_factor
        batch, time, rows, columns, width = x_BTYXC.shape
        x_BTYXC = jnp.repeat(x_BTYXC, self.num_out * ft * fs * fs // width, axis=-1)
        cells = x_BTYXC.reshape(batch, time, rows, columns, self.num_out, ft, fs, fs)
        cells = cells.transpose(0, 1, 5, 2, 6, 3, 7, 4)  # B, T, dt, Y, dy, X, dx, C
        y_BTYXC = cells.reshape(batch, time * ft, rows * fs, columns * fs, self.num_out)
        return y_BTYXC[:, ft - 1 :] if is_first else y_BTYXC  # frame 0 stays one frame


class Downsample(nnx.Module):
    """Halves rows and columns, then, if asked, frames: 4n + 1 become 2n + 1, 4n become 2n."""

    def __init__(self, width: int, *, in_time: bool, rngs: nnx.Rngs):
        self.resample = nnx.Dict({"1": Conv(width, width, (3, 3), rngs=rngs)})
        self.time_conv = Conv(width, width, (3, 1, 1), rngs=rngs) if in_time else None

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        x_BTYXC = self.resample["1"](x_BTYXC, strides=(1, 2, 2), space_padding=(0, 1))
        if self.time_conv is None:
            return x_BTYXC
        extended_BTYXC = history.extend(x_BTYXC, 1)
        if not history.is_first:
            return self.time_conv(extended_BTYXC, strides=(2, 1, 1))
        later_BTYXC = self.time_conv(x_BTYXC, strides=(2, 1, 1))
        return jnp.concatenate([x_BTYXC[:, :1], later_BTYXC], axis=1)


class Upsample(nnx.Module):
    """Doubles, if asked, frames (but frame 0 stays one frame), then rows and columns."""

    def __init__(self, width: int, *, in_time: bool, rngs: nnx.Rngs):
        self.resample = nnx.Dict({"1": Conv(width, width, (3, 3), rngs=rngs)})
        self.time_conv = Conv(width, 2 * width, (3, 1, 1), rngs=rngs) if in_time else None

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        if self.time_conv is not None:
            # Frame 0 never enters the convolution: its history is zero at frame 1.
            num_passed = 1 if history.is_first else 0
            passed_BTYXC, x_BTYXC = x_BTYXC[:, :num_passed], x_BTYXC[:, num_passed:]
            doubled_BTYXC = self.time_conv(history.extend(x_BTYXC, 2))
            x_BTYXC = jnp.concatenate([passed_BTYXC, _interleave(doubled_BTYXC)], axis=1)
        x_BTYXC = jnp.repeat(jnp.repeat(x_BTYXC, 2, axis=2), 2, axis=3)
        return self.resample["1"](x_BTYXC)


class ResidualBlock(nnx.Module):
    """Two causal convolutions, each after norm and SiLU, plus the input."""

    def __init__(self, num_in: int, num_out: int, *, rngs: nnx.Rngs):
        self.residual = nnx.Dict(
            {
                "0": ChannelNorm((num_in, 1, 1, 1)),
                "2": Conv(num_in, num_out, (3, 3, 3), rngs=rngs),
                "3": ChannelNorm((num_out, 1, 1, 1)),
                "6": Conv(num_out, num_out, (3, 3, 3), rngs=rngs),
            }
        )
        self.shortcut = Conv(num_in, num_out, (1, 1, 1), rngs=rngs) if num_in != num_out else None

    def __call__(self, x_BTYXC: jax.Array, history: History) -> jax.Array:
        """Keeps x's dtype."""
        layers = self.residual
        y_BTYXC = layers["2"](history.extend(jax.nn.silu(layers["0"](x_BTYXC)), 2))
        y_BTYXC = layers["6"](history.extend(jax.nn.silu(layers["3"](y_BTYXC)), 2))
        return y_BTYXC + (x_BTYXC if self.shortcut is None else self.shortcut(x_BTYXC))


class AttentionBlock(nnx.Module):
    """Self-attention over the positions of each frame, one head as wide as the input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm((width, 1, 1))
        self.to_qkv = Conv(width, 3 * width, (1, 1), rngs=rngs)
        self.proj = Conv(width, width, (1, 1), rngs=rngs)

    def __call__(self, x_BTYXC: jax.Array) -> jax.Array:
        """Keeps x's dtype."""
        batch, time, rows, columns, width = x_BTYXC.shape
        qkv_BTYXC = self.to_qkv(self.norm(x_BTYXC))
        qkv_NLHC = qkv_BTYXC.reshape(batch * time, rows * columns, 1, 3 * width)
        q_NLHC, k_NLHC, v_NLHC = jnp.split(qkv_NLHC, 3, axis=-1)
        # cuDNN's flash attention stops at 256 channels a head; these are 640 and 1024.
        y_NLHC = jax.nn.dot_product_attention(q_NLHC, k_NLHC, v_NLHC, implementation="xla")
        return x_BTYXC + self.proj(y_NLHC.reshape(x_BTYXC.shape))


class ChannelNorm(nnx.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over channels; statistics in float32."""

    def __init__(self, gamma_shape: tuple[int, ...]):
        self.gamma = nnx.Param(jnp.ones(gamma_shape))

    def __call__(self, x_BTYXC: jax.Array) -> jax.Array:
        """Keeps x's dtype."""
        x32 = x_BTYXC.astype(jnp.float32)
        norm = jnp.maximum(jnp.linalg.norm(x32, axis=-1, keepdims=True), 1e-12)
        gamma = self.gamma[...].astype(jnp.float32).reshape(1, 1, 1, 1, -1)
        return (x32 / norm * math.sqrt(x32.shape[-1]) * gamma).astype(x_BTYXC.dtype)


class Conv(nnx.Module):
    """Convolution over frames, rows and columns, or over rows and columns of each frame."""

    def __init__(self, num_in: int, num_out: int, kernel: tuple[int, ...], *, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(num_in * math.prod(kernel))
        shape = (num_out, num_in, *kernel)
        self.weight = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        )
        self.bias = nnx.Param(jnp.zeros((num_out,)))

    def __call__(
        self,
        x_BTYXC: jax.Array,
        *,
        strides: tuple[int, int, int] = (1, 1, 1),
        space_padding: tuple[int, int] | None = None,
    ) -> jax.Array:
        """Keeps x's dtype; pads rows and columns to keep the size, frames never."""
        weight = self.weight[...].astype(x_BTYXC.dtype)
        if weight.ndim == 4:
            weight = weight[:, :, None]
        half = weight.shape[-1] // 2
        space_padding = space_padding or (half, half)
        y_BTYXC = jax.lax.conv_general_dilated(
            x_BTYXC,
            weight,
            window_strides=strides,
            padding=((0, 0), space_padding, space_padding),
            dimension_numbers=("NDHWC", "OIDHW", "NDHWC"),
        )
        return y_BTYXC + self.bias[...].astype(x_BTYXC.dtype).reshape(1, 1, 1, 1, -1)


def _make_blocks(
    num_in: int, num_out: int, num_blocks: int, *, rngs: nnx.Rngs
) -> list[nnx.Module]:
    return [
        ResidualBlock(num_in if i == 0 else num_out, num_out, rngs=rngs) for i in range(num_blocks)
    ]


def _make_middle(width: int, *, rngs: nnx.Rngs) -> nnx.List:
    first = ResidualBlock(width, width, rngs=rngs)
    attention = AttentionBlock(width, rngs=rngs)
    return nnx.List([first, attention, ResidualBlock(width, width, rngs=rngs)])


def _run_middle(middle: nnx.List, x_BTYXC: jax.Array, history: History) -> jax.Array:
    first, attention, second = middle
    return second(attention(first(x_BTYXC, history)), history)


def _make_head(width: int, num_out: int, *, rngs: nnx.Rngs) -> nnx.Dict:
    return nnx.Dict(
        {"0": ChannelNorm((width, 1, 1, 1)), "2": Conv(width, num_out, (3, 3, 3), rngs=rngs)}
    )


def _run_head(head: nnx.Dict, x_BTYXC: jax.Array, history: History) -> jax.Array:
    return head["2"](history.extend(jax.nn.silu(head["0"](x_BTYXC)), 2))


def _interleave(x_BTYXC: jax.Array) -> jax.Array:
    """Reads the two halves of the channels as an even and an odd frame."""
    batch, time, rows, columns, width = x_BTYXC.shape
    halves = x_BTYXC.reshape(batch, time, rows, columns, 2, width // 2)
    return halves.transpose(0, 1, 4, 2, 3, 5).reshape(batch, 2 * time, rows, columns, width // 2)


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
