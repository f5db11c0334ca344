"""Running the stack of blocks: what the backward pass keeps, and what waits in host memory.

A block's activations are kept, computed again, or kept in pinned host memory; its frozen weights
live on the device or in pinned host memory. What waits on the host is copied beside the block
before or after. Values depend on none of this, but for how XLA rounds what it fuses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.experimental.xla_metadata import set_xla_metadata

Tree = Any  # of arrays
# block(x, trainable weights, frozen weights in one or two trees, context) -> x of the same shape
Block = Callable[[jax.Array, Tree, Tree, Tree], jax.Array]

_ATTENTION = ("attention",)
_QKV = (*_ATTENTION, "low_rank", "qkv")
_MATMULS = (*_QKV, "o", "cross_q", "ffn_in", "cross_kv", "modulation")
_SEND_BLOCKS = 3  # blocks that run while what one of them keeps is sent to the host
_FUSED_ATTENTION = "dot_product_attention_fwd_wrapper"  # cuDNN's: output and softmax statistics


@dataclass(frozen=True)
class Remat:
    """What the backward pass finds of each block, beside its input."""

    # Values by their checkpoint_name; None keeps everything. Nothing in float8 may be named:
    # jax.checkpoint passes what it keeps through reduce_precision, which makes NaN of any e4m3fn
    # over 240.
    keep: tuple[str, ...] | None = None
    on_host: Fraction = Fraction(0)  # of the blocks; their input and what is kept go to the host

    def sends(self, index: int, count: int) -> bool:
        """Whether block ``index`` of so many is one; the last two are needed again too soon."""
        return index < count - 2 and (index + 1) * self.on_host // 1 > index * self.on_host // 1


# By the value of the config's ``activation_checkpointing``.
POLICIES: dict[bool | str, Remat] = {
    False: Remat(),
    True: Remat(keep=()),
    "unsloth": Remat(keep=(), on_host=Fraction(1)),
    "keep_attention": Remat(keep=_ATTENTION),
    "offload_attention": Remat(keep=_ATTENTION, on_host=Fraction(1)),
    "keep_qkv": Remat(keep=_QKV),
    "keep_matmuls": Remat(keep=(*_MATMULS, "rotated", "exchanged", "cross_attention", "cross_o")),
    # As much as is on its way to the host while the forward pass of a long clip computes.
    "offload_matmuls": Remat(keep=_MATMULS, on_host=Fraction(3, 5)),
}


class Stack(NamedTuple):
    """Frozen weights of consecutive blocks, each leaf with a leading axis of blocks."""

    weights: Tree

    @property
    def num_blocks(self) -> int:
        """The length of the leading axis."""
        return jax.tree.leaves(self)[0].shape[0]


class Streamed(NamedTuple):
    """Frozen weights of consecutive blocks that copy something from or to the host."""

    on_device: list[Tree]
    on_host: list[Tree]  # as many; trees without leaves where nothing is

    @property
    def num_blocks(self) -> int:
        """The length of either list."""
        return len(self.on_device)


def run_blocks(
    block: Block,
    x: jax.Array,
    trainable: Tree,
    parts: Sequence[list[Tree] | Stack | Streamed],
    context: Tree,
    remat: Remat,
) -> jax.Array:
    """Applies the blocks in order; differentiable with respect to x and trainable.

    Args:
        block: one block.
        x: what the blocks pass on.
        trainable: weights of all blocks, with a leading axis.
        parts: frozen weights; the parts' blocks follow each other. All but a stack becomes
            straight code: it compiles longer than the loop over a stack and runs faster, since
            nothing is copied into and out of stacks.
        context: what all blocks read alike. If a part is streamed, it gets no gradient.
        remat: what the backward pass keeps; only streamed parts keep it on the host, others on
            the device.
    """
    start = 0
    for part in parts:
        count = len(part) if isinstance(part, list) else part.num_blocks
        layers = jax.tree.map(lambda leaf: leaf[start : start + count], trainable)  # noqa: B023
        start += count
        if isinstance(part, list):
            x = _run_unrolled(block, remat, x, layers, part, context)
        elif isinstance(part, Stack):
            x = _run_scanned(block, remat, x, layers, part, context)
        else:
            x = _run_streamed(block, remat, x, layers, part, context)
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
    for layer, frozen in zip(_unstack(trainable, len(blocks)), blocks, strict=True):
        x = run(x, layer, frozen)
    return x


def _run_scanned(
    block: Block, remat: Remat, x: jax.Array, trainable: Tree, stack: Stack, context: Tree
) -> jax.Array:
    def body(x: jax.Array, layer: tuple[Tree, Tree]) -> tuple[jax.Array, None]:
        return block(x, layer[0], (layer[1],), context), None

    if remat.keep is not None:
        body = jax.checkpoint(body, policy=_keeps(remat.keep), prevent_cse=False)
    return jax.lax.scan(body, x, (trainable, stack.weights))[0]


def _run_streamed(
    block: Block, remat: Remat, x: jax.Array, trainable: Tree, streamed: Streamed, context: Tree
) -> jax.Array:
    """Straight code with a backward pass of our own.

    When a block starts, the fetches of the next one may begin and the sends of the fourth last are
    over: without such bounds, XLA's scheduler begins fetches so early, and ends sends so late, that
    memory does not suffice. Only the first fetches of either pass are not bound. Within the bounds
    it would begin copies only five kernels before they have to be over, so it is told that kernels
    take no time. To be traced as one: run op by op, this finds nothing to keep.
    """
    last = streamed.num_blocks - 1
    sends = [remat.sends(index, last + 1) for index in range(last + 1)]
    if remat.keep is not None:
        block = jax.checkpoint(block, policy=_keeps(remat.keep), prevent_cse=False)

    def differentiate(
        x: jax.Array, layer: Tree, frozen: tuple[Tree, Tree], context: Tree
    ) -> tuple[jax.Array, list[jax.Array], Callable]:
        """Runs a block; what its gradient needs beside these arguments, and the gradient of it."""
        x_out, pull = jax.vjp(lambda x, layer: block(x, layer, frozen, context), x, layer)
        leaves, structure = jax.tree.flatten(pull)
        arguments = {id(leaf) for leaf in jax.tree.leaves((x, layer, frozen, context))}
        kept = {
            id(leaf): leaf
            for leaf in leaves
            if isinstance(leaf, Tracer) and id(leaf) not in arguments
        }

        def pull_from(values: list[jax.Array], dx: jax.Array) -> tuple[jax.Array, Tree]:
            by_id = dict(zip(kept, values, strict=True))
            return jax.tree.unflatten(structure, [by_id.get(id(leaf), leaf) for leaf in leaves])(dx)

        return x_out, list(kept.values()), pull_from

    def run_forward(
        x: jax.Array, layers: list[Tree], streamed: Streamed, context: Tree
    ) -> tuple[jax.Array, Tree]:
        on_device, on_host = streamed
        fetched = _fetch(on_host[0])
        saved = []
        for index, layer in enumerate(layers):
            weights = fetched
            if index < last:
                x, ahead = _together(x, on_host[index + 1])
                fetched = _fetch(ahead)
            x_out, kept, _ = differentiate(x, layer, (on_device[index], weights), context)
            saved.append(_send([x, *kept]) if sends[index] else [x, *kept])
            x = x_out
            due = index - _SEND_BLOCKS
            if due >= 0 and sends[due]:
                x, saved[due] = _together(x, saved[due])
        return x, (saved, layers, streamed, context)

    def run_backward(residuals: Tree, dx: jax.Array) -> tuple:
        saved, layers, (on_device, on_host), context = residuals
        waiting = [
            (weights, values if sent else [])
            for weights, values, sent in zip(on_host, saved, sends, strict=True)
        ]
        fetched = _fetch(waiting[last])
        dlayers = []
        for index in range(last, -1, -1):
            weights, values = fetched
            if index > 0:
                dx, ahead = _together(dx, waiting[index - 1])
                fetched = _fetch(ahead)
            x_and_kept = values if sends[index] else saved[index]
            # Nor is anything kept for here that the forward pass made of these.
            dx, (x, *kept), layer, here = _together(dx, x_and_kept, layers[index], on_device[index])
            _, _, pull_from = differentiate(x, layer, (here, weights), context)
            dx, dlayer = _together(*pull_from(kept, dx))
            dlayers.append(dlayer)
        return dx, dlayers[::-1], None, None

    in_no_time = set_xla_metadata(latency_metadata="0")
    run_forward, run_backward = in_no_time(run_forward), in_no_time(run_backward)
    run = jax.custom_vjp(lambda *args: run_forward(*args)[0])
    run.defvjp(run_forward, run_backward)
    return run(x, _unstack(trainable, last + 1), streamed, context)


def _unstack(tree: Tree, count: int) -> list[Tree]:
    leaves, structure = jax.tree.flatten(tree)
    # Not leaf[index], whose gradient is a whole stack of zeros but for one row.
    split = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [rows[i].reshape(rows[i].shape[1:]) for rows in split])
        for i in range(count)
    ]


def _together(*trees: Tree) -> tuple:
    """The arguments, none of which is used before all are there."""
    return jax.lax.optimization_barrier(trees)


def _fetch(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), tree)


def _send(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host), tree)


def _keeps(names: tuple[str, ...]) -> Callable[..., bool]:
    """Makes a policy for ``jax.checkpoint``, which keeps a block's input in any case."""

    def policy(primitive: Any, *args: Any, **params: Any) -> bool:
        if primitive.name == _FUSED_ATTENTION:
            queries, keys, *_ = args
            return ("attention" if queries.shape == keys.shape else "cross_attention") in names
        return primitive.name == "name" and params["name"] in names

    return policy
