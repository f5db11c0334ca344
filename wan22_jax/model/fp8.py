"""8-bit floats: what a float8 number stands for here, and products of them.

A weight matrix is stored as float8_e4m3fn with one scale; an activation gets one scale a row when
it is quantised, e4m3 on the way forward and e5m2 (more range, less precision) for gradients.
All scales are powers of two: scaling is exact, so a product of float8 numbers is the same number
on a GPU with float8 matmuls and, converted to bfloat16, on any other machine. Formats:
Micikevicius et al. 2022, "FP8 formats for deep learning".
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

log = logging.getLogger(__name__)

FORWARD = jnp.float8_e4m3fn
BACKWARD = jnp.float8_e5m2


def is_float8(dtype: DTypeLike) -> bool:
    """Whether weights of this dtype need a scale."""
    return jnp.dtype(dtype) == FORWARD


def quantize_weight(weight: Float[Array, "*N O I"]) -> tuple[jax.Array, Float[Array, "*N"]]:
    """Returns e4m3 and its scale, one a matrix; weight = e4m3 * scale up to e4m3's rounding."""
    weight = weight.astype(jnp.float32)
    scale = power_of_two_scale(jnp.max(jnp.abs(weight), axis=(-2, -1)), FORWARD)
    return (weight / scale[..., None, None]).astype(FORWARD), scale


def power_of_two_scale(amax: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """The smallest power of two s with amax / s in the range of the dtype; 1 if amax is 0."""
    bits = jax.lax.bitcast_convert_type(amax * (1 / float(jnp.finfo(dtype).max)), jnp.int32)
    scale = jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(amax == 0, 1.0, jnp.maximum(scale, 2.0**-100))


def float8_matmul(x_NK: jax.Array, weight_OK: jax.Array) -> jax.Array:
    """Returns x weight^T of two float8 matrices in bfloat16, accumulated in float32."""
    if not has_float8_matmul(jax.default_backend()):
        x_NK, weight_OK = x_NK.astype(jnp.bfloat16), weight_OK.astype(jnp.bfloat16)
    contract_last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_NK, weight_OK, contract_last, preferred_element_type=jnp.bfloat16)


@functools.cache
def has_float8_matmul(platform: str) -> bool:
    """Whether the first device multiplies float8 (compute capability 8.9); says so if not."""
    device = jax.local_devices()[0]
    capability = float(getattr(device, "compute_capability", "0")) if platform == "gpu" else 0.0
    if capability < 8.9:
        log.info("float8: %s has no float8 matmuls, bfloat16 ones are used", device.device_kind)
    return capability >= 8.9
