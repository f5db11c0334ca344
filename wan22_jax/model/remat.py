"""Running the stack of blocks: what the backward pass keeps, and what waits in host memory.

A block's activations are kept, computed again, or kept in pinned host memory; its frozen weights
live on the device or in pinned host memory. What waits on the host is fetched one block ahead,
so that copies run beside the matmuls of the block before. Values never depend on any of this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

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


class BlockWeights(NamedTuple):
    """Frozen weights of one block."""

    on_device: Tree
    on_host: Tree  # fetched when it is needed; without leaves if nothing is


def scan_blocks(
    block: Block, x: jax.Array, trainable: Tree, frozen: Tree, context: Tree, remat: Remat
) -> jax.Array:
    """Applies the blocks in a loop; their weights have a leading axis. Compiles fast.

    Raises:
        ValueError: the policy keeps activations on the host, which ``unroll_blocks`` does.
    """
    if remat.on_host:
        raise ValueError("activations go to the host from unrolled blocks only")

    def body(x: jax.Array, layer: tuple[Tree, Tree]) -> tuple[jax.Array, None]:
        return block(x, layer[0], (layer[1],), context), None

    if remat.keep is not None:
        body = jax.checkpoint(body, policy=_keeps(remat.keep), prevent_cse=False)
    return jax.lax.scan(body, x, (trainable, frozen))[0]


def unroll_blocks(
    block: Block,
    x: jax.Array,
    trainable: Tree,
    blocks: Sequence[BlockWeights],
    context: Tree,
    remat: Remat,
) -> jax.Array:
    """Applies the blocks as straight code, which copies nothing into and out of stacks.

    Args:
        block: one block.
        x: what the blocks pass on.
        trainable: weights of all blocks, with a leading axis.
        blocks: frozen weights of each block.
        context: what all blocks read alike. If anything waits on the host (weights, or activations
            by ``remat``), it and the frozen weights get no gradient.
        remat: what the backward pass keeps.
    """
    leaves, structure = jax.tree.flatten(trainable)
    # Not leaf[index], whose gradient is a whole stack of zeros but for one row.
    split = [jax.lax.split(leaf, (1,) * len(blocks)) for leaf in leaves]
    layers = [
        jax.tree.unflatten(structure, [rows[i].reshape(rows[i].shape[1:]) for rows in split])
        for i in range(len(blocks))
    ]
    if remat.on_host or jax.tree.leaves([weights.on_host for weights in blocks]):
        return _run_from_host(block, remat, x, layers, list(blocks), context)

    def run(x: jax.Array, layer: Tree, frozen: Tree) -> jax.Array:
        return block(x, layer, (frozen,), context)

    if remat.keep is not None:
        run = jax.checkpoint(run, policy=_keeps(remat.keep))
    for layer, weights in zip(layers, blocks, strict=True):
        x = run(x, layer, weights.on_device)
    return x


def _run_from_host(
    block: Block,
    remat: Remat,
    x: jax.Array,
    layers: list[Tree],
    blocks: list[BlockWeights],
    context: Tree,
) -> jax.Array:
    """Forward and backward in our own order, each of which fetches one block ahead."""

    run_block = block  # one function for all blocks, so that it is traced once
    if remat.keep is not None:
        run_block = jax.checkpoint(block, policy=_keeps(remat.keep), prevent_cse=False)

    def pull_of(
        x: jax.Array, layer: Tree, frozen: tuple[Tree, Tree], context: Tree
    ) -> tuple[jax.Array, Callable, list[jax.Array]]:
        """One block, its gradient function, and the values that this has kept."""
        x_out, pull = jax.vjp(lambda x, layer: run_block(x, layer, frozen, context), x, layer)
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

    @jax.custom_vjp
    def run(x: jax.Array, layers: list, blocks: list, context: Tree) -> jax.Array:
        fetched = _fetch(blocks[0].on_host)
        for index, layer in enumerate(layers):
            frozen = (blocks[index].on_device, fetched)
            x, fetched = _fetch_beside(x, [weights.on_host for weights in blocks], index + 1)
            x = block(x, layer, frozen, context)
        return x

    def run_forward(x: jax.Array, layers: list, blocks: list, context: Tree) -> tuple:
        waiting = [weights.on_host for weights in blocks]
        saved = []
        fetched = _fetch(waiting[0])
        for index, layer in enumerate(layers):
            frozen = (blocks[index].on_device, fetched)
            x, fetched = _fetch_beside(x, waiting, index + 1)
            x_out, _, kept = pull_of(x, layer, frozen, context)
            saved.append(_to_host([x, *kept]) if remat.on_host else [x, *kept])
            x = x_out
            if index > 0:  # the copies of a block end with the next one, lest they pile up
                x, saved[-2] = jax.lax.optimization_barrier((x, saved[-2]))
        return x, (saved, layers, blocks, context)

    def run_backward(residuals: tuple, dx: jax.Array) -> tuple:
        saved, layers, blocks, context = residuals
        here = [None if remat.on_host else values for values in saved]
        waiting = [
            (weights.on_host, values if remat.on_host else None)
            for weights, values in zip(blocks, saved, strict=True)
        ]
        last = len(layers) - 1
        dlayers = []
        fetched = _fetch(waiting[last])
        for index in range(last, -1, -1):
            weights, values = fetched
            dx, fetched = _fetch_beside(dx, waiting, index - 1)
            x, *kept = values if remat.on_host else here[index]
            # Lest what the forward pass made of the weights is kept for here.
            dx, layer, here_too = jax.lax.optimization_barrier(
                (dx, layers[index], blocks[index].on_device)
            )
            _, pull, _ = pull_of(x, layer, (here_too, weights), context)
            dx, dlayer = pull(kept, dx)
            dlayers.append(dlayer)
        return dx, dlayers[::-1], None, None

    run.defvjp(run_forward, run_backward)
    return run(x, layers, blocks, context)


def _fetch_beside(x: jax.Array, waiting: list[Tree], index: int) -> tuple[jax.Array, Tree]:
    """Starts to fetch what a block waits for, at the time when x is there."""
    if not 0 <= index < len(waiting):
        return x, None
    x, tree = jax.lax.optimization_barrier((x, waiting[index]))
    return x, _fetch(tree)


def _keeps(names: tuple[str, ...]) -> Callable[..., Any]:
    by_name = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        if primitive.name == _FUSED_ATTENTION:
            queries, keys, *_ = args
            to_itself = queries.shape == keys.shape
            return ("attention" if to_itself else "cross_attention") in names
        return by_name(primitive, *args, **params)

    return policy


def _fetch(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), tree)


def _to_host(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host), tree)
