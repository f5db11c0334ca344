"""Prodigy: AdamW that estimates its own step size (Mishchenko and Defazio 2023, arXiv 2306.06101).

d, a lower bound of the distance from the first parameters to a solution, grows as gradients show
that it was too small; the learning rate only multiplies it and is usually 1. One d serves all
parameters, so all of them have to be updated together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any  # of arrays


class ProdigyState(NamedTuple):
    """What Prodigy remembers; sums are of the authors' implementation, scaled by 1 / d0."""

    step: jax.Array  # int32, steps done
    exp_avg: Tree
    exp_avg_sq: Tree
    grad_sum: Tree  # s
    first: Tree  # parameters before the first step
    d: jax.Array
    numerator: jax.Array


def prodigy(
    schedule: optax.Schedule,
    *,
    betas: tuple[float, float],
    beta3: float | None,
    eps: float,
    d0: float,
    d_coef: float,
    growth_rate: float | None,
    weight_decay: float,
    decays: Any,
    bias_correction: bool,
    safeguard_warmup: bool,
) -> optax.GradientTransformation:
    """Makes the optimizer; float32 throughout, whatever the parameters are.

    Args:
        schedule: factor on d, usually around 1.
        betas: of the averages of the gradient and of its square.
        beta3: of the sums behind d, sqrt(beta2) if None.
        eps: added to the root of the second average, times d.
        d0: first d, too small by intention.
        d_coef: factor on the estimate.
        growth_rate: d becomes at most so many times larger in a step, None for any.
        weight_decay: decoupled, in proportion to d * schedule.
        decays: function from the parameters to a tree of bool, which of them decay.
        bias_correction: as in Adam; off in the authors' default.
        safeguard_warmup: leave the schedule out of the estimate of d.
    """
    beta1, beta2 = betas
    decay = beta2**0.5 if beta3 is None else beta3

    def init(params: Tree) -> ProdigyState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return ProdigyState(
            jnp.zeros((), jnp.int32),
            zeros,
            jax.tree.map(jnp.copy, zeros),
            jax.tree.map(jnp.copy, zeros),
            jax.tree.map(lambda p: jnp.array(p, jnp.float32), params),
            jnp.float32(d0),
            jnp.zeros((), jnp.float32),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Tree, ProdigyState]:
        assert params is not None, "Prodigy measures how far the parameters have come"
        count = state.step + 1
        d, lr = state.d, jnp.asarray(schedule(state.step), jnp.float32)
        if bias_correction:
            lr = lr * jnp.sqrt(1 - beta2**count) / (1 - beta1**count)
        step_size = d * lr
        grads, params = jax.tree.map(lambda x: x.astype(jnp.float32), (updates, params))
        moved = jax.tree.map(lambda g, p, first: jnp.vdot(g, first - p), grads, params, state.first)
        numerator = decay * state.numerator + (d / d0) * step_size * sum(jax.tree.leaves(moved))
        weight = (d / d0) * (d if safeguard_warmup else step_size)
        grad_sum = jax.tree.map(lambda s, g: decay * s + weight * g, state.grad_sum, grads)
        denominator = sum(jnp.abs(s).sum() for s in jax.tree.leaves(grad_sum))
        # Without any gradient yet nothing is learnt of d, and 0 / 0 would end the run.
        estimate = d_coef * numerator / jnp.where(denominator == 0, 1.0, denominator)
        new_d = jnp.maximum(d, estimate)
        if growth_rate is not None:
            new_d = jnp.minimum(new_d, d * growth_rate)
        exp_avg = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * d * g, state.exp_avg, grads)
        exp_avg_sq = jax.tree.map(
            lambda v, g: beta2 * v + (1 - beta2) * jnp.square(d * g), state.exp_avg_sq, grads
        )

        def change(m: jax.Array, v: jax.Array, p: jax.Array, does_decay: bool) -> jax.Array:
            adam = m / (jnp.sqrt(v) + new_d * eps)
            return -step_size * (adam + weight_decay * p if does_decay else adam)

        updates = jax.tree.map(change, exp_avg, exp_avg_sq, params, decays(params))
        new_state = ProdigyState(
            count, exp_avg, exp_avg_sq, grad_sum, state.first, new_d, numerator
        )
        return updates, new_state

    return optax.GradientTransformation(init, update)
