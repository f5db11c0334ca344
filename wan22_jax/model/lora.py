"""Low-rank adapters: which parameters train, and how they start (Hu et al. 2021)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class LoRAParam(nnx.Param):
    """A trainable adapter matrix; everything else in a model is frozen while these train."""


class LowRank(NamedTuple):
    """What adapters add to linears that read the same rows x: (x A^T) B^T, one B a linear."""

    matrix_a: jax.Array  # [groups * R, in], scaled, those of the linears one below the other
    matrices_b: tuple[jax.Array, ...]  # [out, R] each


class Dropout(NamedTuple):
    """LoRA dropout: each element of what A reads is 0 with probability ``rate``, else scaled up.

    The mask of a row is a function of (key of the example, layer, target, number of the row), so
    that a forward pass that is computed again drops the same, and so does one on several devices.
    """

    keys_BK: jax.Array  # uint32 key data, one key an example
    rate: jax.Array  # float32
    fold: jax.Array | int = 0  # what makes it the mask of one layer and target
    rows_L: jax.Array | None = None  # numbers of an example's rows; None: 0, 1, ...

    def at(self, index: jax.Array | int) -> "Dropout":
        """The dropout of one of up to 1000 parts: a layer of the model, then a target of it."""
        return self._replace(fold=self.fold * 1000 + index)

    def drop(self, rows_NI: jax.Array) -> jax.Array:
        """Drops elements of the rows of all examples, which follow each other."""
        rows_L = self.rows_L
        if rows_L is None:
            rows_L = jnp.arange(rows_NI.shape[0] // len(self.keys_BK))

        def keep(key_K: jax.Array, row: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.wrap_key_data(key_K), self.fold)
            key = jax.random.fold_in(key, row)
            return jax.random.bernoulli(key, 1 - self.rate, rows_NI.shape[1:])

        keep_rows = jax.vmap(jax.vmap(keep, in_axes=(None, 0)), in_axes=(0, None))
        keep_NI = keep_rows(self.keys_BK, rows_L).reshape(rows_NI.shape)
        scaled_NI = (rows_NI.astype(jnp.float32) / (1 - self.rate)).astype(rows_NI.dtype)
        return jnp.where(keep_NI, scaled_NI, 0)


def init_lora(
    key: jax.Array, weight_shape: tuple[int, ...], *, rank: int
) -> tuple[LoRAParam, LoRAParam]:
    """Makes A uniform in +-1/sqrt(in) and B zero, as PEFT does, for a weight [..., out, in].

    Leading axes (stacked layers) are kept, each layer with its own draw. The returned shapes are
    [..., rank, in] and [..., out, rank]; both are float32, the trained copy.
    """
    *stack, num_out, num_in = weight_shape
    bound = 1 / math.sqrt(num_in)
    matrix_a = jax.random.uniform(key, (*stack, rank, num_in), jnp.float32, -bound, bound)
    return LoRAParam(matrix_a), LoRAParam(jnp.zeros((*stack, num_out, rank)))


def join_low_rank(parts: Sequence[LowRank | None]) -> LowRank | None:
    """Joins what adapters add to linears that read the same rows; None adds zero.

    Ranks lower than the largest are padded with zeros, which are not parameters and get no
    gradient. Leading axes (stacked layers) are kept.
    """
    present = [part for part in parts if part is not None]
    if not present:
        return None
    zero = jax.tree.map(jnp.zeros_like, present[0])
    largest = max(part.matrix_a.shape[-2] for part in present)
    all_a, all_b = zip(*(_pad_rank(part or zero, largest) for part in parts), strict=True)
    return LowRank(jnp.concatenate(all_a, axis=-2), sum(all_b, ()))


def _pad_rank(part: LowRank, rank: int) -> LowRank:
    missing = rank - part.matrix_a.shape[-2]
    if missing == 0:
        return part
    stack = [(0, 0)] * (part.matrix_a.ndim - 2)
    matrix_a = jnp.pad(part.matrix_a, [*stack, (0, missing), (0, 0)])
    return LowRank(
        matrix_a, tuple(jnp.pad(b, [*stack, (0, 0), (0, missing)]) for b in part.matrices_b)
    )


def round_low_rank(trained: LowRank | None, dtype: DTypeLike) -> LowRank | None:
    """Casts what an adapter adds; the gradient is taken for the trained one, see ``linear``."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), jax.lax.stop_gradient(trained))
