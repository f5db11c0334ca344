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
from wan22_jax.model.lora import LoRAParam, init_lora

LayerT = TypeVar("LayerT", bound=nnx.Module)


class Linear(nnx.Module):
    """y = x W^T + b, plus (alpha / rank) * x A^T B^T when an adapter is attached."""

    def __init__(self, num_in: int, num_out: int, *, rngs: nnx.Rngs, bias: bool = True):
        bound = math.sqrt(6 / (num_in + num_out))  # Xavier uniform, as the original initialises
        self.weight = nnx.Param(
            jax.random.uniform(rngs.params(), (num_out, num_in), jnp.float32, -bound, bound)
        )
        self.weight_scale: nnx.Param | None = nnx.data(None)
        self.bias = nnx.Param(jnp.zeros((num_out,))) if bias else None
        self.lora_A: LoRAParam | None = nnx.data(None)
        self.lora_B: LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0

    def add_lora(self, key: jax.Array, *, rank: int, alpha: float) -> None:
        """Attaches an adapter; B starts at zero, so the layer's output does not change."""
        self.lora_A, self.lora_B = init_lora(key, self.weight.shape, rank=rank)
        self.lora_scale = alpha / rank

    def to_float8(self) -> None:
        """Replaces the weight by float8_e4m3fn values and their scale, one per stacked layer."""
        weight, scale = quantize_weight(self.weight[...])
        self.weight, self.weight_scale = nnx.Param(weight), nnx.Param(scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., out] in x's dtype."""
        weight = self.weight[...].astype(x.dtype)
        if self.weight_scale is not None:
            weight = weight * self.weight_scale[...].astype(x.dtype)
        y = _matmul(x, weight)
        if self.bias is not None:
            y = y + along_last(self.bias[...], y)
        if self.lora_A is not None and self.lora_B is not None:
            y = y + self.lora_scale * _matmul(_matmul(x, self.lora_A[...]), self.lora_B[...])
        return y


def stack_layers(
    make_layer: Callable[[nnx.Rngs], LayerT], num_layers: int, rngs: nnx.Rngs
) -> LayerT:
    """Makes one module whose parameters hold all layers, along a new leading axis."""
    split = nnx.split_rngs(splits=num_layers)
    return split(nnx.vmap(make_layer, in_axes=0, out_axes=0))(rngs)


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Shapes and casts a vector so that it broadcasts along the last axis of x."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _matmul(x: jax.Array, weight_OI: jax.Array) -> jax.Array:
    # HIGHEST: float32 means float32 on a GPU too, not TF32; 16-bit operands are not affected.
    return jnp.matmul(x, weight_OI.astype(x.dtype).T, precision=jax.lax.Precision.HIGHEST)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis with weight and bias; statistics and result in float32."""

    def __init__(self, dim: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,)))
        self.bias = nnx.Param(jnp.zeros((dim,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float32; the caller casts."""
        y = layer_norm(x, eps=self.eps)
        return y * along_last(self.weight[...], y) + along_last(self.bias[...], y)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), cast back to x's dtype, times weight."""

    def __init__(self, dim: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps x's dtype; statistics in float32."""
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype) * along_last(self.weight[...], x)


def layer_norm(x: jax.Array, *, eps: float) -> jax.Array:
    """Normalises the last axis without weights; computed and returned in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)
