"""Attention: softmax(q k^T / sqrt(K)) v, by the fastest implementation that is exact here."""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

log = logging.getLogger(__name__)


def attend(
    q_BLHK: Float[Array, "B L H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHK: Float[Array, "B S H K"],
    *,
    name: str = "attention",
) -> Float[Array, "B L H K"]:
    """Attends without a mask; the softmax is in float32, the result in q's dtype.

    cuDNN's fused kernel on NVIDIA GPUs for 16-bit inputs; elsewhere XLA, in float32, which holds
    the L x S matrix. ``name`` is the result's for a remat policy; cuDNN's is chosen by what
    primitive it comes from, with the softmax statistics that its backward pass wants.
    """
    if attention_backend(jax.default_backend(), q_BLHK.dtype.name, q_BLHK.shape[-1]) == "cudnn":
        return attend_even(q_BLHK, k_BSHK, v_BSHK, implementation="cudnn")
    q_BLHK32, k_BSHK32, v_BSHK32 = (x.astype(jnp.float32) for x in (q_BLHK, k_BSHK, v_BSHK))
    with jax.default_matmul_precision("highest"):
        out_BLHK = jax.nn.dot_product_attention(q_BLHK32, k_BSHK32, v_BSHK32, implementation="xla")
    return checkpoint_name(out_BLHK.astype(q_BLHK.dtype), name)


def attend_even(
    q_BLHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    *,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """Attends with a row of zeros more where there is an odd number of them, and masks that row.

    Of an odd number, JAX refuses to differentiate cuDNN's kernel.
    """
    (B, L), S = q_BLHK.shape[:2], k_BSHK.shape[1]
    lengths: dict[str, Any] = {}
    if S % 2:
        lengths = {
            "query_seq_lengths": jnp.full(B, L, jnp.int32),
            "key_value_seq_lengths": jnp.full(B, S, jnp.int32),
        }
    q_BLHK, k_BSHK, v_BSHK = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_BLHK, k_BSHK, v_BSHK)
    )
    out_BLHK = jax.nn.dot_product_attention(
        q_BLHK, k_BSHK, v_BSHK, implementation=implementation, **lengths
    )
    return out_BLHK[:, :L]


@functools.cache
def attention_backend(platform: str, dtype: str, head_dim: int) -> str:
    """Chooses "cudnn" or "xla", and says so once for each combination."""
    fused = platform == "gpu" and dtype in ("bfloat16", "float16")
    fused = fused and head_dim % 8 == 0 and head_dim <= 128
    backend = "cudnn" if fused else "xla"
    log.info("attention: %s (%s, %s, head dim %d)", backend, platform, dtype, head_dim)
    return backend
