"""The umT5 text encoder: prompt tokens to the text embeddings that the transformer attends to.

Follows the encoder half of umT5-xxl (spec, section 3; Chung et al. 2023). Unlike plain T5, every
layer has its own table of position biases. As in T5 the logits are not divided by sqrt(K), norms
have no mean and no bias, and no linear has a bias. Everything computes in the dtype of the
embedding table, but norm statistics, logits and softmax are float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from wan22_jax.model.layers import Linear, RMSNorm, stack_layers

NUM_BUCKETS = 32  # rows of a position table: 16 distances to the left, 16 to the right (umT5)
EPS = 1e-6  # of every norm (umT5 config, layer_norm_epsilon)


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; a head is dim / num_heads wide (64 in the checkpoint)."""

    vocab_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int


UMT5_XXL = UMT5Config(vocab_size=256384, dim=4096, ffn_dim=10240, num_heads=64, num_layers=24)


class UMT5(nnx.Module):
    """Encodes token ids; a row's result depends on its unmasked tokens only."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        if config.dim % config.num_heads:
            raise ValueError(f"dim {config.dim} is not a multiple of {config.num_heads} heads")
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.dim, std=1.0, rngs=rngs)
        self.blocks = stack_layers(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.dim, eps=EPS)

    def __call__(
        self,
        tokens_BS: Int[Array | np.ndarray, "B S"],
        mask_BS: Bool[Array | np.ndarray, "B S"] | Int[Array | np.ndarray, "B S"],
    ) -> Float[Array, "B S E"]:
        """Returns one embedding a token, in the dtype of the embedding table.

        Args:
            tokens_BS: ids in [0, vocab_size); others are not noticed here.
            mask_BS: true (or 1) at real tokens; results at the other positions mean nothing.
        """
        is_token_BS = jnp.asarray(mask_BS).astype(bool)
        buckets_SS = relative_buckets(tokens_BS.shape[1])
        graphdef, layers = nnx.split(self.blocks)

        def run_block(x_BSE: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer)(x_BSE, is_token_BS, buckets_SS), None

        x_BSE, _ = jax.lax.scan(run_block, self.token_embedding(jnp.asarray(tokens_BS)), layers)
        return self.norm(x_BSE)


class Block(nnx.Module):
    """Self-attention and a gated feed-forward, each after a norm and added to its input."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.dim, eps=EPS)
        self.attn = Attention(config, rngs=rngs)
        self.pos_embedding = PositionBias(config.num_heads, rngs=rngs)
        self.norm2 = RMSNorm(config.dim, eps=EPS)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self, x_BSE: jax.Array, is_token_BS: jax.Array, buckets_SS: np.ndarray | jax.Array
    ) -> jax.Array:
        """Keeps shape and dtype."""
        bias_HSS = self.pos_embedding(buckets_SS)
        x_BSE = x_BSE + self.attn(self.norm1(x_BSE), bias_HSS, is_token_BS)
        return x_BSE + self.ffn(self.norm2(x_BSE))


class Attention(nnx.Module):
    """Multi-head self-attention with an additive position bias and unscaled logits."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.q = Linear(config.dim, config.dim, rngs=rngs, bias=False)
        self.k = Linear(config.dim, config.dim, rngs=rngs, bias=False)
        self.v = Linear(config.dim, config.dim, rngs=rngs, bias=False)
        self.o = Linear(config.dim, config.dim, rngs=rngs, bias=False)

    def __call__(self, x_BSE: jax.Array, bias_HSS: jax.Array, is_token_BS: jax.Array) -> jax.Array:
        """Mixes the unmasked tokens of each row."""
        q_BSHK, k_BSHK, v_BSHK = (
            linear(x_BSE).reshape(*x_BSE.shape[:2], self.num_heads, -1)
            for linear in (self.q, self.k, self.v)
        )
        logits_BHSS = jnp.einsum(
            "bqhk,bshk->bhqs",
            q_BSHK,
            k_BSHK,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        # The lowest float32, not -inf: a row without a single token stays finite.
        lowest = jnp.finfo(jnp.float32).min
        logits_BHSS += jnp.where(is_token_BS[:, None, None, :], bias_HSS[None], lowest)
        weight_BHSS = jax.nn.softmax(logits_BHSS, axis=-1).astype(x_BSE.dtype)
        mixed_BSHK = jnp.einsum(
            "bhqs,bshk->bqhk", weight_BHSS, v_BSHK, precision=jax.lax.Precision.HIGHEST
        )
        return self.o(mixed_BSHK.reshape(x_BSE.shape))


class PositionBias(nnx.Module):
    """One learnt logit offset for each head and bucket of distances."""

    def __init__(self, num_heads: int, *, rngs: nnx.Rngs):
        std = (2 * NUM_BUCKETS * num_heads) ** -0.5  # as the original initialises
        self.embedding = Embedding(NUM_BUCKETS, num_heads, std=std, rngs=rngs)

    def __call__(self, buckets_SS: np.ndarray | jax.Array) -> jax.Array:
        """Returns [H, S (query), S (key)], float32."""
        bias_SSH = self.embedding(jnp.asarray(buckets_SS))
        return bias_SSH.transpose(2, 0, 1).astype(jnp.float32)


class FeedForward(nnx.Module):
    """fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.gate = nnx.Dict({"0": Linear(config.dim, config.ffn_dim, rngs=rngs, bias=False)})
        self.fc1 = Linear(config.dim, config.ffn_dim, rngs=rngs, bias=False)
        self.fc2 = Linear(config.ffn_dim, config.dim, rngs=rngs, bias=False)

    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        """Keeps shape and dtype."""
        gate_BSF = jax.nn.gelu(self.gate["0"](x_BSE), approximate=True)
        return self.fc2(self.fc1(x_BSE) * gate_BSF)


class Embedding(nnx.Module):
    """A table of rows, looked up by index."""

    def __init__(self, num_rows: int, dim: int, *, std: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (num_rows, dim)))

    def __call__(self, index: jax.Array) -> jax.Array:
        """Returns [..., dim] in the table's dtype."""
        return self.weight[...][index]


def relative_buckets(length: int) -> Int[np.ndarray, "S S"]:
    """Returns the bucket of each (query, key) pair: which row of the position table it uses.

    Keys to the right of the query use 16 to 31, the others 0 to 15. Distances below 8 have a
    bucket each; beyond, a bucket covers half an octave, and the last one everything from 91 on.
    """
    position_S = np.arange(length)
    offset_SS = position_S[None, :] - position_S[:, None]
    distance_SS = np.abs(offset_SS)
    # 8 + floor(8 ln(distance / 8) / ln(128 / 8)), counted in exact integers: how many of the
    # limits 8 * 2^(n/2) the distance has reached.
    squared_limits = 64 * 2 ** np.arange(1, 8)
    far_SS = 8 + np.searchsorted(squared_limits, distance_SS**2, side="right")
    bucket_SS = np.where(distance_SS < 8, distance_SS, far_SS)
    return np.where(offset_SS > 0, NUM_BUCKETS // 2, 0) + bucket_SS
