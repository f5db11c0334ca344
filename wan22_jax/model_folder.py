"""What is in a converted model folder, and how do its networks reach the device?

::

    <model>/model.json       ModelCard; written last, so its presence means the folder is complete
    <model>/transformer/     Orbax checkpoint: {parameter path: array}, layers stacked; in a float8
                             folder the linears of the blocks are float8_e4m3fn arrays, each
                             beside its weight_scale [layers], float32 powers of two
    <model>/vae/             the same, always float32
    <model>/text_encoder/    the same
    <model>/tokenizer/       files of the tokenizer, as they came

``wan22-convert`` writes it (convert/weights.py); ``weights.py`` explains the parameter paths.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from wan22_jax.errors import BadInput
from wan22_jax.model.fp8 import quantize_weight
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.model.umt5 import UMT5, UMT5Config
from wan22_jax.model.umt5_streamed import StreamedUMT5
from wan22_jax.model.vae import VAEConfig, WanVAE
from wan22_jax.weights import (
    Network,
    Shapes,
    scale_of,
    set_parameters,
    stacked_shapes,
    stored_dtype,
)

NETWORKS: tuple[Network, ...] = ("transformer", "vae", "text_encoder")
FORMAT = "wan22_jax model"
VERSION = 1
FLOAT8 = "float8"  # a dtype of models: bfloat16, but for the weights of the blocks' linears
PROMPT_BYTES = 3 * 10**9  # what 8 prompts of 512 tokens need beside the XXL encoder, rounded up
_CARD = "model.json"
_QUANTISERS = 2  # layers that are read and quantised at a time
_RESTORE_GIB = 8  # host memory for arrays on their way to the device


@dataclass(frozen=True)
class ModelCard:
    """What model.json says: sizes of the networks and what their weights hash to."""

    dtype: str  # of transformer and text encoder, as asked of wan22-convert
    source: str
    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    digests: dict[str, str]  # sha256 by network; the text encoder's covers the tokenizer
    digest: str  # of all three


def read_model_card(folder: Path) -> ModelCard:
    """Reads model.json; BadInput if the folder is not a complete model of this format."""
    path = folder / _CARD
    remedy = "convert the PyTorch weights with wan22-convert and give its --out here"
    if not path.is_file():
        raise BadInput(f"{folder}: a converted model was expected (no {_CARD} in it); {remedy}")
    try:
        fields = json.loads(path.read_text())
        if (fields.pop("format"), fields.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"not '{FORMAT}' version {VERSION}")
        card = ModelCard(
            transformer=TransformerConfig(**fields.pop("transformer")),
            vae=VAEConfig(**fields.pop("vae")),
            text_encoder=UMT5Config(**fields.pop("text_encoder")),
            **fields,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: not a model card of this version ({error}); {remedy}") from error
    return card


def is_model_folder(path: Path) -> bool:
    """Whether this is a complete model folder, of any version."""
    return (path / _CARD).is_file()


def read_transformer_digest(folder: Path | None) -> str | None:
    """Reads from its card which transformer a folder holds; None where there is no folder."""
    return None if folder is None else read_model_card(folder).digests["transformer"]


def find_model_folder(folder: Path, transformer_digest: str) -> Path | None:
    """Returns the folder if it is still there and holds this transformer, else None."""
    found = is_model_folder(folder) and read_transformer_digest(folder) == transformer_digest
    return folder if found else None


def write_model_card(folder: Path, card: ModelCard) -> None:
    """Writes model.json, which declares the folder complete."""
    fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(card)}
    (folder / _CARD).write_text(json.dumps(fields, indent=2) + "\n")


def unquantised_dtype(dtype: str) -> str:
    """Returns the dtype of what a model of this dtype does not quantise."""
    return "bfloat16" if dtype == FLOAT8 else dtype


def choose_transformer_dtype(
    folder: Path, card: ModelCard, *, dtype: str, transformer_dtype: str | None = None
) -> str:
    """Returns what to load the transformer as.

    Args:
        folder: of the card, for messages.
        card: as read from it.
        dtype: of the whole model; in a bfloat16 one a float8 folder is used as it is.
        transformer_dtype: of the transformer alone, wins if it is set.

    Raises:
        BadInput: float8 weights would have to be widened.
    """
    if card.dtype == FLOAT8 and dtype == "bfloat16" and transformer_dtype is None:
        return FLOAT8
    chosen = transformer_dtype or dtype
    _refuse_widening(folder, card, chosen)
    return chosen


def load_transformer(
    folder: Path, *, dtype: DTypeLike | None = None, host: bool = False
) -> WanTransformer:
    """Loads the transformer straight to the device.

    Args:
        folder: a model folder.
        dtype: what to store the parameters in, but for those that stay float32; None keeps what
            the folder holds. "float8" quantises a folder of another dtype on the way, a layer
            or two at a time, to the bits that wan22-convert writes from the same numbers.
        host: leave every array on the host, as NumPy's.

    Raises:
        BadInput: the folder is not a complete model, its arrays are not those of its card, or its
            weights are float8 and another dtype is wanted.
    """
    card = read_model_card(folder)
    if dtype is not None:
        _refuse_widening(folder, card, dtype)
    module = abstract_transformer(card.transformer, float8=FLOAT8 in (card.dtype, dtype))
    path = folder / "transformer"
    if card.dtype == FLOAT8:
        _restore(path, module, None, host=host)
    elif dtype == FLOAT8:
        weights = [f"{target}.weight" for target, _ in module.lora_targets()]
        _restore(path, module, unquantised_dtype(FLOAT8), quantise=weights, host=host)
    else:
        _restore(path, module, dtype, host=host)
    return module


def abstract_transformer(config: TransformerConfig, *, float8: bool) -> WanTransformer:
    """Makes a transformer that has shapes and dtypes but no arrays."""

    def make() -> WanTransformer:
        module = WanTransformer(config, rngs=nnx.Rngs(0))
        if float8:
            module.to_float8()
        return module

    return nnx.eval_shape(make)


@jax.jit
def quantise_layer(weight_OI: Float[Array | np.ndarray, "O I"]) -> tuple[Array, Array]:
    """Returns float8 values and scale of one matrix; whatever its dtype, by float32 arithmetic."""
    return quantize_weight(jnp.asarray(weight_OI, jnp.float32))


def load_vae(folder: Path, *, dtype: DTypeLike | None = None, host: bool = False) -> WanVAE:
    """Loads the VAE; see ``load_transformer``."""
    config = read_model_card(folder).vae
    module = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    _restore(folder / "vae", module, dtype, host=host)
    return module


def load_text_encoder(folder: Path, *, dtype: DTypeLike | None = None, host: bool = False) -> UMT5:
    """Loads the text encoder; see ``load_transformer``."""
    config = read_model_card(folder).text_encoder
    module = nnx.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))
    _restore(folder / "text_encoder", module, dtype, host=host)
    return module


def load_fitting_text_encoder(
    folder: Path, *, dtype: DTypeLike | None = None, memory_bytes: int | None = None
) -> UMT5 | StreamedUMT5:
    """Loads the text encoder to where there is room for it.

    Args:
        folder: a model folder.
        dtype: as for ``load_transformer``, but not float8.
        memory_bytes: of the device; None where there is no limit to be known.
    """
    card = read_model_card(folder)
    if memory_bytes is None or fits(card, memory_bytes, dtype=dtype):
        return load_text_encoder(folder, dtype=dtype)
    return StreamedUMT5(load_text_encoder(folder, dtype=dtype, host=True))


def fits(card: ModelCard, memory_bytes: int, *, dtype: DTypeLike | None = None) -> bool:
    """Whether the text encoder's weights, and 3 GB for 8 prompts, fit into so much memory."""
    module = nnx.eval_shape(lambda: UMT5(card.text_encoder, rngs=nnx.Rngs(0)))
    numbers = sum(math.prod(shape) for shape in stacked_shapes(module).values())
    itemsize = jnp.dtype(dtype or unquantised_dtype(card.dtype)).itemsize
    return numbers * itemsize + PROMPT_BYTES <= memory_bytes


def open_array(path: Path, *, sync: bool = True) -> ts.TensorStore:
    """Opens one array of a network's checkpoint, to read or fill it part by part.

    Without ``sync`` a write does not wait for the disk: whoever writes must, in the end.
    """
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path)},
        "context": {"file_io_sync": sync},
    }
    return ts.open(spec, open=True).result()


def check_arrays(path: Path, expected: Shapes) -> None:
    """Raises BadInput if a network's checkpoint lacks an array, or a part of one on disk.

    TensorStore reads zeros where a part is lost.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        _check_stored(path.absolute(), checkpointer, expected)


def tokenizer_folder(folder: Path) -> Path:
    """Returns where the tokenizer's files are."""
    return folder / "tokenizer"


def _refuse_widening(folder: Path, card: ModelCard, dtype: DTypeLike) -> None:
    if card.dtype == FLOAT8 and dtype != FLOAT8:
        name = jnp.dtype(dtype).name
        raise BadInput(
            f"{folder}: its transformer is float8 and was to be loaded as {name}, which its "
            f"weights have lost; use it as float8, or convert again with --dtype {name}"
        )


def _restore(
    path: Path,
    module: nnx.Module,
    dtype: DTypeLike | None,
    *,
    quantise: Sequence[str] = (),
    host: bool = False,
) -> None:
    """Fills a module; ``quantise`` names float8 weights that the folder has in another dtype."""
    path = path.absolute()
    shapes = stacked_shapes(module)
    for name in quantise:
        del shapes[scale_of(name)]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_RESTORE_GIB)
    ) as checkpointer:
        target = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype if dtype is None else stored_dtype(name, dtype),
                sharding=None if host else device,
            )
            for name, leaf in _check_stored(path, checkpointer, shapes).items()
            if name not in quantise
        }
        if host:
            args = {
                name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
                for name, leaf in target.items()
            }
        else:
            args = ocp.checkpoint_utils.construct_restore_args(target)
        arrays = checkpointer.restore(
            path, ocp.args.PyTreeRestore(target, restore_args=args, partial_restore=True)
        )
    for name in quantise:
        stacks = _quantise_stack(path / name)
        arrays[name], arrays[scale_of(name)] = stacks if host else jax.device_put(stacks, device)
    set_parameters(module, arrays)


def _quantise_stack(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a stacked weight as float8 values and scales; few of its layers are ever wider."""
    stored = open_array(path)
    weight = np.empty(stored.shape, jnp.float8_e4m3fn)
    scale = np.empty(stored.shape[:1], np.float32)

    def fill(layer: int) -> None:
        weight[layer], scale[layer] = quantise_layer(stored[layer].read().result())

    with ThreadPoolExecutor(_QUANTISERS) as workers:
        list(workers.map(fill, range(len(weight))))
    return weight, scale


def _check_stored(path: Path, checkpointer: ocp.Checkpointer, expected: Shapes) -> dict[str, Any]:
    """Returns Orbax's description of each array; BadInput if they are not the expected ones."""
    remedy = "the folder is damaged, run wan22-convert again with --overwrite"
    if not (path / "_METADATA").is_file():
        raise BadInput(f"{path}: an Orbax checkpoint was expected; {remedy}")
    try:
        stored: dict[str, Any] = getattr(checkpointer.metadata(path).item_metadata, "tree", {})
    except ValueError as error:  # Orbax and TensorStore know no other
        raise BadInput(f"{path}: its arrays cannot be read; {remedy}") from error
    shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
    if differing := sorted(set(shapes.items()) ^ set(expected.items())):
        names = ", ".join(dict.fromkeys(name for name, _ in differing))
        raise BadInput(
            f"{path}: arrays differ from those that {_CARD} describes: {names}; {remedy}"
        )
    # Orbax itself would name a lost or cut file in a page of driver settings.
    for name, leaf in stored.items():
        chunk_shape = leaf.storage.chunk_shape
        counts = (-(-size // chunk) for size, chunk in zip(leaf.shape, chunk_shape, strict=True))
        for index in np.ndindex(*counts):
            file = path / name / ".".join(map(str, index))
            if (
                not file.is_file()
                or file.stat().st_size != math.prod(chunk_shape) * leaf.dtype.itemsize
            ):
                raise BadInput(
                    f"{file}: this part of the weights is missing or cut short; {remedy}"
                )
    return stored
