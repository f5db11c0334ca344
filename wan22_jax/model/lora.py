"""Low-rank adapters: which parameters train, and how they start (Hu et al. 2021)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


class LoRAParam(nnx.Param):
    """A trainable adapter matrix; everything else in a model is frozen while these train."""


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
