"""How do devices that share a clip, or weights, compute as one? Collectives inside of a shard_map.

Context: each of ``context`` devices holds an equal part of every latent frame's tokens, the last
parts filled up with zeros where they do not divide, so that what has a row a frame (modulation)
stays as it is. Around self-attention an all-to-all gives each device all tokens of some heads, the
filling cut off (DeepSpeed-Ulysses, Jacobs et al. 2023): no mask, the same kernel. FSDP: each of
``fsdp`` devices holds some rows of a block's matrices and gathers the others when the block runs,
in the backward pass again; gradients come back summed, each row where it lies.

Values are those of one device up to the order of sums over devices. Differentiated, every device
takes its own loss for its own: the mean over all devices of these gradients is that of the loss,
times ``fsdp`` for rows that lie on one device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

DATA, FSDP, CONTEXT = AXES = ("data", "fsdp", "context")  # of the mesh


@dataclass(frozen=True)
class Shards:
    """Among how many devices each is divided; 1 is one device, and needs no shard_map."""

    data: int = 1  # clips
    fsdp: int = 1  # clips, and rows of the blocks' matrices
    context: int = 1  # tokens of a clip

    def tie(self, x: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
        """Has the gradients of a block's weights computed before the block before it.

        XLA would put them off, to do beside sums over devices, and keep all activations for them.
        """
        return (x, weights) if self == ONE_DEVICE else _tie(x, weights)

    def gather_rows(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """Gathers the matrices of a block from the devices that hold their rows."""
        if self.fsdp == 1:
            return arrays
        return {
            name: jax.lax.all_gather(array, FSDP, axis=0, tiled=True)
            if is_split(name, array.ndim)
            else array
            for name, array in arrays.items()
        }


ONE_DEVICE = Shards()


@jax.custom_vjp
def _tie(x: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
    return x, weights


_tie.defvjp(
    lambda x, weights: ((x, weights), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)


def is_split(name: str, ndim: int) -> bool:
    """Whether an array of a block is divided among the devices of FSDP, by its first axis."""
    return ndim == 2 and name.rpartition(".")[2] == "weight"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a clip, T frames of P each, and the part of each frame that is here: M in all.

    Attributes:
        shards: who has the other parts.
        num_frames: T.
        count: L = T * P.
    """

    shards: Shards
    num_frames: int
    count: int

    def own(self, x: jax.Array, *, axis: int) -> jax.Array:
        """Takes the part that is here, along an axis of L; filled up with zeros."""
        if self.shards.context == 1:
            return x
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = x.reshape(*before, self.num_frames, -1, *after)
        x = _fill(x, axis + 1, self._part * self.shards.context)
        start = jax.lax.axis_index(CONTEXT) * self._part
        x = jax.lax.dynamic_slice_in_dim(x, start, self._part, axis=axis + 1)
        return x.reshape(*before, -1, *after)

    def all(self, x_BMC: jax.Array) -> jax.Array:
        """Gathers the parts of all devices, [B, L, C] on each of them."""
        if self.shards.context == 1:
            return x_BMC
        x_BTPC = x_BMC.reshape(len(x_BMC), self.num_frames, self._part, -1)
        x_BTPC = jax.lax.all_gather(x_BTPC, CONTEXT, axis=2, tiled=True)
        return x_BTPC[:, :, : self._per_frame].reshape(len(x_BMC), self.count, -1)

    def all_of_some_heads(self, x_BMHK: jax.Array) -> jax.Array:
        """From the part that is here of all heads to [B, L, H / context, K]."""
        if self.shards.context == 1:
            return x_BMHK
        B, _, H, K = x_BMHK.shape
        x_BTPHK = x_BMHK.reshape(B, self.num_frames, self._part, H, K)
        x_BTPHK = jax.lax.all_to_all(x_BTPHK, CONTEXT, split_axis=3, concat_axis=2, tiled=True)
        x_BTPHK = self._hide_filling(x_BTPHK)
        x_BLHK = x_BTPHK[:, :, : self._per_frame].reshape(B, self.count, -1, K)
        return checkpoint_name(x_BLHK, "exchanged")

    def some_of_all_heads(self, x_BLHK: jax.Array) -> jax.Array:
        """Back from ``all_of_some_heads``."""
        if self.shards.context == 1:
            return x_BLHK
        B, _, H, K = x_BLHK.shape
        x_BTPHK = x_BLHK.reshape(B, self.num_frames, self._per_frame, H, K)
        x_BTPHK = self._hide_filling(_fill(x_BTPHK, 2, self._part * self.shards.context))
        x_BTPHK = jax.lax.all_to_all(x_BTPHK, CONTEXT, split_axis=2, concat_axis=3, tiled=True)
        return checkpoint_name(x_BTPHK.reshape(B, -1, H * self.shards.context, K), "exchanged")

    def _hide_filling(self, x: jax.Array) -> jax.Array:
        """Has XLA exchange what it knows to be zeros, forward or backward, if all of a part is.

        XLA (jaxlib 0.10.2) gives such a part another layout than the others, and then refuses that.
        """
        is_whole = self._part * (self.shards.context - 1) >= self._per_frame
        return jax.lax.optimization_barrier(x) if is_whole else x

    @property
    def _per_frame(self) -> int:
        return self.count // self.num_frames

    @property
    def _part(self) -> int:
        return -(-self._per_frame // self.shards.context)


def _fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Appends zeros along an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
