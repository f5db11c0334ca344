"""Training with bfloat16 weights: how do updates smaller than a rounding step survive?

bfloat16 has 8 bits of precision: of a weight of 1, an update below 0.002 would be lost whenever it
is rounded to nearest. Two remedies, both with every number of the optimizer's state in bfloat16
too, and all arithmetic in float32:

- "stochastic" rounds up with the probability that makes the expected value exact
  (Zamirai et al. 2020, "Revisiting BFloat16 Training");
- "kahan" keeps what rounding cost in a second bfloat16 array and adds it to the next update
  (the same paper, algorithm 3; Kahan 1965). The moments are rounded stochastically in both.

The random bits are a function of (seed, step, name of the weight, position in it) alone.
"""

import hashlib
import re
import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Rounding = Literal["stochastic", "kahan"]


class RoundedState(NamedTuple):
    """State of ``round_to_bfloat16``."""

    step: jax.Array  # int32, steps done
    inner: optax.OptState  # its arrays, but for scalars, in bfloat16 where the weight is
    lost: Any  # by weight, what rounding has cost so far, bfloat16; None without Kahan


def round_to_bfloat16(
    inner: optax.GradientTransformation, *, rounding: Rounding, seed: int
) -> optax.GradientTransformation:
    """Wraps an optimizer so that it trains bfloat16 weights; float32 ones it trains as they are.

    The updates that it returns are float32, and such that ``optax.apply_updates`` gives exactly
    the rounded weights.

    Args:
        inner: sees float32 gradients, weights and state.
        rounding: of the weights; see the module.
        seed: of the random bits.
    """

    def init(params: Any) -> RoundedState:
        narrow = _narrow_paths(params)
        state = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(_state_dtype(path, leaf, narrow)),
            inner.init(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)),
        )
        lost = None
        if rounding == "kahan":  # nothing is lost where the weight is float32
            lost = jax.tree.map(
                lambda leaf: jnp.zeros(
                    leaf.shape if leaf.dtype == jnp.bfloat16 else (), leaf.dtype
                ),
                params,
            )
        return RoundedState(jnp.zeros((), jnp.int32), state, lost)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RoundedState]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        words = _draw_words(key, params)
        narrow = _narrow_paths(params)
        to_wide = lambda leaf: leaf.astype(jnp.float32)  # noqa: E731
        wide_state = jax.tree.map(
            lambda leaf: to_wide(leaf) if leaf.dtype == jnp.bfloat16 else leaf, state.inner
        )
        updates, new_inner = inner.update(
            jax.tree.map(to_wide, updates), wide_state, jax.tree.map(to_wide, params)
        )
        new_inner = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                round_stochastically(leaf, _salt(words, path))
                if _state_dtype(path, leaf, narrow) == jnp.bfloat16
                else leaf
            ),
            new_inner,
        )
        lost = params if state.lost is None else state.lost

        def step(path: tuple, weight: jax.Array, update: jax.Array, lost: jax.Array) -> tuple:
            if weight.dtype != jnp.bfloat16:
                return update, lost
            weight = to_wide(weight)
            if rounding == "stochastic":
                rounded = round_stochastically(weight + update, _salt(words, path))
                return to_wide(rounded) - weight, lost
            update = update + to_wide(lost)
            # Not a cast and back, which XLA may leave out.
            moved = jax.lax.reduce_precision(weight + update, 8, 7) - weight
            return moved, (update - moved).astype(jnp.bfloat16)

        pairs = jax.tree_util.tree_map_with_path(step, params, updates, lost)
        updates, lost = (
            jax.tree.map(lambda _, pair: pair[index], params, pairs)  # noqa: B023
            for index in range(2)
        )
        new_lost = None if state.lost is None else lost
        return updates, RoundedState(state.step + 1, new_inner, new_lost)

    return optax.GradientTransformation(init, update)


def round_stochastically(x: jax.Array, words: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down, so that the expected value is x.

    The 16 bits below bfloat16's are compared with random ones, made from two uint32 ``words``:
    their sum carries with the probability that they stand for. Infinity stays infinity and NaN
    stays NaN.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    carried = (bits + (_hash_bits(x.shape, words) >> 16)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(carried, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _hash_bits(shape: tuple[int, ...], words: jax.Array) -> jax.Array:
    """32 random bits an element: MurmurHash3's finalizer on its position, twice.

    JAX's own generator would write its bits to memory; these are computed where they are used.
    """
    position = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in range(len(shape) - 1, -1, -1):
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return _mix(_mix(position ^ words[0]) ^ words[1])


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _draw_words(key: jax.Array, params: Any) -> dict[str, jax.Array]:
    """Two random words for each block, and for what is in none.

    The barrier has them read from memory: were they a part of the kernels that round, XLA would
    compile each of 2,500 arrays' anew, and not once for the arrays of one shape in all blocks.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    blocks = sorted({_split_path(path)[0] for path, _ in paths})
    words = {
        b: jax.random.key_data(jax.random.fold_in(key, zlib.crc32(b.encode()))) for b in blocks
    }
    return jax.lax.optimization_barrier(words)


def _salt(words: dict[str, jax.Array], path: tuple) -> jax.Array:
    """The words of an array: of its block and, of all blocks alike, its name."""
    block, name = _split_path(path)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return words[block] ^ np.frombuffer(digest, "<u4")


def _split_path(path: tuple) -> tuple[str, str]:
    name = jax.tree_util.keystr(path)
    block = re.search(r"blocks\.(\d+)\.", name)
    return (block[1], name.replace(block[0], "")) if block else ("", name)


def _narrow_paths(params: Any) -> list[tuple]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [path for path, leaf in leaves if leaf.dtype == jnp.bfloat16]


def _state_dtype(path: tuple, leaf: jax.Array, narrow: list[tuple]) -> jnp.dtype:
    """What an array of the inner state is kept in: bfloat16 if it belongs to such a weight."""
    is_narrow = leaf.ndim > 0 and any(path[-len(own) :] == own for own in narrow)
    return jnp.dtype(jnp.bfloat16 if is_narrow and leaf.dtype == jnp.float32 else leaf.dtype)
