"""Which weights are evaluated and exported: those that train, or an average of them?"""

import re
from collections.abc import Mapping

import jax
import numpy as np
from optax import contrib

from wan22_jax.training.step import Trainable, TrainState

_Z = re.compile(r"(?:.*?\.)?z\.(.*)\.value")  # of the schedule-free state, by the path of a weight
_B1 = re.compile(r"(?:.*\.)?b1")


def evaluation_weights(state: TrainState) -> Trainable:
    """Returns the weights that a state stands for: its own, but for a schedule-free optimizer.

    That one trains at y = (1 - b1) z + b1 x, and x, the average, is what it has learnt.
    """
    is_free = _is_schedule_free
    nodes = jax.tree.leaves(state.opt_state, is_leaf=is_free)
    for node in filter(is_free, nodes):
        z = node.z

        def average(path: tuple, y: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return ((y - (1 - node.b1) * z[name]) / node.b1).astype(y.dtype)  # noqa: B023

        return jax.tree_util.tree_map_with_path(average, state.trainable)
    return state.trainable


def average_of_arrays(
    trainable: Mapping[str, np.ndarray], opt_state: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """``evaluation_weights`` of a schedule-free run, from the arrays of its checkpoint by path."""
    z = {found[1]: a for name, a in opt_state.items() if (found := _Z.fullmatch(name))}
    (b1,) = (array for name, array in opt_state.items() if _B1.fullmatch(name))
    return {name: ((y - (1 - b1) * z[name]) / b1).astype(y.dtype) for name, y in trainable.items()}


def _is_schedule_free(node: object) -> bool:
    return isinstance(node, contrib.ScheduleFreeState)
