"""The steps of a block between its attentions, each one pass over memory, with its gradient.

Every step exists twice: as plain JAX (``*_twin``), which says what is meant and is what other
devices and float32 models run, and as a GPU kernel (``kernels.py``) for bfloat16 activations.
Rows are tokens: [N, D] with N = B * L. A table [M, D] has one row for each N / M rows in turn (a
modulation has one a latent frame, a norm's weight has one row).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from wan22_jax.model import kernels
from wan22_jax.model.fp8 import (
    BACKWARD,
    FORWARD,
    float8_matmul,
    is_float8,
    power_of_two_scale,
)
from wan22_jax.model.lora import LowRank
from wan22_jax.model.rope import apply_rope

Table = jax.Array
Rope = tuple[jax.Array, jax.Array]


class Activation(NamedTuple):
    """The input of a linear: rows, and the same rows in float8 if its weight is."""

    rows: jax.Array
    float8: jax.Array | None = None  # rows = float8 * scale; padded with rows to ignore
    scale: jax.Array | None = None  # one a row


def residual_norm(
    x_ND: jax.Array,
    branch_ND: jax.Array | None,
    gate_MD: Table | None,
    weight_MD: Table,
    shift_MD: Table,
    *,
    eps: float,
    dtype: DTypeLike,
    quantize: bool,
) -> tuple[jax.Array, Activation]:
    """Adds a branch to the residual stream and normalises the sum for the next branch.

    Args:
        x_ND: residual stream.
        branch_ND: output of the branch before, None at the start of a block.
        gate_MD: what the branch is multiplied with, None for 1.
        weight_MD: what the layer-normed rows are multiplied with, float32.
        shift_MD: what is added then, float32.
        eps: of the norm.
        dtype: of the returned activation.
        quantize: give the activation in float8 too.

    Returns:
        The residual stream in its dtype, and layer_norm(it) * weight + shift.
    """
    static = (eps, jnp.dtype(dtype), quantize)
    function: Any = _residual_norm if _has_kernels(dtype, x_ND.shape[1]) else residual_norm_twin
    x_ND, *activation = function(static, x_ND, branch_ND, gate_MD, weight_MD, shift_MD)
    return x_ND, Activation(*activation)


def residual_norm_twin(
    static: tuple[float, DTypeLike, bool],
    x_ND: jax.Array,
    branch_ND: jax.Array | None,
    gate_MD: Table | None,
    weight_MD: Table,
    shift_MD: Table,
) -> tuple[jax.Array, ...]:
    """Plain JAX of ``residual_norm``; (x, y) or (x, y, float8, scale)."""
    eps, dtype, quantize = static
    if branch_ND is not None:
        x_ND = add_gated(x_ND, branch_ND, gate_MD)
    y_ND = layer_norm(x_ND, eps=eps) * spread(weight_MD, x_ND) + spread(shift_MD, x_ND)
    y_ND = y_ND.astype(dtype)
    return (x_ND, y_ND, *(quantize_rows_twin([y_ND], None, dtype=FORWARD) if quantize else ()))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _residual_norm(static: tuple, *args: Any) -> tuple[jax.Array, ...]:
    return _residual_norm_forward(static, *args)[0]


def _residual_norm_forward(static: tuple, *args: Any) -> tuple:
    eps, dtype, quantize = static
    out = kernels.residual_norm(*args, eps=eps, dtype=dtype, quantize=quantize)
    out = out if args[1] is not None else (args[0], *out)
    return out, (out[0], args)


def _residual_norm_backward(static: tuple, saved: tuple, grads: tuple) -> tuple:
    out_ND, args = saved
    eps, _, _ = static
    _, branch_ND, gate_MD, weight_MD, _ = args
    dtype = None if branch_ND is None else branch_ND.dtype
    dx = kernels.residual_norm_backward(
        out_ND, grads[1], grads[0], gate_MD, weight_MD, eps=eps, dtype=dtype
    )
    # Not computed in LoRA training, where nothing asks for them.
    twin = partial(residual_norm_twin, (*static[:2], False), *args[:2])
    _, pull = jax.vjp(twin, *args[2:])
    return (dx[0], dx[1] if len(dx) > 1 else None, *pull(grads[:2]))


_residual_norm.defvjp(_residual_norm_forward, _residual_norm_backward)


def norm_rope(x_ND: jax.Array, weight_D: jax.Array, rope: Rope | None, *, eps: float) -> jax.Array:
    """RMS norm over the whole width, then the rotation of each head's channel pairs.

    Args:
        x_ND: queries or keys of all heads.
        weight_D: of the norm.
        rope: ``rope_tables`` of the L tokens that the N rows repeat, None to leave it out.
        eps: of the norm.
    """
    fused = _has_kernels(x_ND.dtype, x_ND.shape[1])
    return (_norm_rope if fused else norm_rope_twin)(eps, x_ND, weight_D, rope)


def norm_rope_twin(
    eps: float, x_ND: jax.Array, weight_D: jax.Array, rope: Rope | None
) -> jax.Array:
    """Plain JAX of ``norm_rope``."""
    x32_ND = x_ND.astype(jnp.float32)
    rstd_N1 = jax.lax.rsqrt(jnp.mean(x32_ND * x32_ND, axis=-1, keepdims=True) + eps)
    y_ND = (x32_ND * rstd_N1).astype(x_ND.dtype) * weight_D.astype(x_ND.dtype)[None]
    if rope is None:
        return y_ND
    L, P = rope[0].shape
    y_BLHK = y_ND.reshape(-1, L, y_ND.shape[1] // (2 * P), 2 * P)
    return apply_rope(y_BLHK, *rope).reshape(y_ND.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_rope(eps: float, x_ND: jax.Array, weight_D: jax.Array, rope: Rope | None) -> jax.Array:
    return kernels.norm_rope(x_ND, weight_D, rope, eps=eps)


def _norm_rope_forward(eps: float, *args: Any) -> tuple:
    return _norm_rope(eps, *args), args


def _norm_rope_backward(eps: float, args: tuple, grad_ND: jax.Array) -> tuple:
    x_ND, weight_D, rope = args
    _, pull = jax.vjp(partial(norm_rope_twin, eps, x_ND), weight_D, rope)  # as above
    return kernels.norm_rope_backward(x_ND, grad_ND, weight_D, rope, eps=eps), *pull(grad_ND)


_norm_rope.defvjp(_norm_rope_forward, _norm_rope_backward)


def gelu_twin(x_NF: jax.Array, *, quantize: bool) -> tuple[jax.Array, ...]:
    """The tanh approximation of GELU, in x's dtype and, if asked for, in float8 too."""
    x32_NF = x_NF.astype(jnp.float32)
    inner_NF = np.sqrt(2 / np.pi) * (x32_NF + 0.044715 * x32_NF * x32_NF * x32_NF)
    y_NF = (x32_NF * jax.nn.sigmoid(2 * inner_NF)).astype(x_NF.dtype)  # (1 + tanh) / 2, exactly
    return (y_NF, *(quantize_rows_twin([y_NF], None, dtype=FORWARD) if quantize else ()))


def gelu_backward_twin(
    x_NF: jax.Array, dy_NF: jax.Array, scale_1: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Returns gelu(x) again and its gradient by x, and that times a scale in float8 too."""
    (y_NF,), pull = jax.vjp(partial(gelu_twin, quantize=False), x_NF)
    (dx_NF,) = pull((dy_NF,))
    if scale_1 is None:
        return y_NF, dx_NF
    return y_NF, dx_NF, *quantize_rows_twin([dx_NF], scale_1, dtype=BACKWARD)


def activate(x_ND: jax.Array, *, is_float8: bool) -> Activation:
    """Gives rows in float8 too, if asked for; the gradient goes through the rows alone."""
    if not is_float8:
        return Activation(x_ND)
    fixed_ND = jax.lax.stop_gradient(x_ND)
    return Activation(x_ND, *_quantize_rows([fixed_ND], None, dtype=FORWARD))


def quantize_rows_twin(
    parts: Sequence[jax.Array], scale_G: jax.Array | None, *, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Joins the parts along columns, each times its scale, and gives each row a scale."""
    x_ND = jax.lax.stop_gradient(jnp.concatenate(parts, axis=1).astype(jnp.float32))
    if scale_G is not None:
        x_ND = x_ND * jnp.repeat(scale_G, parts[0].shape[1])[None]
    scale_N = power_of_two_scale(jnp.max(jnp.abs(x_ND), axis=1), dtype)
    return (x_ND / scale_N[:, None]).astype(dtype), scale_N


def _quantize_rows(
    parts: Sequence[jax.Array], scale_G: jax.Array | None, *, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    fused = all(_has_kernels(part.dtype, part.shape[1]) for part in parts)
    function: Callable = kernels.quantize_rows if fused else quantize_rows_twin
    return function(parts, scale_G, dtype=dtype)


class LinearWeights(NamedTuple):
    """One linear, or several of one input and the same width, joined along the output."""

    weight_OI: jax.Array  # float8_e4m3fn with a scale, or a wider type without
    scale_G: jax.Array | None  # one a group
    bias_O: jax.Array | None
    lora: LowRank | None = None  # in the activations' dtype
    trained: LowRank | None = None  # what it was rounded from: not read, but gets the gradient

    @property
    def is_float8(self) -> bool:
        """Whether the input is wanted in float8 too."""
        return self.scale_G is not None


def linear(x: Activation, weights: LinearWeights, *, groups: int = 1) -> tuple[jax.Array, ...]:
    """Returns x W^T + b + (x A^T) B^T, in x's dtype: [N, O / groups] a group.

    With a float8 weight the first product is float8, forward with e4m3 and backward with e5m2;
    the adapter's products are in x's dtype. Sums are in float32 and rounded once.
    """
    return _linear(groups, x, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(groups: int, x: Activation, w: LinearWeights) -> tuple[jax.Array, ...]:
    return _linear_forward(groups, x, w)[0]


def _linear_forward(groups: int, x: Activation, w: LinearWeights) -> tuple:
    assert (w.lora is None) == (w.trained is None), "an adapter's gradient needs its trained copy"
    # The barrier has all blocks' rows of a stack cast and copied at once, in a few kernels. Without
    # it XLA copies them one by one for the backward pass and lets this matmul read the stack.
    w = w._replace(lora=jax.lax.optimization_barrier(w.lora), trained=None)
    low_NR, matrices_b = None, (None,) * groups
    if w.lora is not None:
        low_NR = checkpoint_name(matmul(x.rows, w.lora.matrix_a.T), "low_rank")
        matrices_b = w.lora.matrices_b
    rows = x.float8 if w.is_float8 else x.rows
    assert rows is not None
    outs = multiply_add(
        *(rows, w.weight_OI, x.scale, w.scale_G, w.bias_O, low_NR, matrices_b),
        num_rows=x.rows.shape[0],
        transposed=True,
    )
    return outs, (x, w, low_NR)


def _linear_backward(
    groups: int, saved: tuple, grads: tuple, *quantized: jax.Array
) -> tuple[Activation, LinearWeights]:
    """The gradients; ``quantized`` are those of the outputs in float8, if someone has them."""
    x, w, low_NR = saved
    dx_NI, dlow_NR = _input_gradient(w, grads, *quantized)
    zeros = (None if leaf is None else jnp.zeros_like(leaf) for leaf in x[1:])
    weights = _weight_gradients(groups, x.rows, w, low_NR, dlow_NR, grads)
    return Activation(dx_NI, *zeros), weights


def _input_gradient(
    w: LinearWeights, grads: tuple, *quantized: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The gradients of the rows and of their products with A."""
    grad_scale = dlow_NR = matrix_a = None
    if w.is_float8:
        grad_NO, grad_scale = quantized or _quantize_rows(grads, w.scale_G, dtype=BACKWARD)
    else:
        grad_NO = jnp.concatenate(grads, axis=1)
    if w.lora is not None:
        matrix_a, matrices_b = w.lora
        dlow = [matmul(grad, b) for grad, b in zip(grads, matrices_b, strict=True)]
        dlow_NR = jnp.concatenate(dlow, axis=1)
    (dx_NI,) = multiply_add(
        *(grad_NO, w.weight_OI.T, grad_scale, None, None, dlow_NR, (matrix_a,)),
        num_rows=grads[0].shape[0],
        transposed=False,
    )
    return dx_NI, dlow_NR


def _weight_gradients(
    groups: int,
    rows_NI: jax.Array,
    w: LinearWeights,
    low_NR: jax.Array | None,
    dlow_NR: jax.Array | None,
    grads: tuple,
) -> LinearWeights:
    dweight, dbias, dlora, dtrained = jnp.zeros_like(w.weight_OI), None, None, None
    if not w.is_float8:
        dweight = matmul(jnp.concatenate(grads, axis=1).T, rows_NI, jnp.float32)
        dweight = dweight.astype(w.weight_OI.dtype)
    if w.bias_O is not None:
        dbias = jnp.concatenate([g.astype(jnp.float32).sum(axis=0) for g in grads])
        dbias = dbias.astype(w.bias_O.dtype)
    if low_NR is not None and dlow_NR is not None:
        da = matmul(dlow_NR.T, rows_NI, jnp.float32)
        # Of all groups at once: as fast as of one, whose columns would have to be copied first.
        db = [jnp.split(matmul(grad.T, low_NR, jnp.float32), groups, axis=1) for grad in grads]
        dtrained = LowRank(da, tuple(each[group] for group, each in enumerate(db)))
        dlora = jax.tree.map(jnp.zeros_like, w.lora)
    dscale = None if w.scale_G is None else jnp.zeros_like(w.scale_G)
    return LinearWeights(dweight, dscale, dbias, dlora, dtrained)


_linear.defvjp(_linear_forward, _linear_backward)


def linear_gelu_linear(
    x: Activation, first: LinearWeights, second: LinearWeights, *, name: str
) -> jax.Array:
    """``linear`` on gelu(``linear`` on x), differentiated as one.

    The backward pass needs the first linear's output alone, which it finds under ``name``. It
    reads that once, with its gradient, to take the GELU again and differentiate it, and quantises
    the result on the way. Three gradients could not: JAX hands one array an output from each to
    the next, so that the first linear would read its gradient again to quantise it.
    """
    return _linear_gelu_linear(name, x, first, second)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_gelu_linear(name: str, *args: Any) -> jax.Array:
    return _linear_gelu_linear_forward(name, *args)[0]


def _linear_gelu_linear_forward(
    name: str, x: Activation, first: LinearWeights, second: LinearWeights
) -> tuple:
    (hidden_NF,), saved = _linear_forward(1, x, first)
    hidden_NF = checkpoint_name(hidden_NF, name)
    fused = _has_kernels(hidden_NF.dtype, hidden_NF.shape[1])
    gelu: Callable = kernels.gelu_quantize if fused else gelu_twin
    rows = Activation(*gelu(hidden_NF, quantize=second.is_float8))
    (out_NO,), (_, second, low_NR) = _linear_forward(1, rows, second)
    return out_NO, (saved, hidden_NF, second, low_NR)


def _linear_gelu_linear_backward(name: str, saved: tuple, grad_NO: jax.Array) -> tuple:
    del name
    saved_first, hidden_NF, second, low_NR = saved
    _, first, _ = saved_first
    # Where low is computed again it reads the hidden rows, whose memory gelu_backward takes.
    hidden_NF, low_NR = jax.lax.optimization_barrier((hidden_NF, low_NR))
    grad_NF, dlow_NR = _input_gradient(second, (grad_NO,))
    fused = _has_kernels(hidden_NF.dtype, hidden_NF.shape[1])
    gelu_backward: Callable = kernels.gelu_backward if fused else gelu_backward_twin
    rows_NF, grad_NF, *quantized = gelu_backward(hidden_NF, grad_NF, first.scale_G)
    dsecond = _weight_gradients(1, rows_NF, second, low_NR, dlow_NR, (grad_NO,))
    return *_linear_backward(1, saved_first, (grad_NF,), *quantized), dsecond


_linear_gelu_linear.defvjp(_linear_gelu_linear_forward, _linear_gelu_linear_backward)


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
    if is_float8(weight_OI.dtype):
        raw_NO = float8_matmul(x_NI, weight_OI)
    else:
        raw_NO = matmul(x_NI, weight_OI.T)
    width = raw_NO.shape[1] // len(highs)
    columns = [slice(start, start + width) for start in range(0, raw_NO.shape[1], width)]
    if low_NR is None and row_scale_N is None:  # nothing that the matmul cannot add itself
        raw_NO = raw_NO if bias_O is None else raw_NO + bias_O.astype(raw_NO.dtype)[None]
        return tuple(raw_NO[:, group] for group in columns)
    fused = _has_kernels(raw_NO.dtype, width)
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


def add_gated(x_ND: jax.Array, branch_ND: jax.Array, gate_MD: Table | None) -> jax.Array:
    """Returns x + gate * branch, summed in float32, in x's dtype."""
    branch32_ND = branch_ND.astype(jnp.float32)
    if gate_MD is not None:
        branch32_ND = branch32_ND * spread(gate_MD, x_ND)
    return (x_ND.astype(jnp.float32) + branch32_ND).astype(x_ND.dtype)


def matmul(x: jax.Array, y: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Returns x y in x's dtype; float32 means float32 on a GPU too, not TF32."""
    return jnp.matmul(
        x,
        y.astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=out_dtype or x.dtype,
    )


def layer_norm(x: jax.Array, *, eps: float) -> jax.Array:
    """Normalises the last axis without weights; computed and returned in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


def spread(table_MD: Table, x_ND: jax.Array) -> jax.Array:
    """Repeats each row of a table for its rows of x."""
    M, D = table_MD.shape
    repeated = jnp.broadcast_to(table_MD[:, None], (M, x_ND.shape[0] // M, D))
    return repeated.reshape(x_ND.shape)


def _has_kernels(dtype: DTypeLike, width: int) -> bool:
    gpu = jax.default_backend() == "gpu"
    return gpu and jnp.dtype(dtype) == jnp.bfloat16 and kernels.fits(width)
