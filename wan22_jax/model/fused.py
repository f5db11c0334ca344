"""The steps of a block between its matmuls, each one pass over memory, with its gradient.

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
from jax.typing import DTypeLike

from wan22_jax.model import kernels
from wan22_jax.model.fp8 import BACKWARD, FORWARD, power_of_two_scale
from wan22_jax.model.rope import apply_rope

Table = jax.Array
Rope = tuple[jax.Array, jax.Array]


class Activation(NamedTuple):
    """The input of a linear: rows, and the same rows in float8 if its weight is."""

    rows: jax.Array  # [N, 0] where nobody reads them but in float8
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
    rows: bool = True,
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
        rows: give it in ``dtype``; without them there is no gradient.

    Returns:
        The residual stream in its dtype, and layer_norm(it) * weight + shift.
    """
    static = (eps, jnp.dtype(dtype), quantize, rows)
    function: Any = _residual_norm if has_kernels(dtype, x_ND.shape[1]) else residual_norm_twin
    x_ND, *activation = function(static, x_ND, branch_ND, gate_MD, weight_MD, shift_MD)
    return x_ND, Activation(*activation)


def residual_norm_twin(
    static: tuple[float, DTypeLike, bool, bool],
    x_ND: jax.Array,
    branch_ND: jax.Array | None,
    gate_MD: Table | None,
    weight_MD: Table,
    shift_MD: Table,
) -> tuple[jax.Array, ...]:
    """Plain JAX of ``residual_norm``; (x, y) or (x, y, float8, scale)."""
    eps, dtype, quantize, rows = static
    if branch_ND is not None:
        x_ND = add_gated(x_ND, branch_ND, gate_MD)
    y_ND = layer_norm(x_ND, eps=eps) * spread(weight_MD, x_ND) + spread(shift_MD, x_ND)
    y_ND = y_ND.astype(dtype)
    quantized = quantize_rows_twin([y_ND], None, dtype=FORWARD) if quantize else ()
    return x_ND, y_ND if rows else y_ND[:, :0], *quantized


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _residual_norm(static: tuple, *args: Any) -> tuple[jax.Array, ...]:
    return _residual_norm_forward(static, *args)[0]


def _residual_norm_forward(static: tuple, *args: Any) -> tuple:
    eps, dtype, quantize, rows = static
    out = kernels.residual_norm(*args, eps=eps, dtype=dtype, quantize=quantize, rows=rows)
    out = out if args[1] is not None else (args[0], *out)
    if not rows:
        out = (out[0], jnp.zeros((len(out[0]), 0), dtype), *out[1:])
    return out, (out[0], args)


def _residual_norm_backward(static: tuple, saved: tuple, grads: tuple) -> tuple:
    out_ND, args = saved
    eps, *_ = static
    _, branch_ND, gate_MD, weight_MD, _ = args
    dtype = None if branch_ND is None else branch_ND.dtype
    dx = kernels.residual_norm_backward(
        out_ND, grads[1], grads[0], gate_MD, weight_MD, eps=eps, dtype=dtype
    )
    # Not computed in LoRA training, where nothing asks for them.
    twin = partial(residual_norm_twin, (*static[:2], False, True), *args[:2])
    _, pull = jax.vjp(twin, *args[2:])
    return (dx[0], dx[1] if branch_ND is not None else None, *pull(grads[:2]))


_residual_norm.defvjp(_residual_norm_forward, _residual_norm_backward)


def norm_rope(x_ND: jax.Array, weight_D: jax.Array, rope: Rope | None, *, eps: float) -> jax.Array:
    """RMS norm over the whole width, then the rotation of each head's channel pairs.

    Args:
        x_ND: queries or keys of all heads.
        weight_D: of the norm.
        rope: ``rope_tables`` of the L tokens that the N rows repeat, None to leave it out.
        eps: of the norm.
    """
    fused = has_kernels(x_ND.dtype, x_ND.shape[1])
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


def gelu(x_NF: jax.Array, *, quantize: bool, rows: bool = True) -> tuple[jax.Array, ...]:
    """The tanh approximation of GELU, in x's dtype (``rows``, else [N, 0]) and in float8 too."""
    if not has_kernels(x_NF.dtype, x_NF.shape[1]):
        y_NF, *quantized = gelu_twin(x_NF, quantize=quantize)
        return y_NF if rows else y_NF[:, :0], *quantized
    out = kernels.gelu_quantize(x_NF, quantize=quantize, rows=rows)
    return out if rows else (jnp.zeros((len(x_NF), 0), x_NF.dtype), *out)


def gelu_twin(x_NF: jax.Array, *, quantize: bool) -> tuple[jax.Array, ...]:
    """Plain JAX of ``gelu``."""
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
    return Activation(x_ND, *quantize_rows([fixed_ND], None, dtype=FORWARD))


def quantize_rows_twin(
    parts: Sequence[jax.Array], scale_G: jax.Array | None, *, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Joins the parts along columns, each times its scale, and gives each row a scale."""
    x_ND = jax.lax.stop_gradient(jnp.concatenate(parts, axis=1).astype(jnp.float32))
    if scale_G is not None:
        x_ND = x_ND * jnp.repeat(scale_G, parts[0].shape[1])[None]
    scale_N = power_of_two_scale(jnp.max(jnp.abs(x_ND), axis=1), dtype)
    return (x_ND / scale_N[:, None]).astype(dtype), scale_N


def quantize_rows(
    parts: Sequence[jax.Array], scale_G: jax.Array | None, *, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """See ``quantize_rows_twin``; a GPU pads the result with rows to ignore."""
    fused = all(has_kernels(part.dtype, part.shape[1]) for part in parts)
    function: Callable = kernels.quantize_rows if fused else quantize_rows_twin
    return function(parts, scale_G, dtype=dtype)


def add_gated(x_ND: jax.Array, branch_ND: jax.Array, gate_MD: Table | None) -> jax.Array:
    """Returns x + gate * branch, summed in float32, in x's dtype."""
    branch32_ND = branch_ND.astype(jnp.float32)
    if gate_MD is not None:
        branch32_ND = branch32_ND * spread(gate_MD, x_ND)
    return (x_ND.astype(jnp.float32) + branch32_ND).astype(x_ND.dtype)


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


def has_kernels(dtype: DTypeLike, width: int) -> bool:
    """Whether rows of this dtype and width are computed by ``kernels.py``."""
    gpu = jax.default_backend() == "gpu"
    return gpu and jnp.dtype(dtype) == jnp.bfloat16 and kernels.fits(width)
