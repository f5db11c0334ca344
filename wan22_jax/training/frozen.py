"""Where do the weights that do not train lie, and in which form does the train step read them?"""

from typing import Any, NamedTuple, cast

import jax
from flax import nnx
from jax.sharding import NamedSharding

from wan22_jax.model.block_weights import Arrays, join_linears, named_arrays
from wan22_jax.model.remat import POLICIES, Streamed
from wan22_jax.sharding import of_array, put


class Frozen(NamedTuple):
    """The weights that do not train, where the step reads them; see ``place_frozen``."""

    rest: nnx.State  # all but the blocks, or with them if no parts; all empty if all train
    parts: tuple[list[Arrays] | Streamed, ...] = ()


def place_frozen(
    frozen: nnx.State,
    *,
    activation_checkpointing: bool | str,
    blocks_to_swap: int,
    sharding: NamedSharding,
    in_loop: bool = False,
) -> Frozen:
    """Puts the frozen weights where and how the step reads them.

    Args:
        frozen: from ``split_model``; arrays of the device or of NumPy.
        activation_checkpointing: a key of ``remat.POLICIES``; says whether activations wait on the
            host.
        blocks_to_swap: so many last blocks keep their matrices in pinned host memory, the rest of
            their weights is small; more than there are means all.
        sharding: of what every device has; the blocks' matrices are divided as ``of_array`` says.
        in_loop: leave the blocks' weights in stacks, of which a loop runs one block after the
            other: smaller programs, somewhat slower; nothing may wait on the host.
    """
    if in_loop:
        placed = [
            (path, leaf.replace(put(leaf[...], _place(path, leaf[...].shape, sharding))))
            for path, leaf in nnx.to_flat_state(frozen)
        ]
        return Frozen(nnx.from_flat_state(placed))
    stacked, rest = nnx.split_state(frozen, lambda path, _: path[0] == "blocks", ...)
    by_name = named_arrays(cast(nnx.State, stacked["blocks"]))
    num_blocks = len(by_name["modulation"])
    resident = max(0, num_blocks - blocks_to_swap)
    host = sharding.with_memory_kind("pinned_host")

    def place(name: str, array: Any, sharding: NamedSharding) -> jax.Array:
        return put(array, of_array(sharding, name, array.shape))

    def put_row(index: int, *, swap: bool) -> tuple[Arrays, Arrays]:
        row = join_linears({name: array[index] for name, array in by_name.items()})
        matrices = {name for name, array in row.items() if swap and array.ndim == 2}
        return (
            {name: place(name, row[name], sharding) for name in row.keys() - matrices},
            {name: place(name, row[name], host) for name in matrices},
        )

    rows = [put_row(index, swap=index >= resident) for index in range(num_blocks)]
    start = 0 if POLICIES[activation_checkpointing].on_host else resident
    parts: list[list[Arrays] | Streamed] = []
    if start > 0:
        parts.append([on_device for on_device, _ in rows[:start]])
    if start < num_blocks:
        on_device, on_host = map(list, zip(*rows[start:], strict=True))
        parts.append(Streamed(on_device, on_host))
    without_blocks = nnx.merge_state(rest, jax.tree.map(lambda leaf: leaf[:0], stacked))
    return Frozen(put(without_blocks, sharding), tuple(parts))


def gather_frozen(frozen: Frozen) -> Frozen:
    """Copies what waits in host memory to the device; to the same values, without streaming."""

    def to_device(leaf: jax.Array) -> jax.Array:
        place = cast(NamedSharding, leaf.sharding)
        return jax.device_put(leaf, NamedSharding(place.mesh, place.spec))

    def gather(part: list[Arrays] | Streamed) -> list[Arrays]:
        if isinstance(part, list):
            return part
        on_host = jax.tree.map(to_device, part.on_host)
        return [dict(here) | there for here, there in zip(part.on_device, on_host, strict=True)]

    return frozen._replace(parts=tuple(map(gather, frozen.parts)))


def _place(path: tuple, shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    is_matrix = path[0] == "blocks" and len(shape) == 3  # a stack of vectors has two axes
    return of_array(sharding, str(path[-1]), shape) if is_matrix else sharding
