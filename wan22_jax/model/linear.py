"""The linears of a block with their adapters, and the gradients of both.

x W^T + b + (x A^T) B^T, several linears that read the same rows in one matmul, or two with a GELU
between them. The weight W is frozen and may be float8; what trains is A and B. Which kernels
multiply and add is said in ``matmul.py``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from wan22_jax.model import kernels
from wan22_jax.model.dropped import add_dropped
from wan22_jax.model.fp8 import BACKWARD
from wan22_jax.model.fused import (
    Activation,
    activate,
    gelu,
    gelu_backward_twin,
    gelu_twin,
    has_kernels,
    quantize_rows,
)
from wan22_jax.model.lora import Dropout, LowRank
from wan22_jax.model.matmul import matmul, multiply_add


class LinearWeights(NamedTuple):
    """One linear, or several of one input and the same width, joined along the output."""

    weight_OI: jax.Array  # float8_e4m3fn with a scale, or a wider type without
    scale_G: jax.Array | None  # one a group
    bias_O: jax.Array | None
    lora: LowRank | None = None  # in the activations' dtype
    trained: LowRank | None = None  # what it was rounded from: not read, but gets the gradient
    dropout: Dropout | None = None  # of what the adapter reads

    @property
    def is_float8(self) -> bool:
        """Whether the input is wanted in float8 too."""
        return self.scale_G is not None


def linear(x: Activation, weights: LinearWeights, *, groups: int = 1) -> tuple[jax.Array, ...]:
    """Returns x W^T + b + (x A^T) B^T, in x's dtype: [N, O / groups] a group.

    With a float8 weight the first product is float8, forward with e4m3 and backward with e5m2;
    the adapter's products are in x's dtype. Sums are in float32 and rounded once.
    """
    dropout, weights = weights.dropout, weights._replace(dropout=None)
    if dropout is None or weights.lora is None or weights.trained is None:
        return _linear(groups, x, weights)
    outs: Any = _linear(groups, x, weights._replace(lora=None, trained=None))
    return add_dropped(outs, x.rows, weights.lora, weights.trained, dropout)


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
        grad_NO, grad_scale = quantized or quantize_rows(grads, w.scale_G, dtype=BACKWARD)
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
        # Summed in float32 and rounded by the matmul itself: no float32 copy waits to be rounded.
        dweight = matmul(jnp.concatenate(grads, axis=1).T, rows_NI, w.weight_OI.dtype)
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
    x: Activation, first: LinearWeights, second: LinearWeights, *, name: str, rows: bool = True
) -> jax.Array:
    """``linear`` on gelu(``linear`` on x), differentiated as one.

    The backward pass needs the first linear's output alone, which it finds under ``name``. It
    reads that once, with its gradient, to take the GELU again and differentiate it, and quantises
    the result on the way. Three gradients could not: JAX hands one array an output from each to
    the next, so that the first linear would read its gradient again to quantise it. With dropout,
    whose adapters read other rows than the weights, they are three.

    Without ``rows`` the second linear gets its input in float8 alone, and there is no gradient.
    """
    if first.dropout is None and second.dropout is None:
        return _linear_gelu_linear((name, rows), x, first, second)
    (hidden_NF,) = linear(x, first)
    hidden_NF = checkpoint_name(hidden_NF, name)
    (rows_NF,) = gelu_twin(hidden_NF, quantize=False)
    return linear(activate(rows_NF, is_float8=second.is_float8), second)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_gelu_linear(static: tuple[str, bool], *args: Any) -> jax.Array:
    return _linear_gelu_linear_forward(static, *args)[0]


def _linear_gelu_linear_forward(
    static: tuple[str, bool], x: Activation, first: LinearWeights, second: LinearWeights
) -> tuple:
    name, rows = static
    (hidden_NF,), saved = _linear_forward(1, x, first)
    hidden_NF = checkpoint_name(hidden_NF, name)
    activation = Activation(*gelu(hidden_NF, quantize=second.is_float8, rows=rows))
    (out_NO,), (_, second, low_NR) = _linear_forward(1, activation, second)
    return out_NO, (saved, hidden_NF, second, low_NR)


def _linear_gelu_linear_backward(
    static: tuple[str, bool], saved: tuple, grad_NO: jax.Array
) -> tuple:
    del static
    saved_first, hidden_NF, second, low_NR = saved
    _, first, _ = saved_first
    # Where low is computed again it reads the hidden rows, whose memory gelu_backward takes.
    hidden_NF, low_NR = jax.lax.optimization_barrier((hidden_NF, low_NR))
    grad_NF, dlow_NR = _input_gradient(second, (grad_NO,))
    fused = has_kernels(hidden_NF.dtype, hidden_NF.shape[1])
    gelu_backward: Callable = kernels.gelu_backward if fused else gelu_backward_twin
    rows_NF, grad_NF, *quantized = gelu_backward(hidden_NF, grad_NF, first.scale_G)
    dsecond = _weight_gradients(1, rows_NF, second, low_NR, dlow_NR, (grad_NO,))
    return *_linear_backward(1, saved_first, (grad_NF,), *quantized), dsecond


_linear_gelu_linear.defvjp(_linear_gelu_linear_forward, _linear_gelu_linear_backward)
