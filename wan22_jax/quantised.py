"""Which tensors of a file are the weights of a network, and which numbers does a float8 one mean?

Files made for ComfyUI differ from the official ones in three ways, all of which end here:

- names may carry a prefix, ``model.diffusion_model.`` and the like (``_PREFIXES``);
- weights may be float8_e4m3fn or float8_e5m2. The number that is meant is the float8 number times
  a scale, in float32; the scale of ``<layer>.weight`` is ``<layer>.scale_weight`` or
  ``<layer>.weight_scale``: one number, one a row, or one for each equal part of a row. Without
  a scale the float8 number is meant as it stands;
- tensors that are no weights lie beside them: the scales, ``<layer>.scale_input`` or
  ``.input_scale`` (how to quantise activations when sampling), the marker ``scaled_fp8``, a JSON
  text a layer in ``<layer>.comfy_quant``, and the tokenizer's ``spiece_model``.

To leave a scale out trains on noise, so whatever is not understood is refused.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from wan22_jax.errors import BadInput
from wan22_jax.tensor_files import TensorFiles

SPIECE_MODEL = "spiece_model"
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae.", "model."),
    "text_encoder": (),
}
_PREFIXES_OF_OTHERS = ("model.diffusion_model.", "first_stage_model.", "vae.", "text_encoders.")
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_IGNORED = ("scale_input", "input_scale")
_MARKER = "scaled_fp8"
_LAYER_FORMAT = "comfy_quant"
_FILE_FORMATS = "_quantization_metadata"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("F64", "F32", "F16", "BF16")
_MOST_TEXT = 2**16
_REMEDY = "use the float32, float16 or bfloat16 file"


class WeightFiles:
    """The weights of one network among the tensors of its files, without prefix and quantisation.

    Args:
        files: of any of the kinds above.
        network: "transformer", "vae" or "text_encoder".

    Raises:
        BadInput: a tensor is of a kind that cannot be decoded, or a scale is not one.
    """

    def __init__(self, files: TensorFiles, network: str):
        self.where, self.metadata, self.paths = files.where, files.metadata, files.paths
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # of what read returns
        self._files = files
        self._scales: dict[str, np.ndarray] = {}  # float32, by the weight's name
        self._stored = self._strip_prefixes(network)
        self._check_formats()
        for name in self._stored:
            if not self._is_aside(name):
                self._add_weight(name)
        for name in self._stored:
            if name.rpartition(".")[2] in _SCALES:
                self._add_scale(name)
        self._check_siblings()

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Reads some rows (leading axis) of a weight: float32 if it is stored as float8."""
        block = self._files.read(self._stored[name], rows)
        if self._files.dtypes[self._stored[name]] not in _FLOAT8:
            return block
        scale = self._scales.get(name)
        if scale is None:
            return _decode(block, np.float32(1))
        if scale.ndim == 0:
            return _decode(block, scale)
        rows_of_scale = scale[rows]  # [rows, parts]
        parts = _decode(block, np.float32(1)).reshape(*rows_of_scale.shape, -1)
        with np.errstate(over="ignore"):
            return (parts * rows_of_scale[:, :, None]).reshape(block.shape)

    def _strip_prefixes(self, network: str) -> dict[str, str]:
        """Returns stored names by names without prefix; parts of other networks are left out."""
        stored = list(self._files.shapes)
        prefixes = [p for p in _PREFIXES[network] if any(name.startswith(p) for name in stored)]
        if not prefixes:
            return {name: name for name in stored}
        prefix = prefixes[0]
        others = tuple(other for other in _PREFIXES_OF_OTHERS if other != prefix)
        names: dict[str, str] = {}
        for name in stored:
            if name.startswith(prefix) or not name.startswith(others):
                bare = name.removeprefix(prefix)
                if bare in names:
                    raise BadInput(
                        f"{self.where}: {bare} is here with the prefix {prefix} and without; "
                        "keep one of them"
                    )
                names[bare] = name
        return names

    def _is_aside(self, name: str) -> bool:
        last = name.rpartition(".")[2]
        return last in (*_SCALES, *_IGNORED, _MARKER, _LAYER_FORMAT, SPIECE_MODEL)

    def _add_weight(self, name: str) -> None:
        stored = self._stored[name]
        dtype, shape = self._files.dtypes[stored], self._files.shapes[stored]
        if dtype not in (*_FLOATS, *_FLOAT8):
            raise BadInput(
                f"{self.where}: {stored} is {dtype}; weights quantised to anything but float8 "
                f"cannot be read, {_REMEDY}s"
            )
        if not math.prod(shape):
            raise BadInput(f"{self.where}: {stored} is empty, {list(shape)}; download it again")
        self.shapes[name], self.dtypes[name] = shape, "F32" if dtype in _FLOAT8 else dtype

    def _add_scale(self, name: str) -> None:
        stored, weight = self._stored[name], name.rpartition(".")[0] + ".weight"
        shape, dtype = self._files.shapes[stored], self._files.dtypes[stored]
        if weight not in self.shapes:
            raise BadInput(
                f"{self.where}: {stored} scales {weight}, which is missing; download it again"
            )
        if dtype not in _FLOATS:
            raise BadInput(
                f"{self.where}: {stored} is {dtype}, a scale in float32 was expected; {_REMEDY}"
            )
        of_weight = self.shapes[weight]
        if not _fits(shape, of_weight):
            raise BadInput(
                f"{self.where}: {stored} is {list(shape)}, which does not scale {list(of_weight)}; "
                + _REMEDY
            )
        with np.errstate(over="ignore"):
            scale = self._files.read(stored).astype(np.float32)
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise BadInput(
                f"{self.where}: {stored} is not a positive finite number; download it again"
            )
        if self._files.dtypes[self._stored[weight]] not in _FLOAT8:
            if (scale == 1).all():
                return
            raise BadInput(f"{self.where}: {stored} scales a weight that is not float8; " + _REMEDY)
        if weight in self._scales:
            raise BadInput(f"{self.where}: {stored} is a second scale of {weight}; " + _REMEDY)
        self._scales[weight] = scale.reshape(()) if scale.size == 1 else _by_rows(scale)

    def _check_formats(self) -> None:
        """What the file says of its own quantisation must be one of the two float8 formats."""
        formats = {}
        for name, stored in self._stored.items():
            if name.rpartition(".")[2] == _LAYER_FORMAT:
                if math.prod(self._files.shapes[stored]) > _MOST_TEXT:
                    raise BadInput(f"{self.where}: {stored} is too long for a text; {_REMEDY}")
                formats[stored] = self._parse(stored, self._files.read(stored).tobytes())
        text = self._files.metadata.get(_FILE_FORMATS)
        if text is not None:
            layers = self._parse(_FILE_FORMATS, text.encode()).get("layers")
            if not isinstance(layers, dict):
                raise BadInput(f"{self.where}: {_FILE_FORMATS} has no layers; {_REMEDY}")
            formats |= layers
        for name, entry in formats.items():
            known = isinstance(entry, dict) and entry.get("format") in _FORMATS
            if not known or entry.get("convrot"):
                raise BadInput(
                    f"{self.where}: {name} is quantised as {entry!r:.100}, which cannot be read; "
                    + _REMEDY
                )

    def _parse(self, name: str, text: bytes) -> dict[str, Any]:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(
                f"{self.where}: {name} is no JSON text ({error}); download it again"
            ) from error
        return content if isinstance(content, dict) else {}

    def _check_siblings(self) -> None:
        """Layers are quantised alike: where one has a scale, no other may have lost its own."""
        scaled = {_without_numbers(name): name for name in self._scales}
        for name in self.shapes:
            sibling = scaled.get(_without_numbers(name))
            is_float8 = self._files.dtypes[self._stored[name]] in _FLOAT8
            if sibling and is_float8 and name not in self._scales:
                raise BadInput(
                    f"{self.where}: {name} has no scale and {sibling} has one; download it again"
                )


def _fits(scale: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a scale is one number, or has one for each row or for equal parts of each."""
    if math.prod(scale) == 1:
        return True
    if not weight or scale[0] != weight[0]:
        return False
    parts = scale[1:]
    if len(parts) == 2 and parts[1] == 1:  # [rows, parts, 1]
        return len(weight) == 2 and parts[0] > 0 and weight[1] % parts[0] == 0
    return all(size == 1 for size in parts)


def _by_rows(scale: np.ndarray) -> np.ndarray:
    return scale.reshape(len(scale), -1)


def _decode(block: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
    """Multiplies float8 numbers by one scale, in float32, by looking up two of them at a time."""
    numbers = np.arange(256, dtype=np.uint8).view(block.dtype).astype(np.float32)
    with np.errstate(over="ignore"):  # whoever takes the numbers looks at whether they are finite
        numbers *= scale
    if block.size % 2:
        return numbers[block.reshape(-1).view(np.uint8)].reshape(block.shape)
    pairs = np.empty((256, 256, 2), np.float32)
    pairs[:, :, 0], pairs[:, :, 1] = numbers, numbers[:, None]  # the low byte comes first
    flat = block.reshape(-1).view(np.uint16)
    return pairs.view(np.uint64).reshape(-1)[flat].view(np.float32).reshape(block.shape)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)
