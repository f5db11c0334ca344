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
from wan22_jax.model.fused import (
    Activation,
    LinearWeights,
    Rope,
    linear,
    linear_gelu_linear,
    norm_rope,
    norm_rope_twin,
    quantize,
)
from wan22_jax.model.lora import LoRAParam, init_lora

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
    def adapter_shape(self) -> tuple[int, float] | None:
        """Rank and scale of the adapter, None without one."""
        return None if self.lora_A is None else (self.lora_A.shape[-2], self.lora_scale)

    @property
    def is_float8(self) -> bool:
        """Whether the input is wanted in float8 too."""
        return self.weight_scale is not None

    def activate(self, rows: jax.Array) -> Activation:
        """Gives rows [N, in] the form in which ``project`` takes them for this layer."""
        return quantize(rows) if self.is_float8 else Activation(rows)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., out] in x's dtype."""
        (y,) = project(self.activate(x.reshape(-1, x.shape[-1])), self)
        return y.reshape(*x.shape[:-1], -1)


def project(x: Activation, *linears: Linear) -> tuple[jax.Array, ...]:
    """Runs one linear, or several of one width on the same rows; one matmul if alike."""
    if len({each.adapter_shape for each in linears}) > 1:
        return tuple(out for each in linears for out in project(x, each))
    weights = join_weights(*linears)
    return linear(x, weights, groups=len(linears), lora_scale=linears[0].lora_scale)


def project_through_gelu(x: Activation, first: Linear, second: Linear, *, name: str) -> jax.Array:
    """Runs two linears with a GELU between, of which remat may keep the input by its name."""
    weights = join_weights(first), join_weights(second)
    scales = first.lora_scale, second.lora_scale
    return linear_gelu_linear(x, *weights, lora_scales=scales, name=name)


def join_weights(*linears: Linear) -> LinearWeights:
    """Takes the arrays out of linears, those of several joined along the output."""

    def join(params: list[nnx.Param | None]) -> jax.Array | None:
        arrays = [param[...] for param in params if param is not None]
        if len(arrays) <= 1:
            return arrays[0] if arrays else None
        return jnp.concatenate(arrays, axis=0)

    scales = [each.weight_scale[...] for each in linears if each.weight_scale is not None]
    weight_OI = join([each.weight for each in linears])
    assert weight_OI is not None
    return LinearWeights(
        weight_OI=weight_OI,
        scale_G=jnp.stack(scales) if scales else None,
        bias_O=join([each.bias for each in linears]),
        lora_A=join([each.lora_A for each in linears]),
        lora_B=join([each.lora_B for each in linears]),
    )


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

    def rotate(self, x_ND: jax.Array, rope: Rope | None) -> jax.Array:
        """Normalises rows and rotates them, see ``fused.norm_rope``."""
        return norm_rope(x_ND, self.weight[...], rope, eps=self.eps)
