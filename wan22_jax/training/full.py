"""Full fine-tuning: which weights train, and how does the model read them?

All of them train, as one flat dictionary of arrays by official name (``blocks.7.ffn.0.weight``),
the names of the checkpoint: layers lie apart and linears are not joined, so that gradients come out
block by block, an optimizer sees the matrices as they are, and an export has nothing to translate.

The weights are float32 masters, or bfloat16 but for what a model keeps in float32
(``weights.keeps_float32``). The model computes in its own dtype: masters are rounded to it where
they are read, a block at a time, and a gradient is summed in float32 and rounded to it once, as
PyTorch's automatic mixed precision does.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from wan22_jax.model.block_weights import Arrays
from wan22_jax.model.remat import Streamed
from wan22_jax.model.transformer import WanTransformer
from wan22_jax.sharding import of_array, put
from wan22_jax.training.frozen import Frozen
from wan22_jax.weights import is_stacked, official_names, parameter_shapes, stored_dtype

Weights = dict[str, jax.Array]  # by official name
Trainable = nnx.State | Weights  # an adapter, or all weights of the model
_REST = "rest"  # the group of what is in no block


def split_full(
    model: WanTransformer, *, dtype: DTypeLike
) -> tuple[nnx.GraphDef, dict[str, Any], nnx.State]:
    """Takes a model apart into its structure, its weights by official name, and a template.

    Args:
        model: without adapters; arrays of the device or of NumPy.
        dtype: what the model computes in.

    Returns:
        The structure, the weights (of a stack, each layer apart) and a state with an empty array
        in place of each weight, in the dtype that it is rounded to where it is read.
    """
    graphdef, state = nnx.split(model)
    weights: dict[str, Any] = {}
    template = []
    for path, leaf in nnx.to_flat_state(state):
        name, array = ".".join(map(str, path)), leaf[...]
        names = official_names(name, array.shape)
        if is_stacked(name):
            weights |= {each: array[layer] for layer, each in enumerate(names)}
        else:
            weights[name] = array
        empty = jnp.zeros((0, *array.shape[1:]), stored_dtype(name, dtype))
        template.append((path, leaf.replace(empty)))
    return graphdef, weights, nnx.from_flat_state(template)


def describe_full(model: WanTransformer, *, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes the weights by official name, in a model of this dtype; it may be abstract."""
    return {
        name: jax.ShapeDtypeStruct(shape, stored_dtype(name, dtype))
        for name, shape in parameter_shapes(model).items()
    }


def place_full(weights: dict[str, Any], sharding: NamedSharding, *, dtype: DTypeLike) -> Weights:
    """Copies the weights to the device, one by one, where a train step may donate them.

    Args:
        weights: from ``split_full``.
        sharding: of what every device has; the blocks' matrices are divided as ``of_array`` says.
        dtype: of the masters, float32 or bfloat16; ``weights.stored_dtype`` applies.
    """

    def place(name: str, array: Any) -> jax.Array:
        where = of_array(sharding, name, array.shape) if is_stacked(name) else sharding
        return put(_own(array), where).astype(stored_dtype(name, dtype))

    return {name: place(name, array) for name, array in weights.items()}


def merge_model(
    graphdef: nnx.GraphDef, trainable: Trainable, frozen: Frozen
) -> tuple[WanTransformer, Sequence[list[Arrays] | Streamed]]:
    """Makes a model again, whatever of it trains, and the parts that its blocks are called with."""
    if isinstance(trainable, nnx.State):
        return nnx.merge(graphdef, trainable, frozen.rest), frozen.parts
    model, rows = merge_full(graphdef, trainable, frozen.rest)
    return model, (rows,)


def merge_full(
    graphdef: nnx.GraphDef, weights: Weights, template: nnx.State
) -> tuple[WanTransformer, list[Arrays]]:
    """Makes the model again, and the rows of its blocks; differentiable by the weights.

    Args:
        graphdef: from ``split_full``.
        weights: see there; the blocks' are rounded where they are read.
        template: from ``split_full``.

    Returns:
        The model, whose blocks are empty, and each block's arrays, for ``WanTransformer``'s parts.
    """
    flat = [
        (path, leaf.replace(_round(weights, ".".join(map(str, path)), leaf[...])))
        for path, leaf in nnx.to_flat_state(template)
    ]
    rows: list[Arrays] = [
        {name.split(".", 2)[2]: array for name, array in group.items()}
        for label, group in group_weights(weights).items()
        if label != _REST
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), rows


def narrow_gradients(grads: Any, template: nnx.State) -> Weights:
    """Holds gradients in the dtype that they were rounded to, which takes half the memory.

    XLA would keep the float32 copy that the gradient of a cast makes.
    """
    kept_as = {".".join(map(str, path)): leaf.dtype for path, leaf in nnx.to_flat_state(template)}
    dtype = kept_as["patch_embedding.weight"]
    narrow = {name: grad.astype(stored_dtype(name, dtype)) for name, grad in grads.items()}
    return jax.lax.optimization_barrier(narrow)


def group_weights(weights: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sorts weights, or anything by their names, into one group a block and one for the rest."""
    groups: dict[str, dict[str, Any]] = {}
    for name, array in weights.items():
        groups.setdefault(group_of(name), {})[name] = array
    labels = sorted(groups, key=lambda label: (label == _REST, label.zfill(4)))
    return {label: groups[label] for label in labels}


def group_of(name: str) -> str:
    """Returns the number of the block that a weight belongs to, or "rest"."""
    return name.split(".", 2)[1] if is_stacked(name) else _REST


def count_parameters(weights: dict[str, Any]) -> int:
    """Returns how many numbers train."""
    return sum(array.size for array in weights.values())


def _own(array: Any) -> Any:
    # device_put of NumPy rows on a CPU may share their memory, and of JAX arrays returns them.
    return np.array(array) if isinstance(array, np.ndarray) else jnp.copy(array)


def _round(weights: Weights, name: str, empty: jax.Array) -> jax.Array:
    return empty if is_stacked(name) else weights[name].astype(empty.dtype)
