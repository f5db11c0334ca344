"""What do adapters add whose rows are dropped out, and what are its gradients?

Beside the fused path of ``linear.py``, where weight and adapter read the same rows. Each of several
joined linears has a mask of its own, as if they were apart.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from wan22_jax.model.lora import Dropout, LowRank
from wan22_jax.model.matmul import matmul


def add_dropped(
    outs: tuple[jax.Array, ...],
    rows_NI: jax.Array,
    lora: LowRank,
    trained: LowRank,
    dropout: Dropout,
) -> tuple[jax.Array, ...]:
    """Adds (drop(x) A^T) B^T to the output of each of some joined linears.

    Args:
        outs: what the weights make of the rows, [N, O] a linear.
        rows_NI: x, in the dtype that adapters compute in.
        lora: rounded to it.
        trained: what it was rounded from, which gets the gradient.
        dropout: of the first linear; ``at`` gives that of the others.
    """
    groups = len(outs)
    ranked_a = jnp.split(lora.matrix_a, groups)
    trained_a = jnp.split(trained.matrix_a, groups)
    added = []
    for group, out_NO in enumerate(outs):
        high_NO = _low_rank(
            dropout.at(group).drop(rows_NI),
            (ranked_a[group], lora.matrices_b[group]),
            (trained_a[group], trained.matrices_b[group]),
        )
        total_NO = out_NO.astype(jnp.float32) + high_NO.astype(jnp.float32)
        added.append(total_NO.astype(out_NO.dtype))
    return tuple(added)


Pair = tuple[jax.Array, jax.Array]  # A [R, in] and B [out, R]


@jax.custom_vjp
def _low_rank(rows_NI: jax.Array, rounded: Pair, trained: Pair) -> jax.Array:
    return _forward(rows_NI, rounded, trained)[0]


def _forward(rows_NI: jax.Array, rounded: Pair, trained: Pair) -> tuple:
    del trained
    a_RI, b_OR = rounded
    low_NR = checkpoint_name(matmul(rows_NI, a_RI.T), "low_rank")
    return matmul(low_NR, b_OR.T), (rows_NI, rounded, low_NR)


def _backward(saved: tuple, grad_NO: jax.Array) -> tuple:
    rows_NI, (a_RI, b_OR), low_NR = saved
    dlow_NR = matmul(grad_NO, b_OR)
    dtrained = matmul(dlow_NR.T, rows_NI, jnp.float32), matmul(grad_NO.T, low_NR, jnp.float32)
    zeros = jnp.zeros_like(a_RI), jnp.zeros_like(b_OR)
    return matmul(dlow_NR, a_RI), zeros, dtrained


_low_rank.defvjp(_forward, _backward)
