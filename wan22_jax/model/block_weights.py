"""How do weights get from the stack of all blocks to the matmuls of one?

Linears that read the same rows run as one matmul: q, k and v of self-attention are
"self_attn.qkv", k and v of the text are "cross_attn.kv". The parameters keep the names of the
checkpoint (``transformer.Block``); what a block computes with is ``BlockWeights``.

Arrays are joined by ``join_linears``: once, when ``training.step.place_frozen`` puts them
where the step reads them, or else block by block in the loop (sampling, and full fine-tuning, whose
float32 masters are rounded there too). Adapters are joined,
scaled and rounded for all blocks at once, at the start of each pass, by ``join_adapters``; of these
``remat.run_blocks`` hands each block its rows twice: rounded, to compute with, and in float32,
which nothing reads but for which the gradient is taken, so that it is not rounded.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from wan22_jax.model.layers import Linear
from wan22_jax.model.linear import LinearWeights
from wan22_jax.model.lora import Dropout, LowRank, join_low_rank, round_low_rank

Arrays = Mapping[str, Any]  # by name within a block; of JAX, or of NumPy until they are placed
Adapters = Mapping[str, tuple[LowRank | None, LowRank | None]]  # rounded, trained

_KEPT_FLOAT32 = ("modulation", "weight_scale")
_JOINED = (("self_attn", "qkv"), ("cross_attn", "kv"))  # module, names of its linears


class BlockWeights(NamedTuple):
    """What one block computes with."""

    arrays: Arrays  # from ``join_linears``
    adapters: Adapters
    dropout: Dropout | None = None  # of this block

    def linear(self, name: str) -> LinearWeights:
        """Returns what a linear, or several that are joined, computes with."""
        scale, bias = (self.arrays.get(f"{name}.{leaf}") for leaf in ("weight_scale", "bias"))
        dropout = self.dropout
        if dropout is not None:  # 10 numbers for each linear, or for those that are joined
            dropout = dropout.at(10 * list(self.adapters).index(name))
            if name == "cross_attn.kv":  # which reads the text's rows
                dropout = dropout._replace(rows_L=None)
        return LinearWeights(
            self.arrays[f"{name}.weight"],
            None if scale is None else scale.reshape(-1),
            bias,
            *self.adapters[name],
            dropout,
        )

    def reads_rows(self, name: str) -> bool:
        """Whether a linear, or several that are joined, reads its input in more than float8."""
        return f"{name}.weight_scale" not in self.arrays or self.adapters[name][0] is not None


def named_arrays(state: nnx.State) -> Arrays:
    """Returns the arrays of a state by their dotted paths."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def join_linears(arrays: Arrays) -> Arrays:
    """Joins linears along their outputs: "self_attn.q.weight", ... become "self_attn.qkv.weight".

    Takes one block or a stack, of JAX or NumPy; what is joined already stays as it is.
    """
    joined = dict(arrays)
    for module, names in _JOINED:
        for leaf, axis in (("weight", -2), ("bias", -1), ("weight_scale", -1)):
            if f"{module}.{names[0]}.{leaf}" not in arrays:
                continue
            parts = [joined.pop(f"{module}.{name}.{leaf}") for name in names]
            library: Any = np if isinstance(parts[0], np.ndarray | np.generic) else jnp
            join = library.stack if leaf == "weight_scale" else library.concatenate
            joined[f"{module}.{names}.{leaf}"] = join(parts, axis=axis)
    return joined


def round_masters(arrays: Arrays, dtype: DTypeLike) -> Arrays:
    """Casts float32 masters of a block to the dtype that it computes in.

    What is read in float32 anyway stays, and so does what has another dtype: frozen weights are
    never cast.
    """
    return {
        name: array.astype(dtype)
        if array.dtype == jnp.float32 and name.rpartition(".")[2] not in _KEPT_FLOAT32
        else array
        for name, array in arrays.items()
    }


def join_adapters(linears: Mapping[str, Linear], *, dtype: DTypeLike) -> Adapters:
    """Joins the adapters of a block's linears, or of a stack's; one that is missing is zero.

    Args:
        linears: all of them, by name within a block.
        dtype: of the rounded adapters.
    """
    return join_lows({name: layer.low_rank for name, layer in linears.items()}, dtype=dtype)


def join_lows(lows: Mapping[str, LowRank | None], *, dtype: DTypeLike) -> Adapters:
    """Joins what the adapters of linears add, as ``join_adapters``."""
    trained = dict(lows)
    for module, names in _JOINED:
        parts = [trained.pop(f"{module}.{name}") for name in names]
        trained[f"{module}.{names}"] = join_low_rank(parts)
    return {name: (round_low_rank(each, dtype), each) for name, each in trained.items()}
