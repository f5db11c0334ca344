"""Which tensor of a PyTorch checkpoint is which parameter, and how do its files become a module?

A parameter's path in its module, joined by dots, is its official name, except that the layers of a
stack share one entry: ``blocks.{i}.rest`` for every i is the leading axis of ``blocks.rest``. The
name tables translate official names to Diffusers' and back, one to one; nothing is transposed,
stripped or skipped. Source: Wan-Video/Wan2.2 (42bf4cf) and Diffusers 0.42.1, every name compared.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from wan22_jax.errors import BadInput
from wan22_jax.model.fp8 import is_float8
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.model.umt5 import UMT5, UMT5Config
from wan22_jax.model.vae import VAEConfig, WanVAE
from wan22_jax.quantised import WeightFiles
from wan22_jax.tensor_files import SafetensorsFiles, TensorFiles

Network = Literal["transformer", "vae", "text_encoder"]
Shapes = Mapping[str, tuple[int, ...]]
Pairs = Sequence[tuple[str, str]]

_EMBEDDING = "token_embedding.weight"
_TIED_EMBEDDING = "encoder.embed_tokens.weight"  # a second name that Hugging Face gives to it


def load_transformer(
    path: Path | str, config: TransformerConfig, *, dtype: DTypeLike = jnp.float32
) -> WanTransformer:
    """Loads the transformer from a safetensors file or a folder of shards, in either naming.

    In a 16-bit dtype the parameters that ``keeps_float32`` names stay float32. Raises BadInput if
    a file is broken, or once for all names that are missing, unknown or have another shape.
    """
    module = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    _load(module, "transformer", path, dtype, transformer_names())
    return module


def load_vae(path: Path | str, config: VAEConfig, *, dtype: DTypeLike = jnp.float32) -> WanVAE:
    """Loads the VAE; see ``load_transformer``."""
    module = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    _load(module, "vae", path, dtype, vae_names(config.num_res_blocks))
    return module


def load_umt5(path: Path | str, config: UMT5Config, *, dtype: DTypeLike = jnp.float32) -> UMT5:
    """Loads the text encoder; see ``load_transformer``."""
    module = nnx.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))
    _load(module, "text_encoder", path, dtype, text_encoder_names())
    return module


def keeps_float32(name: str) -> bool:
    """Whether this transformer parameter is float32 in a model of any dtype.

    The original computes with those parameters in float32; the scale of a float8 weight is one.
    """
    return name.startswith(("time_embedding.", "time_projection.", "head.")) or name.endswith(
        (".modulation", ".weight_scale")
    )


def stored_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype that a parameter has in a model of this dtype."""
    return jnp.dtype(jnp.float32 if keeps_float32(name) else dtype)


def stored_leaves(module: nnx.Module, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes each parameter in a model of this dtype, by its path; what is float8 stays so."""
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype if is_float8(leaf.dtype) else stored_dtype(name, dtype)
        )
        for name, leaf in _flat_parameters(module).items()
    }


# Parameters of a module


def stacked_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its path; a stack of layers is one entry."""
    return {name: tuple(leaf.shape) for name, leaf in _flat_parameters(module).items()}


def parameter_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter by its official name; layers are apart."""
    return {
        name: shape[1:] if is_stacked(stacked_name) else shape
        for stacked_name, shape in stacked_shapes(module).items()
        for name in official_names(stacked_name, shape)
    }


def is_stacked(stacked_name: str) -> bool:
    """Whether the leading axis of this entry is the layer."""
    return stacked_name.startswith("blocks.")


def official_names(stacked_name: str, shape: Sequence[int]) -> list[str]:
    """Returns the official names that an entry holds: one a layer, or itself."""
    if not is_stacked(stacked_name):
        return [stacked_name]
    rest = stacked_name.removeprefix("blocks.")
    return [f"blocks.{layer}.{rest}" for layer in range(shape[0])]


def scale_of(weight_name: str) -> str:
    """Returns the name of the scale of a float8 weight."""
    return f"{weight_name}_scale"


def set_parameters(module: nnx.Module, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Puts an array into every parameter of a module, by its path; the names must be the same."""
    flat_state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    values = {path: leaf.replace(arrays[".".join(map(str, path))]) for path, leaf in flat_state}
    nnx.update(module, nnx.from_flat_state(values))


def _flat_parameters(module: nnx.Module) -> dict[str, Any]:
    flat_state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): leaf for path, leaf in flat_state}


# Names


class NameTable:
    """A one-to-one table of official and Diffusers names, written as pairs of patterns.

    What a field such as ``{i}`` or ``{p}`` stands for is in ``_FIELDS``.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        pairs = tuple(pairs)
        self._by_official = [(_compile(ours), theirs) for ours, theirs in pairs]
        self._by_diffusers = [(_compile(theirs), ours) for ours, theirs in pairs]

    def to_diffusers(self, official: str) -> str:
        """Translates an official name; KeyError if it is none."""
        return _translate(official, self._by_official)

    def to_official(self, diffusers: str) -> str:
        """Translates a Diffusers name; KeyError if it is none."""
        return _translate(diffusers, self._by_diffusers)

    def official_by_stored(self, stored: Iterable[str]) -> dict[str, str]:
        """Detects the naming of a checkpoint; maps the names that it knows to official ones."""
        stored = list(stored)
        official = {name: name for name in stored if _matches(name, self._by_official)}
        diffusers = [name for name in stored if _matches(name, self._by_diffusers)]
        if len(official) >= len(diffusers):
            return official
        return {name: self.to_official(name) for name in diffusers}


@cache
def transformer_names() -> NameTable:
    """The transformer; Diffusers numbers its norms by their order of use."""
    attention = (
        ("{qkv}.{p}", "to_{qkv}.{p}"),
        ("o.{p}", "to_out.0.{p}"),
        ("norm_{qk}.weight", "norm_{qk}.weight"),
    )
    branches = (("self_attn", "attn1"), ("cross_attn", "attn2"))
    return NameTable(
        (
            ("patch_embedding.{p}", "patch_embedding.{p}"),
            ("text_embedding.0.{p}", "condition_embedder.text_embedder.linear_1.{p}"),
            ("text_embedding.2.{p}", "condition_embedder.text_embedder.linear_2.{p}"),
            ("time_embedding.0.{p}", "condition_embedder.time_embedder.linear_1.{p}"),
            ("time_embedding.2.{p}", "condition_embedder.time_embedder.linear_2.{p}"),
            ("time_projection.1.{p}", "condition_embedder.time_proj.{p}"),
            ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
            ("blocks.{i}.norm3.{p}", "blocks.{i}.norm2.{p}"),
            *_join((("blocks.{i}", "blocks.{i}"),), _join(branches, attention)),
            ("blocks.{i}.ffn.0.{p}", "blocks.{i}.ffn.net.0.proj.{p}"),
            ("blocks.{i}.ffn.2.{p}", "blocks.{i}.ffn.net.2.{p}"),
            ("head.modulation", "scale_shift_table"),
            ("head.head.{p}", "proj_out.{p}"),
        )
    )


@cache
def vae_names(num_res_blocks: int) -> NameTable:
    """The VAE; the official index of a resampling is the number of residual blocks before it."""
    down, up = num_res_blocks, num_res_blocks + 1
    residual = (
        ("residual.0.gamma", "norm1.gamma"),
        ("residual.2.{p}", "conv1.{p}"),
        ("residual.3.gamma", "norm2.gamma"),
        ("residual.6.{p}", "conv2.{p}"),
        ("shortcut.{p}", "conv_shortcut.{p}"),
    )
    residual_blocks = (
        ("encoder.downsamples.{s}.downsamples.{r}", "encoder.down_blocks.{s}.resnets.{r}"),
        ("decoder.upsamples.{s}.upsamples.{r}", "decoder.up_blocks.{s}.resnets.{r}"),
        ("{side}.middle.0", "{side}.mid_block.resnets.0"),
        ("{side}.middle.2", "{side}.mid_block.resnets.1"),
    )
    resamplings = (
        (f"encoder.downsamples.{{s}}.downsamples.{down}", "encoder.down_blocks.{s}.downsampler"),
        (f"decoder.upsamples.{{s}}.upsamples.{up}", "decoder.up_blocks.{s}.upsampler"),
    )
    resampling = (("resample.1.{p}", "resample.1.{p}"), ("time_conv.{p}", "time_conv.{p}"))
    attention = tuple((name, name) for name in ("norm.gamma", "to_qkv.{p}", "proj.{p}"))
    return NameTable(
        (
            ("conv1.{p}", "quant_conv.{p}"),
            ("conv2.{p}", "post_quant_conv.{p}"),
            ("{side}.conv1.{p}", "{side}.conv_in.{p}"),
            *_join(residual_blocks, residual),
            *_join(resamplings, resampling),
            *_join((("{side}.middle.1", "{side}.mid_block.attentions.0"),), attention),
            ("{side}.head.0.gamma", "{side}.norm_out.gamma"),
            ("{side}.head.2.{p}", "{side}.conv_out.{p}"),
        )
    )


@cache
def text_encoder_names() -> NameTable:
    """The text encoder; its Diffusers names are Hugging Face's."""
    block = (
        ("norm1.weight", "layer.0.layer_norm.weight"),
        ("attn.{qkvo}.weight", "layer.0.SelfAttention.{qkvo}.weight"),
        (
            "pos_embedding.embedding.weight",
            "layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        ("norm2.weight", "layer.1.layer_norm.weight"),
        ("ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),
        ("ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
        ("ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
    )
    return NameTable(
        (
            (_EMBEDDING, "shared.weight"),
            *_join((("blocks.{i}", "encoder.block.{i}"),), block),
            ("norm.weight", "encoder.final_layer_norm.weight"),
        )
    )


# What a field of a pattern stands for.
_NUMBER = "0|[1-9][0-9]*"
_FIELDS = {
    "i": _NUMBER,  # block
    "s": _NUMBER,  # stage
    "r": _NUMBER,  # residual block of a stage
    "p": "weight|bias",
    "qk": "q|k",
    "qkv": "q|k|v",
    "qkvo": "q|k|v|o",
    "side": "encoder|decoder",
}


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)  # literal, field, literal, field, ... literal
    return re.compile(
        "".join(
            f"(?P<{part}>{_FIELDS[part]})" if index % 2 else re.escape(part)
            for index, part in enumerate(parts)
        )
    )


def _translate(name: str, table: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, target in table:
        if match := pattern.fullmatch(name):
            return target.format(**match.groupdict())
    raise KeyError(name)


def _matches(name: str, table: Iterable[tuple[re.Pattern[str], str]]) -> bool:
    return any(pattern.fullmatch(name) for pattern, _ in table)


def _join(heads: Pairs, tails: Pairs) -> list[tuple[str, str]]:
    return [
        (f"{our_head}.{our_tail}", f"{their_head}.{their_tail}")
        for our_head, their_head in heads
        for our_tail, their_tail in tails
    ]


# Tensors of a checkpoint


@dataclass(frozen=True)
class OfficialTensors:
    """The tensors of one network under their official names, whatever naming the files have."""

    files: TensorFiles
    stored_names: Mapping[str, str]  # by official name
    unknown: tuple[str, ...]  # names in the files that are in neither naming

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by official name."""
        return {name: self.files.shapes[stored] for name, stored in self.stored_names.items()}

    def read(
        self, name: str, rows: slice = slice(None), *, dtype: DTypeLike | None = None
    ) -> np.ndarray:
        """Reads some rows (leading axis) of the tensor with this official name.

        Raises BadInput if a number is infinite or NaN, or becomes so in ``dtype``.
        """
        stored = self.stored_names[name]
        what = f"{self.files.where}: {stored}"
        return cast_finite(
            self.files.read(stored, rows), dtype, what=what, remedy="download it again"
        )


def name_tensors(files: TensorFiles, network: Network, table: NameTable) -> OfficialTensors:
    """Detects the naming of the files and gives every tensor its official name.

    Raises BadInput if a tensor is quantised in a way that ``quantised.WeightFiles`` cannot undo,
    or if a tied copy of the text encoder's embedding differs from it.
    """
    files = WeightFiles(files, network)
    official = table.official_by_stored(files.shapes)
    unknown = [name for name in files.shapes if name not in official]
    tensors = OfficialTensors(files, {ours: stored for stored, ours in official.items()}, ())
    if network == "text_encoder" and _TIED_EMBEDDING in unknown and _EMBEDDING in tensors.shapes:
        _check_tied(tensors)
        unknown.remove(_TIED_EMBEDDING)
    return OfficialTensors(files, tensors.stored_names, tuple(unknown))


def check_tensors(tensors: OfficialTensors, network: Network, expected: Shapes) -> None:
    """Raises one BadInput for every name that is missing, unknown or has another shape."""
    found = tensors.shapes
    missing = [name for name in expected if name not in found]
    unknown = [*tensors.unknown, *(name for name in found if name not in expected)]
    reshaped = [
        f"{name} expected {list(shape)} found {list(found[name])}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    lists = "; ".join(
        f"{len(names)} {fault}: {', '.join(_gather_layers(names))}"
        for fault, names in faults.items()
        if names
    )
    if lists:
        raise BadInput(f"{tensors.files.where}: {_likely_cause(network, found, expected)}: {lists}")


def _likely_cause(network: Network, found: Shapes, expected: Shapes) -> str:
    if network == "transformer":
        key = "patch_embedding.weight"
        dim, channels = (*found.get(key, ()), 0, 0)[:2]
        if found.get(key) != expected.get(key) and is_other_model(dim, channels):
            return OTHER_MODEL
    if network == "vae" and found.get("conv2.weight", ())[:1] == (16,):
        return "this is the Wan2.1 VAE (16 latent channels), used by the 14B models; " + _REMEDY
    part = network.replace("_", " ")
    return f"these are not the tensors of the {part} that the config describes; " + _REMEDY


def is_other_model(dim: int, in_channels: int) -> bool:
    """Whether these sizes are those of a Wan2.1 or of a Wan2.2 14B transformer."""
    return dim == 5120 or in_channels in (16, 36)


_REMEDY = "download Wan2.2-TI2V-5B again, complete"
OTHER_MODEL = (
    "this is Wan2.1 or Wan2.2 14B; wan22_jax trains TI2V-5B only, download Wan-AI/Wan2.2-TI2V-5B"
)


def _gather_layers(entries: Iterable[str]) -> list[str]:
    """Writes entries that differ in their layer only as one: blocks.{0-29}.norm3.bias."""
    layers: dict[str, list[int]] = {}
    for entry in entries:
        match = re.match(r"((?:encoder\.)?blocks?)\.(\d+)\.(.*)", entry)
        key = f"{match[1]}.{{}}.{match[3]}" if match else entry
        layers.setdefault(key, []).extend([int(match[2])] if match else [])
    return [
        key.replace("{}", _write_numbers(numbers), 1) if numbers else key
        for key, numbers in layers.items()
    ]


def _write_numbers(numbers: Sequence[int]) -> str:
    """Writes 0, 1, 2, 5 as {0-2,5}; one number as itself."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    text = ",".join("-".join(map(str, ends)) for ends in ranges)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _check_tied(tensors: OfficialTensors) -> None:
    shape = tensors.shapes[_EMBEDDING]
    step = max(1, 2**26 // max(1, shape[-1]))
    same = tensors.files.shapes[_TIED_EMBEDDING] == shape and all(
        np.array_equal(
            tensors.read(_EMBEDDING, slice(start, start + step)),
            tensors.files.read(_TIED_EMBEDDING, slice(start, start + step)),
        )
        for start in range(0, shape[0], step)
    )
    if not same:
        raise BadInput(
            f"{tensors.files.where}: {_TIED_EMBEDDING} differs from shared.weight, to which it "
            "is tied in the umT5 encoder; " + _REMEDY
        )


def _load(
    module: nnx.Module, network: Network, path: Path | str, dtype: DTypeLike, table: NameTable
) -> None:
    tensors = name_tensors(SafetensorsFiles(Path(path)), network, table)
    check_tensors(tensors, network, parameter_shapes(module))
    set_parameters(
        module,
        {
            name: jnp.asarray(_read_stacked(tensors, name, shape, stored_dtype(name, dtype)))
            for name, shape in stacked_shapes(module).items()
        },
    )


def _read_stacked(
    tensors: OfficialTensors, name: str, shape: tuple[int, ...], dtype: jnp.dtype
) -> np.ndarray:
    if not is_stacked(name):
        return tensors.read(name, dtype=dtype)
    stacked = np.empty(shape, dtype)
    for layer, official in enumerate(official_names(name, shape)):
        stacked[layer] = tensors.read(official, dtype=dtype)
    return stacked


def cast_finite(
    array: np.ndarray, dtype: DTypeLike | None, *, what: str, remedy: str
) -> np.ndarray:
    """Casts numbers, to their own dtype if it is None; none of them may be infinite or NaN.

    Args:
        array: any floating point numbers.
        dtype: that they get.
        what: names them, for messages.
        remedy: what to do if the numbers themselves are wrong.

    Raises:
        BadInput: a number is infinite or NaN, or becomes so.
    """
    with np.errstate(over="ignore"):
        cast = array if dtype is None else array.astype(dtype, copy=False)
    if not _are_finite(cast):
        if _are_finite(array):
            wider = {"float16": "choose bfloat16", "bfloat16": "choose float32"}
            remedy = wider.get(cast.dtype.name, remedy)
            raise BadInput(f"{what} has values beyond {cast.dtype}; {remedy}")
        raise BadInput(f"{what} has infinite or NaN values; {remedy}")
    return cast


def _are_finite(block: np.ndarray) -> bool:
    if block.dtype != jnp.bfloat16:
        return bool(np.isfinite(block).all())
    # NumPy takes four times as long for a dtype that is not its own.
    magnitudes = block.view(np.uint16) & 0x7FFF
    return bool((magnitudes < _INFINITE_BFLOAT16).all())


_INFINITE_BFLOAT16 = 0x7F80  # and NaN above it
