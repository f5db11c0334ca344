"""How does a model answer a sampler: its weights where they fit, and the velocity they give?"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wan22_jax.model.shards import DATA, ONE_DEVICE, Shards
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.model_folder import FLOAT8
from wan22_jax.sampling import Velocity
from wan22_jax.sharding import put, replicated, shards_of, specs_of
from wan22_jax.training.frozen import Frozen, place_frozen
from wan22_jax.training.full import Trainable, merge_model
from wan22_jax.training.step import split_model

_SPARE = 10**9  # bytes: text, latents, what the allocator cannot use
_ON_THE_WAY = 2  # streamed blocks that are on the device at a time


def place_velocity(
    model: WanTransformer, *, blocks_to_swap: int = 0, sharding: NamedSharding
) -> Velocity:
    """Puts a model where it computes from; its linears are joined there, so it is copied.

    Args:
        model: its arrays best on the host, from ``load_transformer(..., host=True)``.
        blocks_to_swap: so many last blocks keep their matrices in pinned host memory and are
            copied beside the block before, in each call.
        sharding: of what is on the device.
    """
    graphdef, trainable, frozen = split_model(model)
    placed = place_frozen(
        frozen, activation_checkpointing=True, blocks_to_swap=blocks_to_swap, sharding=sharding
    )
    return make_velocity(graphdef, put(trainable, sharding), placed, sharding=sharding)


def choose_blocks_to_swap(
    config: TransformerConfig, *, dtype: str, num_tokens: int, memory_bytes: int | None
) -> int:
    """Returns how many blocks have to wait in host memory, so that a model call fits.

    Args:
        config: sizes of the model.
        dtype: of its weights.
        num_tokens: of the largest video, one in a call.
        memory_bytes: of the device; None where there is no limit to be known.
    """
    if memory_bytes is None:
        return 0
    dim, ffn_dim, num_blocks = config.dim, config.ffn_dim, config.num_layers
    itemsize = 1 if dtype == FLOAT8 else jnp.dtype(dtype).itemsize
    block = (8 * dim**2 + 2 * dim * ffn_dim) * itemsize
    # What is not in blocks, text, time and head, takes some 40 dim^2 bytes.
    fixed = 40 * dim**2 + num_tokens * (3 * ffn_dim + 16 * dim) * max(2, itemsize) // 2 + _SPARE
    if fixed + num_blocks * block <= memory_bytes:
        return 0
    resident = (memory_bytes - fixed) // block - _ON_THE_WAY
    return num_blocks - max(0, min(num_blocks, resident))


def make_velocity(
    graphdef: nnx.GraphDef, trainable: Trainable, frozen: Frozen, *, sharding: NamedSharding
) -> Velocity:
    """Makes the velocity of weights that are in place, those of a training run for example.

    Of several devices, those of the axis "context" share the tokens of each video, those of "data"
    the videos of a call, if these divide so; the others compute the same. Every process has to call
    it then, and gets it on a device of its own.

    Args:
        graphdef: structure of the model.
        trainable: adapters, or all weights by name.
        frozen: from ``place_frozen``.
        sharding: of what every device has; arguments are put there, so that the program is
            compiled once, whatever their own is.
    """
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    predict = _predict
    if mesh.size > 1:
        weights = specs_of(trainable), specs_of(frozen)
        leaves, structure = jax.tree.flatten(weights)
        predict = _make_sharded(graphdef, mesh, tuple(leaves), structure)

    def velocity(*inputs: jax.Array) -> jax.Array:
        divides = mesh.shape[DATA] > 1 and len(inputs[0]) % mesh.shape[DATA] == 0
        where = NamedSharding(mesh, PartitionSpec(DATA)) if divides else sharding
        out = predict(graphdef, trainable, frozen, *put(inputs, where))
        return out if out.is_fully_addressable else out.addressable_data(0)

    return velocity


def _compute(
    graphdef: nnx.GraphDef,
    trainable: Trainable,
    frozen: Frozen,
    *inputs: jax.Array,
    shards: Shards = ONE_DEVICE,
) -> jax.Array:
    model, parts = merge_model(graphdef, trainable, frozen)
    return model(
        *inputs,  # noisy latents, noise levels, text
        float32_residual=True,  # as the original samples
        activation_checkpointing=True,  # streamed blocks do not even make what nothing needs
        parts=parts,
        differentiable=False,
        shards=shards,
    )


_predict = jax.jit(_compute, static_argnums=0)


@functools.lru_cache(4)
def _make_sharded(
    graphdef: nnx.GraphDef, mesh: Mesh, specs: tuple, structure: Any
) -> Callable[..., jax.Array]:
    """``_predict`` on a mesh: one function, and so one program, for weights that lie alike."""
    of_trainable, of_frozen = jax.tree.unflatten(structure, specs)
    compute = partial(_compute, graphdef, shards=shards_of(mesh))

    @partial(jax.jit, static_argnums=0, out_shardings=replicated(mesh))
    def sharded(videos: PartitionSpec, *arguments: Any) -> jax.Array:
        specs = (of_trainable, of_frozen, videos, videos, videos)
        return jax.shard_map(compute, mesh=mesh, in_specs=specs, out_specs=videos, check_vma=False)(
            *arguments
        )

    def predict(_: nnx.GraphDef, *arguments: Any) -> jax.Array:
        return sharded(arguments[-1].sharding.spec, *arguments)

    return predict
