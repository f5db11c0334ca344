"""One optimizer step on all weights of the model, block by block, its state on the host or not.

The state of AdamW takes 40 GB in float32: it may wait in pinned host memory, from where each
block's comes to the device while the block before is updated, and goes back while the next one is.
Clipping by the global norm is done here, since a block's optimizer does not see the others.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from wan22_jax.training.full import Weights, group_weights
from wan22_jax.weights import is_stacked


class BlockwiseOptimizer(NamedTuple):
    """An optimizer that is applied to one block at a time; its state is a dictionary by block.

    A block's arrays have a leading axis of one layer there, as those of a stack have of all.
    """

    inner: optax.GradientTransformation  # clips nothing
    max_grad_norm: float  # over all blocks; 0 does not clip
    on_host: bool  # where the state waits

    def init(self, weights: Any) -> dict[str, optax.OptState]:
        """Makes the state of each block, on the device; ``place_state`` moves it."""
        groups = group_weights(weights)
        return {label: self._init(group) for label, group in groups.items()}

    def place_state(self, weights: Weights) -> dict[str, optax.OptState]:
        """Makes the state of each block where it stays; at no time are two blocks' on the way."""
        placed = {}
        for label, group in group_weights(weights).items():
            places = self._places(group)
            on_device = jax.tree.map(lambda to: NamedSharding(to.mesh, to.spec), places)
            state = jax.jit(self._init, out_shardings=on_device)(group)
            placed[label] = jax.block_until_ready(jax.device_put(state, places))
        return placed

    def describe_state(self, weights: Weights) -> dict[str, optax.OptState]:
        """The shapes of ``place_state``'s arrays, and where they lie; nothing is made."""
        return {
            label: jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                jax.eval_shape(self._init, group),
                self._places(group),
            )
            for label, group in group_weights(weights).items()
        }

    def step(self, grads: Any, state: Any, weights: Any, norm: jax.Array) -> tuple[Any, Any]:
        """Returns the new weights and state.

        Args:
            grads: by weight.
            state: from ``place_state``, or of the step before.
            weights: donated by the train step, so that each block is updated in place.
            norm: of all gradients, before clipping.
        """
        scale = jnp.ones((), jnp.float32)
        if self.max_grad_norm > 0:
            scale = jnp.where(norm < self.max_grad_norm, 1.0, self.max_grad_norm / norm)
        step = self._step_on_host if self.on_host else self._step_on_device
        return set_xla_metadata(latency_metadata="0")(step)(grads, state, weights, scale)

    def _step_on_device(self, grads: Weights, state: dict, weights: Weights, scale: Any) -> tuple:
        new_weights, new_state = {}, {}
        grads_by_block = group_weights(grads)
        for label, group in group_weights(weights).items():
            updated, new_state[label] = self._update(
                grads_by_block[label], state[label], group, scale
            )
            new_weights |= updated
        return {name: new_weights[name] for name in weights}, new_state

    def _step_on_host(self, grads: Weights, state: dict, weights: Weights, scale: Any) -> tuple:
        """As ``_step_on_device``, with bounds on when a block's state is fetched and sent.

        Without them XLA's scheduler would begin all fetches at once.
        """
        groups, grads_by_block = group_weights(weights), group_weights(grads)
        labels = list(groups)
        skeletons, waiting = zip(*(_take_arrays(state[label]) for label in labels), strict=True)
        new_weights: Weights = {}
        new_skeletons, sent = [], []
        # No state is fetched before the last gradient is there: they have the memory until then.
        scale, first = _together(scale, waiting[0])
        fetched = _move(first, jax.memory.Space.Device)
        for index, label in enumerate(labels):
            own = _put_arrays(skeletons[index], fetched)
            if index + 1 < len(labels):
                scale, ahead = _together(scale, waiting[index + 1])
                fetched = _move(ahead, jax.memory.Space.Device)
            updated, new = self._update(grads_by_block[label], own, groups[label], scale)
            skeleton, arrays = _take_arrays(new)
            # The next block, and the fetch for the one after it, wait for this one ...
            scale, updated, arrays = _together(scale, updated, arrays)
            new_weights |= updated
            new_skeletons.append(skeleton)
            sent.append(_move(arrays, jax.memory.Space.Host))
            if index > 0:  # ... and for what the one before has sent.
                scale, sent[index - 1] = _together(scale, sent[index - 1])
        new_state = map(_put_arrays, new_skeletons, sent)
        return (
            {name: new_weights[name] for name in weights},
            dict(zip(labels, new_state, strict=True)),
        )

    def _update(self, grads: Weights, state: Any, weights: Weights, scale: Any) -> tuple:
        grads = {name: grad.astype(jnp.float32) * scale for name, grad in grads.items()}
        updates, state = self.inner.update(_stack(grads), state, _stack(weights))
        updated = cast(Weights, optax.apply_updates(_stack(weights), updates))
        return {name: updated[name].reshape(array.shape) for name, array in weights.items()}, state

    def _init(self, group: Weights) -> optax.OptState:
        return self.inner.init(_stack(group))

    def _places(self, group: Weights) -> Any:
        """Where the state of a block lies: what has the shape of a weight, divided as that."""

        def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, DictKey) and key.key in group]
            weight = group[names[-1]] if names else next(iter(group.values()))
            where = cast(NamedSharding, weight.sharding)
            spec = PartitionSpec()
            if names and leaf.shape == stacked[names[-1]].shape:
                spec = PartitionSpec(*(None,) * (leaf.ndim - weight.ndim), *where.spec)
            waits = self.on_host and leaf.ndim > 0
            kind = "pinned_host" if waits else where.memory_kind
            return NamedSharding(where.mesh, spec, memory_kind=kind)

        stacked = jax.eval_shape(_stack, group)
        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(self._init, group))


def _stack(group: Weights) -> Weights:
    return {name: array[None] if is_stacked(name) else array for name, array in group.items()}


def _take_arrays(state: Any) -> tuple[Any, list[jax.Array]]:
    """Takes the arrays out of a state; what stays holds scalars, which never leave the device."""
    leaves, structure = jax.tree.flatten(state)
    scalars = [leaf if leaf.ndim == 0 else None for leaf in leaves]
    return (structure, scalars), [leaf for leaf in leaves if leaf.ndim > 0]


def _put_arrays(skeleton: Any, arrays: list[jax.Array]) -> Any:
    structure, scalars = skeleton
    rest = iter(arrays)
    return jax.tree.unflatten(structure, [next(rest) if leaf is None else leaf for leaf in scalars])


def _together(*trees: Any) -> tuple:
    """The arguments, none of which is used before all are there."""
    return jax.lax.optimization_barrier(trees)


def _move(arrays: list[jax.Array], to: Any) -> list[jax.Array]:
    return [jax.device_put(array, to) for array in arrays]
