"""Running the stack of blocks: what the backward pass keeps, and what waits in host memory.

A block's activations are kept, computed again, or kept in pinned host memory; its frozen weights
live on the device or in pinned host memory, from which both passes fetch them when it is their
turn. Values never depend on any of this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import Offloadable, Recompute, checkpoint_name

Tree = Any  # of arrays
# block(x, trainable weights, frozen weights in one or two trees, context) -> x of the same shape
Block = Callable[[jax.Array, Tree, Tree, Tree], jax.Array]

_ATTENTION = ("attention",)
_MATMULS = ("low_rank", "qkv", "rotated", "o", "cross_q", "cross_o", "ffn_in")
_SMALL = ("modulation", "cross_kv")  # not worth the way to the host
_INPUT = "block_input"
_FUSED_ATTENTION = "dot_product_attention_fwd_wrapper"  # cuDNN's: output and softmax statistics


@dataclass(frozen=True)
class Remat:
    """What the backward pass finds of each block, beside its input."""

    # Values by their checkpoint_name. None keeps everything, but of fetched blocks only what
    # "keep_matmuls" does. Nothing in float8 may be named: jax.checkpoint passes what it keeps
    # through reduce_precision, which makes NaN of any e4m3fn over 240.
    keep: tuple[str, ...] | None = None
    on_host: bool = False  # the input and what is kept go to pinned host memory


# By the value of the config's ``activation_checkpointing``.
POLICIES: dict[bool | str, Remat] = {
    False: Remat(),
    True: Remat(keep=()),
    "unsloth": Remat(keep=(), on_host=True),
    "keep_attention": Remat(keep=_ATTENTION),
    "offload_attention": Remat(keep=_ATTENTION, on_host=True),
    "keep_qkv": Remat(keep=(*_ATTENTION, "low_rank", "qkv")),
    "keep_matmuls": Remat(keep=(*_ATTENTION, "cross_attention", *_MATMULS, *_SMALL)),
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
        context: what all blocks read alike.
        remat: what the backward pass keeps; only what runs as a stack can keep it on the host.
    """
    start = 0
    for part in parts:
        count = len(part) if isinstance(part, list) else part.num_blocks
        layers = jax.tree.map(lambda leaf: leaf[start : start + count], trainable)  # noqa: B023
        start += count
        if isinstance(part, list):
            x = _run_unrolled(block, remat, x, layers, part, context)
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
        run = jax.checkpoint(run, policy=_keeps(remat.keep, on_host=False))
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
    def body(x: jax.Array, layer: tuple[Tree, Stack]) -> tuple[jax.Array, None]:
        trainable, (on_device, on_host) = layer
        fetched = jax.device_put(on_host, jax.memory.Space.Device)
        x = checkpoint_name(x, _INPUT)
        return block(x, trainable, (on_device, fetched), context), None

    keep = remat.keep
    if keep is None and jax.tree.leaves(stack.on_host):
        # With everything else, fetched weights and what is joined of them would be kept.
        keep = POLICIES["keep_matmuls"].keep
    if keep is not None:
        policy = _keeps(keep, on_host=remat.on_host)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, x, (trainable, stack))[0]


def _keeps(names: tuple[str, ...], *, on_host: bool) -> Callable[..., Any]:
    """Makes a policy for ``jax.checkpoint``; on the device it keeps a block's input in any case."""
    names = (*names, _INPUT) if on_host else names

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        if primitive.name == _FUSED_ATTENTION:
            queries, keys, *_ = args
            kept = ("attention" if queries.shape == keys.shape else "cross_attention") in names
        else:
            kept = primitive.name == "name" and params["name"] in names
        if not on_host:
            return kept
        return Offloadable(src="device", dst="pinned_host") if kept else Recompute

    return policy
