"""The exponential average of what trains, in float32: how it starts and what a step makes of it."""

import jax
import jax.numpy as jnp

from wan22_jax.training.full import Trainable


def start_ema(trainable: Trainable) -> Trainable:
    """Copies weights to average from: a decay near 1 would be lost in 16 bits."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trainable)


def update_ema(ema: Trainable, trainable: Trainable, *, decay: float) -> Trainable:
    """Returns decay * ema + (1 - decay) * trainable, leaf by leaf."""
    return jax.tree.map(
        lambda old, new: old + (1 - decay) * (new.astype(jnp.float32) - old), ema, trainable
    )
