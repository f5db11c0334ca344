"""Matrix products of a block, with what is added to them: which kernels compute them?"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from wan22_jax.model import hopper_matmul, kernels
from wan22_jax.model.fp8 import float8_matmul, is_float8
from wan22_jax.model.fused import has_kernels


def multiply_add(
    x_NI: jax.Array,
    weight_OI: jax.Array,
    row_scale_N: jax.Array | None,
    scale_G: jax.Array | None,
    bias_O: jax.Array | None,
    low_NR: jax.Array | None,
    highs: Sequence[jax.Array | None],
    *,
    num_rows: int,
    transposed: bool,
) -> tuple[jax.Array, ...]:
    """Returns x W^T * row_scale * scale + bias + low high(^T): columns of O / G for each high.

    On Hopper one kernel computes all of it where it can, elsewhere two: the matmul's result is
    rounded in between.

    Args:
        x_NI: both this and the weight are float8, or neither is. Rows after ``num_rows`` and their
            scales may hold anything.
        weight_OI: see there.
        row_scale_N: one a row of x, None for 1.
        scale_G: one a group of columns, None for 1.
        bias_O: None for 0.
        low_NR: [num_rows, G * R] in the result's dtype, None for 0.
        highs: [O / G, R] a group if transposed, else [R, O].
        num_rows: of the result.
        transposed: whether the highs are.
    """
    num_cores = hopper_matmul.count_cores(jax.default_backend())
    if num_cores and hopper_matmul.fits(
        x_NI, weight_OI, low_NR, groups=len(highs), num_cores=num_cores
    ):
        return hopper_matmul.multiply_add(
            *(x_NI, weight_OI, row_scale_N, scale_G, bias_O, low_NR, highs),
            num_rows=num_rows,
            transposed=transposed,
            num_cores=num_cores,
        )
    return multiply_then_add(
        *(x_NI, weight_OI, row_scale_N, scale_G, bias_O, low_NR, highs),
        num_rows=num_rows,
        transposed=transposed,
    )


def multiply_then_add(
    x_NI: jax.Array,
    weight_OI: jax.Array,
    row_scale_N: jax.Array | None,
    scale_G: jax.Array | None,
    bias_O: jax.Array | None,
    low_NR: jax.Array | None,
    highs: Sequence[jax.Array | None],
    *,
    num_rows: int,
    transposed: bool,
) -> tuple[jax.Array, ...]:
    """``multiply_add`` in two kernels."""
    if is_float8(weight_OI.dtype):
        raw_NO = float8_matmul(x_NI, weight_OI)
    else:
        raw_NO = matmul(x_NI, weight_OI.T)
    width = raw_NO.shape[1] // len(highs)
    columns = [slice(start, start + width) for start in range(0, raw_NO.shape[1], width)]
    if low_NR is None and row_scale_N is None:  # nothing that the matmul cannot add itself
        raw_NO = raw_NO if bias_O is None else raw_NO + bias_O.astype(raw_NO.dtype)[None]
        return tuple(raw_NO[:, group] for group in columns)
    fused = has_kernels(raw_NO.dtype, width)
    scale_add_low_rank = kernels.scale_add_low_rank if fused else scale_add_low_rank_twin
    return tuple(
        scale_add_low_rank(
            *(raw_NO, row_scale_N, scale_G, bias_O, low_NR, high),
            num_rows=num_rows,
            columns=group,
            transposed=transposed,
        )
        for group, high in zip(columns, highs, strict=True)
    )


def scale_add_low_rank_twin(
    raw: jax.Array,
    row_scale: jax.Array | None,
    scale_G: jax.Array | None,
    bias: jax.Array | None,
    low: jax.Array | None,
    high: jax.Array | None,
    *,
    num_rows: int,
    columns: slice,
    transposed: bool,
) -> jax.Array:
    """Some rows of raw, and one group's columns: raw * row_scale * scale + bias + low high(^T).

    Scales, bias and low are those of all groups, high is the group's.
    """
    group = columns.start // (columns.stop - columns.start)
    out = raw[:num_rows, columns].astype(jnp.float32)
    if row_scale is not None:
        out = out * row_scale[:num_rows, None]
    if scale_G is not None:
        out = out * scale_G[group]
    if bias is not None:
        out = out + bias[None, columns].astype(jnp.float32)
    if low is not None and high is not None:
        high = high.T if transposed else high
        rank = high.shape[0]
        out = out + matmul(low[:, group * rank : (group + 1) * rank], high, jnp.float32)
    return out.astype(raw.dtype)


def matmul(x: jax.Array, y: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Returns x y in x's dtype; float32 means float32 on a GPU too, not TF32."""
    return jnp.matmul(
        x,
        y.astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=out_dtype or x.dtype,
    )
