"""Where can the weights of a whole transformer come from, one tensor at a time?

From arrays, a model folder, safetensors files (``weights.OfficialTensors``), or a base with LoRAs
merged into it: all of them have official names, one tensor per layer. Nothing but the tensor that
is read is in memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from wan22_jax.adapter import Adapter, check_fit
from wan22_jax.model.fp8 import is_float8
from wan22_jax.model_folder import (
    FLOAT8,
    abstract_transformer,
    check_arrays,
    open_array,
    read_model_card,
)
from wan22_jax.processes import is_held, to_host
from wan22_jax.weights import is_stacked, official_names, scale_of, stacked_shapes


@runtime_checkable
class Tensors(Protocol):
    """Tensors by official name, read when asked."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one."""
        ...


class HeldTensors:
    """Arrays of JAX or NumPy; one at a time is copied to the host."""

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = arrays
        self.shapes = {name: tuple(array.shape) for name, array in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads one, as it is."""
        return np.asarray(self._arrays[name])


class GatheredTensors:
    """Arrays of JAX; one at a time is copied to the host, from the devices of all processes.

    What a process does not hold whole, all have to read in the same order, so one of them reads, in
    the order of ``shapes``, and the others ``finish``, which it does too in the end.
    """

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = arrays
        self._left = [name for name, array in arrays.items() if not is_held(array)]
        self.shapes = {name: tuple(array.shape) for name, array in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads one, as it is."""
        if name in self._left:
            if name != self._left[0]:
                raise ValueError(f"{name} was read before {self._left[0]}")
            self._left.pop(0)
        return to_host(self._arrays[name])

    def finish(self) -> None:
        """Takes part in reading what is left, whatever became of what was read."""
        for name in list(self._left):
            self.read(name)


class FolderTensors:
    """The transformer of a model folder; what is float8 there is read as float32, exactly."""

    def __init__(self, folder: Path):
        """Raises BadInput if the folder is not a complete model."""
        card = read_model_card(folder)
        stored = abstract_transformer(card.transformer, float8=card.dtype == FLOAT8)
        check_arrays(folder / "transformer", stacked_shapes(stored))
        module = abstract_transformer(card.transformer, float8=False)
        self._path = (folder / "transformer").absolute()
        self._stored: dict[str, tuple[str, int | None]] = {}  # array, layer
        self.shapes: dict[str, tuple[int, ...]] = {}
        for stacked, shape in stacked_shapes(module).items():
            for layer, name in enumerate(official_names(stacked, shape)):
                self._stored[name] = (stacked, layer if is_stacked(stacked) else None)
                self.shapes[name] = shape[1:] if is_stacked(stacked) else shape

    def read(self, name: str) -> np.ndarray:
        """Reads one."""
        stacked, layer = self._stored[name]
        tensor = self._open(stacked, layer)
        if not is_float8(tensor.dtype):
            return tensor
        return tensor.astype(np.float32) * self._open(scale_of(stacked), layer)

    def _open(self, stacked: str, layer: int | None) -> np.ndarray:
        array = open_array(self._path / stacked)
        return (array if layer is None else array[layer]).read().result()


class MergedTensors:
    """A base with LoRAs merged into it: W + sum of strength * alpha / rank * B A, in float32."""

    def __init__(self, base: Tensors, adapters: Sequence[tuple[Adapter, float]]):
        """Raises BadInput if an adapter does not fit the base; strengths are factors, 1 as is."""
        self._base, self._adapters = base, adapters
        self.shapes = base.shapes
        for adapter, _ in adapters:
            check_fit(adapter, stacked_weight_shapes(base))

    def read(self, name: str) -> np.ndarray:
        """Reads one; what no adapter changes is as the base has it."""
        tensor = self._base.read(name)
        for adapter, strength in self._adapters:
            delta = adapter_delta(adapter, name)
            if delta is not None:
                tensor = tensor.astype(np.float32) + np.float32(strength) * delta
        return tensor


def adapter_delta(adapter: Adapter, name: str) -> np.ndarray | None:
    """Returns what an adapter adds to a weight, float32 [out, in]; None where it adds nothing."""
    block, _, rest = name.removeprefix("blocks.").partition(".")
    target = rest.removesuffix(".weight")
    if not name.startswith("blocks.") or not rest.endswith(".weight"):
        return None
    if target not in adapter.alphas:
        return None
    matrix_a, matrix_b = (
        adapter.matrices[f"blocks.{target}.{side}"][int(block)].astype(np.float32)
        for side in ("lora_A", "lora_B")
    )
    return (np.float32(adapter.scale(target)) * matrix_b) @ matrix_a


def stacked_weight_shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Returns [N, out, in] of each linear of the blocks, by target."""
    num_layers = count_layers(tensors)
    return {
        name.removeprefix("blocks.0.").removesuffix(".weight"): (num_layers, *shape)
        for name, shape in tensors.shapes.items()
        if name.startswith("blocks.0.") and name.endswith(".weight") and len(shape) == 2
    }


def count_layers(tensors: Tensors) -> int:
    """Returns the number of blocks."""
    blocks = {name.split(".")[1] for name in tensors.shapes if name.startswith("blocks.")}
    return len(blocks)


def read_float32(tensors: Tensors, name: str) -> np.ndarray:
    """Reads one in float32."""
    return tensors.read(name).astype(jnp.float32)
