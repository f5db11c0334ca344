"""The Wan2.2 TI2V-5B transformer: noisy latents, noise level per frame and text to velocity.

Follows the official implementation (spec, section 1). The time embedding, the modulation, all
norm statistics and the head are float32 whatever the weights are; the matmuls of the blocks and
attention run in the dtype of the weights; the residual stream has the weights' dtype (training,
as diffusion-pipe) or float32 (``float32_residual``, as the original samples).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from wan22_jax.model.attention import attend
from wan22_jax.model.block_weights import (
    Arrays,
    BlockWeights,
    join_adapters,
    join_linears,
    named_arrays,
    round_masters,
)
from wan22_jax.model.embeddings import Head, PatchEmbedding, sinusoid
from wan22_jax.model.fused import (
    Activation,
    Rope,
    activate,
    add_gated,
    norm_rope,
    residual_norm,
)
from wan22_jax.model.layers import LayerNorm, Linear, RMSNorm, stack_layers
from wan22_jax.model.linear import LinearWeights, linear, linear_gelu_linear
from wan22_jax.model.lora import Dropout, LoRAParam
from wan22_jax.model.remat import POLICIES, Stack, Streamed, run_blocks
from wan22_jax.model.rope import rope_tables
from wan22_jax.model.shards import ONE_DEVICE, Shards, Tokens


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; the defaults are the ones that all TI2V models share.

    Any sequence is kept as a tuple, so that a config can key a compiled program.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 48
    out_channels: int = 48
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: Sequence[int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(int(size) for size in self.patch_size))


TI2V_5B = TransformerConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30)


class WanTransformer(nnx.Module):
    """Predicts the velocity noise - data; one network for text- and image-to-video."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        if config.patch_size[0] != 1:
            raise ValueError(f"patch_size {config.patch_size}: one latent frame a token expected")
        self.config = config
        self.patch_embedding = PatchEmbedding(
            config.in_channels, dim, patch_size=config.patch_size, rngs=rngs
        )
        self.text_embedding = nnx.Dict(
            {"0": Linear(config.text_dim, dim, rngs=rngs), "2": Linear(dim, dim, rngs=rngs)}
        )
        self.time_embedding = nnx.Dict(
            {"0": Linear(config.freq_dim, dim, rngs=rngs), "2": Linear(dim, dim, rngs=rngs)}
        )
        self.time_projection = nnx.Dict({"1": Linear(dim, 6 * dim, rngs=rngs)})
        self.blocks = stack_layers(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.head = Head(
            dim,
            config.out_channels,
            patch_size=config.patch_size,
            eps=config.eps,
            rngs=rngs,
        )

    def __call__(
        self,
        latents_BTYXC: Float[Array | np.ndarray, "B T Y X C"],
        sigma_BT: Float[Array | np.ndarray, "B T"],
        text_BSE: Float[Array | np.ndarray, "B S E"],
        *,
        float32_residual: bool = False,
        activation_checkpointing: bool | str = False,
        parts: Sequence[list[Arrays] | Stack | Streamed] = (),
        dropout: Dropout | None = None,
        differentiable: bool = True,
        shards: Shards = ONE_DEVICE,
    ) -> Float[Array, "B T Y X O"]:
        """Predicts the velocity, float32.

        Args:
            latents_BTYXC: noisy normalised latents; rows and columns even.
            sigma_BT: noise level of each latent frame in [0, 1]; 0 marks a given, clean frame.
            text_BSE: text embeddings, S <= text_len; zero rows are appended here, never masked.
            float32_residual: keep the residual stream in float32 in a 16-bit model.
            activation_checkpointing: what the backward pass keeps of each block, a key of
                ``remat.POLICIES``.
            parts: weights of the blocks to read instead of those of ``self.blocks``; see
                ``training.step.place_frozen`` and ``training.full.merge_full``.
            dropout: of the adapters.
            differentiable: False leaves out what only a gradient needs.
            shards: what is divided among devices, inside of a shard_map; latents and velocity are
                whole on each of those that share a clip.

        Raises:
            ValueError: rows or columns are odd, or the text is longer than text_len.
        """
        config = self.config
        num_text = text_BSE.shape[1]
        if num_text > config.text_len:
            raise ValueError(f"text has {num_text} tokens, at most {config.text_len} are allowed")
        dtype = self.patch_embedding.weight.dtype
        x_BLD, grid_TYX = self.patch_embedding(jnp.asarray(latents_BTYXC, dtype))
        text_BSD = self.embed_text(jnp.asarray(text_BSE, dtype))
        time_BTD, time_BTMD = self.embed_time(jnp.asarray(sigma_BT, jnp.float32))
        tokens = Tokens(shards, num_frames=grid_TYX[0], count=x_BLD.shape[1])
        x_BLD = tokens.own(x_BLD, axis=1)
        cos_LP, sin_LP = rope_tables(grid_TYX, config.dim // config.num_heads)
        rope = tokens.own(cos_LP, axis=0), tokens.own(sin_LP, axis=0)
        if dropout is not None:
            dropout = dropout._replace(rows_L=tokens.own(jnp.arange(tokens.count), axis=0))
        text = self.blocks.cross_attn.k.activate(text_BSD.reshape(-1, config.dim))
        frozen = nnx.state(self.blocks, nnx.Not(LoRAParam))
        adapters = join_adapters(
            {path.removeprefix("blocks."): layer for path, layer in self.lora_targets()},
            dtype=dtype,
        )

        # Of each block, to drop with; float32, since what has a row a block is differentiated.
        number_N = None if dropout is None else jnp.arange(config.num_layers, dtype=jnp.float32)

        def run(x: jax.Array, trainable: tuple, frozen: tuple, context: tuple) -> jax.Array:
            arrays = {name: array for part in frozen for name, array in part.items()}
            *inputs, dropout = context
            adapters, number = trainable
            if dropout is not None:
                dropout = dropout.at(jax.lax.stop_gradient(number).astype(jnp.int32))
            arrays = join_linears(shards.gather_rows(round_masters(arrays, dtype)))
            weights = BlockWeights(arrays, adapters, dropout)
            return run_block(
                x, weights, *inputs, config=config, tokens=tokens, differentiable=differentiable
            )

        x_BLD = run_blocks(
            run,
            x_BLD.astype(jnp.float32) if float32_residual else x_BLD,
            (adapters, number_N),
            parts or [Stack(named_arrays(frozen))],
            (time_BTMD, text, rope, dropout),
            POLICIES[activation_checkpointing],
        )
        return self.head(x_BLD, time_BTD, grid_TYX, tokens)

    def lora_targets(self) -> Iterator[tuple[str, Linear]]:
        """Yields the path and the (stacked) layer of each linear of the blocks, sorted by path."""
        linears = {
            ".".join(["blocks", *map(str, path)]): node
            for path, node in nnx.iter_graph(self.blocks)
            if isinstance(node, Linear)
        }
        yield from sorted(linears.items())

    def add_lora(self, key: Array, *, rank: int, alpha: float) -> None:
        """Attaches a fresh float32 adapter to the ten linears of every block."""
        for index, (_, layer) in enumerate(self.lora_targets()):
            layer.add_lora(jax.random.fold_in(key, index), rank=rank, alpha=alpha)

    def to_float8(self) -> None:
        """Stores the weights of the ten linears of every block in float8."""
        for _, layer in self.lora_targets():
            layer.to_float8()

    def embed_text(self, text_BSE: jax.Array) -> jax.Array:
        """Maps text embeddings to [B, text_len, D], as the cross-attention takes them."""
        # The zero rows go through the MLP and become a constant that every query attends to.
        padding = self.config.text_len - text_BSE.shape[1]
        text_BSE = jnp.pad(text_BSE, ((0, 0), (0, padding), (0, 0)))
        hidden_BSD = jax.nn.gelu(self.text_embedding["0"](text_BSE), approximate=True)
        return self.text_embedding["2"](hidden_BSD)

    def embed_time(self, sigma_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the embedding [B, T, D] of the noise levels and their modulation [B, T, 6, D]."""
        wave_BTF = sinusoid(1000 * sigma_BT, self.config.freq_dim)
        time_BTD = self.time_embedding["2"](jax.nn.silu(self.time_embedding["0"](wave_BTF)))
        time_BT6D = self.time_projection["1"](jax.nn.silu(time_BTD))
        return time_BTD, time_BT6D.reshape(*sigma_BT.shape, 6, self.config.dim)


class Block(nnx.Module):
    """Parameters of ``run_block``."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.modulation = nnx.Param(
            jax.random.normal(rngs.params(), (1, 6, config.dim)) / np.sqrt(config.dim)
        )
        self.self_attn = Attention(config, rngs=rngs)
        self.norm3 = LayerNorm(config.dim)
        self.cross_attn = Attention(config, rngs=rngs)
        self.ffn = nnx.Dict(
            {
                "0": Linear(config.dim, config.ffn_dim, rngs=rngs),
                "2": Linear(config.ffn_dim, config.dim, rngs=rngs),
            }
        )


class Attention(nnx.Module):
    """Parameters of ``attend_to_itself`` or ``attend_to_text``."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.q = Linear(dim, dim, rngs=rngs)
        self.k = Linear(dim, dim, rngs=rngs)
        self.v = Linear(dim, dim, rngs=rngs)
        self.o = Linear(dim, dim, rngs=rngs)
        self.norm_q = RMSNorm(dim, eps=config.eps)
        self.norm_k = RMSNorm(dim, eps=config.eps)


def run_block(
    x_BLD: jax.Array,
    weights: BlockWeights,
    time_BTMD: jax.Array,
    text: Activation,
    rope: Rope,
    *,
    config: TransformerConfig,
    tokens: Tokens,
    differentiable: bool = True,
) -> jax.Array:
    """Self-attention, cross-attention to the text, feed-forward; modulated by the noise level.

    Returns the residual stream in its own dtype; branches compute in the text's dtype.
    """
    B, L, D = x_BLD.shape
    arrays = weights.arrays
    modulation_BTMD = arrays["modulation"].astype(jnp.float32)[None] + time_BTMD
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        modulation_BTMD[:, :, m].reshape(-1, D) for m in range(6)
    )
    shift1, weight1, gate1, shift2, weight2, gate2 = checkpoint_name(
        (shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2), "modulation"
    )
    norm = partial(
        residual_norm,
        eps=config.eps,
        dtype=text.rows.dtype,
        quantize=weights.linear("ffn.0").is_float8,
    )

    def rows(name: str) -> bool:
        return differentiable or weights.reads_rows(name)

    x = x_BLD.reshape(-1, D)
    x_ND, y = norm(x, None, None, weight1, shift1, rows=rows("self_attn.qkv"))
    y_ND = attend_to_itself(y, weights, rope, config=config, tokens=tokens, batch=B)
    weight3, bias3 = arrays["norm3.weight"][None], arrays["norm3.bias"][None]
    x_ND, y = norm(x_ND, y_ND, gate1, weight3, bias3, rows=rows("cross_attn.q"))
    y_ND = attend_to_text(y, weights, text, config=config, batch=B)
    x_ND, y = norm(x_ND, y_ND, None, weight2, shift2, rows=rows("ffn.0"))
    up, down = weights.linear("ffn.0"), weights.linear("ffn.2")
    y_ND = linear_gelu_linear(y, up, down, name="ffn_in", rows=rows("ffn.2"))
    return add_gated(x_ND, y_ND, gate2).reshape(B, L, D)


def attend_to_itself(
    x: Activation,
    weights: BlockWeights,
    rope: Rope,
    *,
    config: TransformerConfig,
    tokens: Tokens,
    batch: int,
) -> jax.Array:
    """Self-attention of the rows of each example; q and k are normalised and rotated."""
    q_ND, k_ND, v_ND = checkpoint_name(linear(x, weights.linear("self_attn.qkv"), groups=3), "qkv")
    q_ND = norm_rope(q_ND, weights.arrays["self_attn.norm_q.weight"], rope, eps=config.eps)
    k_ND = norm_rope(k_ND, weights.arrays["self_attn.norm_k.weight"], rope, eps=config.eps)
    q_ND, k_ND = checkpoint_name((q_ND, k_ND), "rotated")
    q_BLHK, k_BLHK, v_BLHK = (
        tokens.all_of_some_heads(_split_heads(x_ND, config, batch)) for x_ND in (q_ND, k_ND, v_ND)
    )
    out_BLHK = tokens.some_of_all_heads(attend(q_BLHK, k_BLHK, v_BLHK, name="attention"))
    rows_ND = out_BLHK.reshape(-1, config.dim)
    return checkpoint_name(_project_out(rows_ND, weights.linear("self_attn.o")), "o")


def attend_to_text(
    x: Activation, weights: BlockWeights, text: Activation, *, config: TransformerConfig, batch: int
) -> jax.Array:
    """Cross-attention from the rows of each example to its text; q and k are normalised."""
    (q_ND,) = checkpoint_name(linear(x, weights.linear("cross_attn.q")), "cross_q")
    k_ND, v_ND = checkpoint_name(
        linear(text, weights.linear("cross_attn.kv"), groups=2), "cross_kv"
    )
    q_ND = norm_rope(q_ND, weights.arrays["cross_attn.norm_q.weight"], None, eps=config.eps)
    k_ND = norm_rope(k_ND, weights.arrays["cross_attn.norm_k.weight"], None, eps=config.eps)
    q_BLHK, k_BSHK, v_BSHK = (_split_heads(x_ND, config, batch) for x_ND in (q_ND, k_ND, v_ND))
    rows_ND = attend(q_BLHK, k_BSHK, v_BSHK, name="cross_attention").reshape(-1, config.dim)
    return checkpoint_name(_project_out(rows_ND, weights.linear("cross_attn.o")), "cross_o")


def _split_heads(x_ND: jax.Array, config: TransformerConfig, batch: int) -> jax.Array:
    return x_ND.reshape(batch, -1, config.num_heads, config.dim // config.num_heads)


def _project_out(rows_ND: jax.Array, weights: LinearWeights) -> jax.Array:
    (out_ND,) = linear(activate(rows_ND, is_float8=weights.is_float8), weights)
    return out_ND
