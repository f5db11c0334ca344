"""Which tensors does a .pth file hold, and how is one read without running what is in the file?

A .pth is a pickle, which can hold code. It is opened with ``weights_only``: PyTorch refuses every
object that is not a tensor or a plain container.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from wan22_jax.errors import BadInput
from wan22_jax.tensor_files import DTYPES


class TorchFile:
    """The tensors of a .pth state dict, memory-mapped through PyTorch for each read."""

    def __init__(self, where: Path):
        self.where, self.paths = where, [where]
        self.metadata: dict[str, str] = {}
        state = self._open()
        if not isinstance(state, dict) or not all(hasattr(v, "numpy") for v in state.values()):
            raise BadInput(f"{where}: a flat dictionary of tensors was expected; download it again")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.dtypes = {
            name: _SAFETENSORS_DTYPES.get(str(tensor.dtype), str(tensor.dtype))
            for name, tensor in state.items()
        }

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Reads some rows (leading axis) of a tensor, in its stored dtype."""
        import torch

        tensor = self._open()[name]
        if tensor.ndim:
            tensor = tensor[rows]
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dtype = DTYPES[self.dtypes[name]]
        bits = {1: torch.uint8, 2: torch.int16}  # what numpy has no dtype for goes as integers
        if dtype.itemsize in bits:
            tensor = tensor.view(bits[dtype.itemsize])
        return tensor.numpy().view(dtype)

    def _open(self) -> dict[str, Any]:
        # Opened anew each time: pages that one mapping has touched stay in memory as long as it.
        try:
            import torch
        except ImportError as error:
            raise BadInput(
                f"{self.where}: reading a .pth file needs PyTorch; install it with pip install "
                f"'wan22-jax[parity]', or put {self.where.stem}.safetensors beside it, or convert "
                "the folder of Wan-AI/Wan2.2-TI2V-5B-Diffusers, which needs no PyTorch"
            ) from error
        try:
            return torch.load(self.where, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"{self.where}: a complete PyTorch state dict was expected ({reason}); download "
                "it again"
            ) from error


_SAFETENSORS_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}
