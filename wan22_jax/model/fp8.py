"""How is a weight matrix kept in eight bits?

As float8_e4m3fn times one power of two per matrix: multiplying by it is exact in every float
type, so the value of a stored weight does not depend on where it is widened.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

E4M3 = jnp.float8_e4m3fn
_MAX_EXPONENT, _MAX_MANTISSA = 9, 0.875  # the largest e4m3 number, 448, is 0.875 * 2^9
_MIN_SCALE_EXPONENT = -126  # of a normal float32


def quantize_weight(
    weight: Float[Array, "*N O I"],
) -> tuple[Float[Array, "*N O I"], Float[Array, "*N"]]:
    """Returns the weight in float8_e4m3fn and its scales, float32; weight ~ values * scale.

    A scale is the smallest power of two that brings the largest magnitude of its matrix to 448 or
    below, 1 for a matrix of zeros; values are rounded to nearest, ties to even.
    """
    weight = weight.astype(jnp.float32)
    amax = jnp.max(jnp.abs(weight), axis=(-2, -1))
    mantissa, exponent = jnp.frexp(amax)
    exponent = exponent - _MAX_EXPONENT + (mantissa > _MAX_MANTISSA)
    exponent = jnp.where(amax == 0, 0, jnp.maximum(exponent, _MIN_SCALE_EXPONENT))
    scale = jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    return (weight / scale[..., None, None]).astype(E4M3), scale


def is_float8(dtype: DTypeLike) -> bool:
    """Whether this is the dtype of a weight that has a scale."""
    return jnp.dtype(dtype) == jnp.dtype(E4M3)
