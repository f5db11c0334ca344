"""What is in a converted model folder, and how do its networks reach the device?

::

    <model>/model.json       ModelCard; written last, so its presence means the folder is complete
    <model>/transformer/     Orbax checkpoint: {parameter path: array}, layers stacked
    <model>/vae/             the same, always float32
    <model>/text_encoder/    the same
    <model>/tokenizer/       files of the tokenizer, as they came

``wan22-convert`` writes it (convert/weights.py); ``weights.py`` explains the parameter paths.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike

from wan22_jax.errors import BadInput
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.model.umt5 import UMT5, UMT5Config
from wan22_jax.model.vae import VAEConfig, WanVAE
from wan22_jax.weights import Network, Shapes, set_parameters, stacked_shapes, stored_dtype

NETWORKS: tuple[Network, ...] = ("transformer", "vae", "text_encoder")
FORMAT = "wan22_jax model"
VERSION = 1
_CARD = "model.json"
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


def write_model_card(folder: Path, card: ModelCard) -> None:
    """Writes model.json, which declares the folder complete."""
    fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(card)}
    (folder / _CARD).write_text(json.dumps(fields, indent=2) + "\n")


def load_transformer(folder: Path, *, dtype: DTypeLike | None = None) -> WanTransformer:
    """Loads the transformer straight to the device.

    Args:
        folder: a model folder.
        dtype: what to store the parameters in, but for those that stay float32; None keeps what
            the folder holds.

    Raises:
        BadInput: the folder is not a complete model, or its arrays are not those of its card.
    """
    config = read_model_card(folder).transformer
    module = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    _restore(folder / "transformer", module, dtype)
    return module


def load_vae(folder: Path, *, dtype: DTypeLike | None = None) -> WanVAE:
    """Loads the VAE; see ``load_transformer``."""
    config = read_model_card(folder).vae
    module = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    _restore(folder / "vae", module, dtype)
    return module


def load_text_encoder(folder: Path, *, dtype: DTypeLike | None = None) -> UMT5:
    """Loads the text encoder; see ``load_transformer``."""
    config = read_model_card(folder).text_encoder
    module = nnx.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))
    _restore(folder / "text_encoder", module, dtype)
    return module


def tokenizer_folder(folder: Path) -> Path:
    """Returns where the tokenizer's files are."""
    return folder / "tokenizer"


def _restore(path: Path, module: nnx.Module, dtype: DTypeLike | None) -> None:
    path = path.absolute()
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_RESTORE_GIB)
    ) as checkpointer:
        stored = _check_stored(path, checkpointer, stacked_shapes(module))
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype if dtype is None else stored_dtype(name, dtype),
                sharding=sharding,
            )
            for name, leaf in stored.items()
        }
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        arrays = checkpointer.restore(
            path, ocp.args.PyTreeRestore(target, restore_args=restore_args)
        )
    set_parameters(module, arrays)


def _check_stored(path: Path, checkpointer: ocp.Checkpointer, expected: Shapes) -> dict[str, Any]:
    """Returns Orbax's description of each array; BadInput if they are not the expected ones."""
    remedy = "the folder is damaged, run wan22-convert again with --overwrite"
    if not (path / "_METADATA").is_file():
        raise BadInput(f"{path}: an Orbax checkpoint was expected; {remedy}")
    stored: dict[str, Any] = getattr(checkpointer.metadata(path).item_metadata, "tree", {})
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
