"""The layers the networks share; each computes in the dtype of its input.

A parameter may be stored in another dtype (float32 master, bfloat16 base): it is cast where it is
used, so a float32 input means float32 arithmetic and a bfloat16 input means bfloat16 matmuls.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from wan22_jax.model.fp8 import quantize_weight
from wan22_jax.model.fused import Activation, activate, norm_rope_twin
from wan22_jax.model.linear import LinearWeights, linear
from wan22_jax.model.lora import LoRAParam, LowRank, init_lora, round_low_rank

LayerT = TypeVar("LayerT", bound=nnx.Module)


class Linear(nnx.Module):
    """y = x W^T + b, plus (alpha / rank) * x A^T B^T when an adapter is attached."""

    def __init__(self, num_in: int, num_out: int, *, rngs: nnx.Rngs, bias: bool = True):
        bound = math.sqrt(6 / (num_in + num_out))  # Xavier uniform, as the original initialises
        self.weight = nnx.Param(
            jax.random.uniform(rngs.params(), (num_out, num_in), jnp.float32, -bound, bound)
        )
        self.weight_scale: nnx.Param | None = nnx.data(None)  # of a float8 weight
        self.bias = nnx.Param(jnp.zeros((num_out,))) if bias else None
        self.lora_A: LoRAParam | None = nnx.data(None)
        self.lora_B: LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0

    def add_lora(self, key: jax.Array, *, rank: int, alpha: float) -> None:
        """Attaches an adapter; B starts at zero, so the layer's output does not change."""
        self.lora_A, self.lora_B = init_lora(key, self.weight.shape, rank=rank)
        self.lora_scale = alpha / rank

    def to_float8(self) -> None:
        """Stores the weight as float8_e4m3fn with a scale (stacked layers: one scale each)."""
        weight, scale = quantize_weight(self.weight[...])
        self.weight, self.weight_scale = nnx.Param(weight), nnx.Param(scale)

    @property
    def low_rank(self) -> LowRank | None:
        """What the adapter adds, None without one."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return LowRank(self.lora_scale * self.lora_A[...], (self.lora_B[...],))

    def activate(self, rows: jax.Array) -> Activation:
        """Gives rows [N, in] the form in which ``linear.linear`` takes them for this layer."""
        return activate(rows, is_float8=self.weight_scale is not None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., out] in x's dtype."""
        scale, bias, low_rank = self.weight_scale, self.bias, self.low_rank
        weights = LinearWeights(
            self.weight[...],
            None if scale is None else scale[...].reshape(1),
            None if bias is None else bias[...],
            round_low_rank(low_rank, x.dtype),
            low_rank,
        )
        (y,) = linear(self.activate(x.reshape(-1, x.shape[-1])), weights)
        return y.reshape(*x.shape[:-1], -1)


def stack_layers(
    make_layer: Callable[[nnx.Rngs], LayerT], num_layers: int, rngs: nnx.Rngs
) -> LayerT:
    """Makes one module whose parameters hold all layers, along a new leading axis."""
    split = nnx.split_rngs(splits=num_layers)
    return split(nnx.vmap(make_layer, in_axes=0, out_axes=0))(rngs)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Shapes and casts a vector so that it broadcasts along the last axis of x."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class LayerNorm(nnx.Module):
    """Weight and bias of a layer norm, which ``fused.residual_norm`` computes."""

    def __init__(self, dim: int):
        self.weight = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), cast back to x's dtype, times weight."""

    def __init__(self, dim: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps x's dtype; statistics in float32."""
        rows = x.reshape(-1, x.shape[-1])
        return norm_rope_twin(self.eps, rows, self.weight[...], None).reshape(x.shape)
