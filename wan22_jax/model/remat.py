"""Running the stack of blocks: what the backward pass keeps, and what waits in host memory.

A block's activations are kept, computed again, or kept in pinned host memory; its frozen weights
live on the device or in pinned host memory. What waits on the host is fetched one block ahead,
so that copies run beside the matmuls of the block before. Values never depend on any of this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any  # of arrays
# block(x, trainable weights, frozen weights in one or two trees, context) -> x of the same shape
Block = Callable[[jax.Array, Tree, Tree, Tree], jax.Array]

_ATTENTION = ("attention",)
_MATMULS = ("low_rank", "qkv", "rotated", "o", "cross_q", "cross_o", "ffn_in")
_FUSED_ATTENTION = "dot_product_attention_fwd_wrapper"  # cuDNN's: output and softmax statistics


@dataclass(frozen=True)
class Remat:
    """What the backward pass finds of each block, beside its input."""

    keep: tuple[str, ...] | None = None  # values by their checkpoint_name; None keeps everything
    on_host: bool = False  # the input and what is kept go to pinned host memory


# By the value of the config's ``activation_checkpointing``.
POLICIES: dict[bool | str, Remat] = {
    False: Remat(),
    True: Remat(keep=()),
    "unsloth": Remat(keep=(), on_host=True),
    "keep_attention": Remat(keep=_ATTENTION),
    "offload_attention": Remat(keep=_ATTENTION, on_host=True),
    "keep_qkv": Remat(keep=(*_ATTENTION, "low_rank", "qkv")),
    "keep_matmuls": Remat(keep=(*_ATTENTION, "cross_attention", *_MATMULS)),
    "offload_matmuls": Remat(keep=(*_ATTENTION, "cross_attention", *_MATMULS), on_host=True),
}


class Stack(NamedTuple):
    """Frozen weights of consecutive blocks, each leaf with a leading axis of blocks."""

    on_device: Tree
    on_host: Tree  # fetched block by block; without leaves if nothing is

    @property
    def num_blocks(self) -> int:
        """The length of the leading axis."""
        return jax.tree.leaves(self)[0].shape[0]


def run_blocks(
    block: Block,
    x: jax.Array,
    trainable: Tree,
    parts: Sequence[list[Tree] | Stack],
    context: Tree,
    remat: Remat,
) -> jax.Array:
    """Applies the blocks in order; differentiable with respect to x and trainable.

    Args:
        block: one block.
        x: what the blocks pass on.
        trainable: weights of all blocks, with a leading axis.
        parts: frozen weights; the parts' blocks follow each other. A list of single blocks
            becomes straight code: it compiles longer than the loop over a stack and runs
            faster, since nothing is copied into and out of stacks.
        context: what all blocks read alike. If anything of a stack waits on the host (weights,
            or activations by ``remat``), it and the frozen weights get no gradient.
        remat: what the backward pass keeps; only what runs as a stack can keep it on the host.
    """
    start = 0
    for part in parts:
        count = len(part) if isinstance(part, list) else part.num_blocks
        layers = jax.tree.map(lambda leaf: leaf[start : start + count], trainable)  # noqa: B023
        start += count
        if isinstance(part, list):
            x = _run_unrolled(block, remat, x, layers, part, context)
        elif remat.on_host or jax.tree.leaves(part.on_host):
            x = _run_from_host(block, remat, x, layers, part, context)
        else:
            x = _run_scanned(block, remat, x, layers, part, context)
    return x


def _run_unrolled(
    block: Block,
    remat: Remat,
    x: jax.Array,
    trainable: Tree,
    blocks: list[Tree],
    context: Tree,
) -> jax.Array:
    def run(x: jax.Array, layer: Tree, frozen: Tree) -> jax.Array:
        return block(x, layer, (frozen,), context)

    if remat.keep is not None:
        run = jax.checkpoint(run, policy=_keeps(remat.keep))
    leaves, structure = jax.tree.flatten(trainable)
    # Not leaf[index], whose gradient is a whole stack of zeros but for one row.
    split = [jax.lax.split(leaf, (1,) * len(blocks)) for leaf in leaves]
    for index, frozen in enumerate(blocks):
        layer = [rows[index].reshape(rows[index].shape[1:]) for rows in split]
        x = run(x, jax.tree.unflatten(structure, layer), frozen)
    return x


def _run_scanned(
    block: Block, remat: Remat, x: jax.Array, trainable: Tree, stack: Stack, context: Tree
) -> jax.Array:
    def body(x: jax.Array, layer: tuple[Tree, Tree]) -> tuple[jax.Array, None]:
        return block(x, layer[0], (layer[1],), context), None

    if remat.keep is not None:
        body = jax.checkpoint(body, policy=_keeps(remat.keep), prevent_cse=False)
    return jax.lax.scan(body, x, (trainable, stack.on_device))[0]


def _run_from_host(
    block: Block,
    remat: Remat,
    x: jax.Array,
    trainable: Tree,
    stack: Stack,
    context: Tree,
) -> jax.Array:
    """Two scans, forward and backward, each of which carries what it fetched one block ahead."""
    last = stack.num_blocks - 1

    def pull_of(
        x: jax.Array, layer: Tree, fetched: Tree, on_device: Tree, context: Tree
    ) -> tuple[jax.Array, Callable, list[jax.Array]]:
        """One block, its gradient function, and the values that this has kept."""
        frozen = (on_device, fetched)

        def function(x: jax.Array, layer: Tree) -> jax.Array:
            return block(x, layer, frozen, context)

        if remat.keep is not None:
            function = jax.checkpoint(function, policy=_keeps(remat.keep), prevent_cse=False)
        x_out, pull = jax.vjp(function, x, layer)
        leaves, structure = jax.tree.flatten(pull)
        inputs = {id(leaf) for leaf in jax.tree.leaves((x, layer, frozen, context))}
        kept = {
            id(leaf): leaf
            for leaf in leaves
            if isinstance(leaf, jax.core.Tracer) and id(leaf) not in inputs
        }

        def pull_with(values: list[jax.Array], dx: jax.Array) -> tuple[jax.Array, Tree]:
            by_id = dict(zip(kept, values, strict=True))
            return jax.tree.unflatten(structure, [by_id.get(id(leaf), leaf) for leaf in leaves])(dx)

        return x_out, pull_with, list(kept.values())

    def forward(
        x: jax.Array, trainable: Tree, stack: Stack, context: Tree, *, saves: bool
    ) -> tuple[jax.Array, Tree]:
        def body(carry: tuple, layer: tuple) -> tuple[tuple, Tree]:
            x, fetched = carry
            index, layer, on_device = layer
            ahead = _fetch(stack.on_host, jnp.minimum(index + 1, last))
            if not saves:
                return (block(x, layer, (on_device, fetched), context), ahead), None
            x_out, _, kept = pull_of(x, layer, fetched, on_device, context)
            saved = [x, *kept]
            return (x_out, ahead), _to_host(saved) if remat.on_host else saved

        first = _fetch(stack.on_host, 0)
        layers = (jnp.arange(last + 1), trainable, stack.on_device)
        (x, _), saved = jax.lax.scan(body, (x, first), layers)
        return x, saved

    @jax.custom_vjp
    def run(x: jax.Array, trainable: Tree, stack: Stack, context: Tree) -> jax.Array:
        return forward(x, trainable, stack, context, saves=False)[0]

    def run_forward(*args: Any) -> tuple[jax.Array, Tree]:
        x, saved = forward(*args, saves=True)
        return x, (saved, *args[1:])

    def run_backward(residuals: Tree, dx: jax.Array) -> tuple:
        saved, trainable, stack, context = residuals
        waiting = (stack.on_host, saved if remat.on_host else None)

        def body(carry: tuple, layer: tuple) -> tuple[tuple, Tree]:
            dx, (fetched, values) = carry
            index, layer, on_device, values_here = layer
            ahead = _fetch(waiting, jnp.maximum(index - 1, 0))
            x, *kept = values if remat.on_host else values_here
            _, pull, _ = pull_of(x, layer, fetched, on_device, context)
            dx, dlayer = pull(kept, dx)
            return (dx, ahead), dlayer

        first = _fetch(waiting, last)
        here = None if remat.on_host else saved
        layers = (jnp.arange(last + 1), trainable, stack.on_device, here)
        (dx, _), dtrainable = jax.lax.scan(body, (dx, first), layers, reverse=True)
        return dx, dtrainable, None, None

    run.defvjp(run_forward, run_backward)
    return run(x, trainable, stack, context)


def _keeps(names: tuple[str, ...]) -> Callable[..., Any]:
    by_name = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        if primitive.name == _FUSED_ATTENTION:
            queries, keys, *_ = args
            to_itself = queries.shape == keys.shape
            return ("attention" if to_itself else "cross_attention") in names
        return by_name(primitive, *args, **params)

    return policy


def _fetch(tree: Tree, index: jax.Array | int) -> Tree:
    def fetch(leaf: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
        return jax.device_put(row, jax.memory.Space.Device)

    return jax.tree.map(fetch, tree)


def _to_host(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host), tree)
