"""Where do the networks of a model come from: which files, in which layout, of which sizes?

Official layout (Wan-AI/Wan2.2-TI2V-5B)::

    config.json, diffusion_pytorch_model*.safetensors (+ index)
    Wan2.2_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth     or the same names ending in .safetensors
    google/umt5-xxl/                                    tokenizer

Diffusers layout (Wan-AI/Wan2.2-TI2V-5B-Diffusers): transformer/, vae/, text_encoder/, tokenizer/.

ComfyUI's layout: diffusion_models/, vae/ and text_encoders/ with a file each, in the folder itself
or in its models/ or split_files/; other models may lie beside them. There is no config, and the
tokenizer is in the text encoder's file.

Each network may also come from a place of its own, a file or a folder in any layout. What a file
is, its content says, not its name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from convert.sizes import (
    check_latent_statistics,
    count_residual_blocks,
    infer_text_config,
    infer_transformer_config,
    infer_vae_config,
    is_transformer_config,
    read_transformer_config,
)
from convert.spiece import make_tokenizer_json
from convert.torch_file import TorchFile
from wan22_jax.errors import BadInput
from wan22_jax.model.transformer import TransformerConfig
from wan22_jax.model.umt5 import UMT5Config
from wan22_jax.model.vae import VAEConfig
from wan22_jax.quantised import SPIECE_MODEL
from wan22_jax.tensor_files import SafetensorsFiles, TensorFiles
from wan22_jax.weights import (
    OTHER_MODEL,
    NameTable,
    Network,
    OfficialTensors,
    Shapes,
    name_tensors,
    text_encoder_names,
    transformer_names,
    vae_names,
)


@dataclass(frozen=True)
class Sources:
    """Where the parts of a model lie; what has no place of its own is looked for in ``folder``."""

    folder: Path | None = None
    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None

    def place_of(self, network: Network) -> Path:
        """Returns where to look for a network; BadInput if nobody has said it."""
        place = getattr(self, network) or self.folder
        if place is None:
            raise BadInput(
                f"no source of the {network.replace('_', ' ')}; add --{network} or --ckpt_path"
            )
        return place

    def __str__(self) -> str:
        places = {field.name: getattr(self, field.name) for field in fields(self)}
        own = [f"{name} {place}" for name, place in places.items() if place and name != "folder"]
        return ", ".join([str(self.folder)] * bool(self.folder) + own)


@dataclass(frozen=True)
class Checkpoint:
    """The three networks of a model with their sizes, and the tokenizer's files by name."""

    transformer: OfficialTensors
    transformer_config: TransformerConfig
    vae: OfficialTensors
    vae_config: VAEConfig
    text_encoder: OfficialTensors
    text_encoder_config: UMT5Config
    tokenizer: Mapping[str, bytes]

    @property
    def configs(self) -> dict[Network, TransformerConfig | VAEConfig | UMT5Config]:
        """The sizes by network."""
        return {
            "transformer": self.transformer_config,
            "vae": self.vae_config,
            "text_encoder": self.text_encoder_config,
        }


def open_checkpoint(sources: Sources) -> Checkpoint:
    """Finds and opens the parts of a model; reads headers and configs, no weights.

    Raises BadInput if one is missing or broken, or belongs to another model.
    """
    if sources.folder is not None and not sources.folder.is_dir():
        raise BadInput(f"{sources.folder}: a folder was expected; give that of Wan2.2-TI2V-5B")
    found = {network: _find(network, sources) for network in ("transformer", "vae", "text_encoder")}
    vae_files = found["vae"]
    transformer = _name(found["transformer"], "transformer", transformer_names())
    vae = _name(vae_files, "vae", vae_names(count_residual_blocks(vae_files.shapes)))
    text_encoder = _name(found["text_encoder"], "text_encoder", text_encoder_names())
    if (vae_files.where / "config.json").is_file() and vae_files.where.name == "vae":
        check_latent_statistics(vae_files.where / "config.json")
    where = transformer.files.where
    config = (where if where.is_dir() else where.parent) / "config.json"
    if is_transformer_config(config):
        transformer_config = read_transformer_config(config)
    else:
        transformer_config = infer_transformer_config(transformer.shapes, where)
    return Checkpoint(
        transformer=transformer,
        transformer_config=transformer_config,
        vae=vae,
        vae_config=infer_vae_config(vae.shapes),
        text_encoder=text_encoder,
        text_encoder_config=infer_text_config(text_encoder.shapes),
        tokenizer=_read_tokenizer(sources, found["text_encoder"]),
    )


def _name(files: TensorFiles, network: Network, table: NameTable) -> OfficialTensors:
    tensors = name_tensors(files, network, table)
    if not tensors.shapes:
        raise BadInput(
            f"{files.where}: holds nothing of the {network.replace('_', ' ')} "
            f"({', '.join([*files.shapes][:3])}, ...); give the right file or folder"
        )
    return tensors


# Files of a network

_OFFICIAL_STEMS = {
    "transformer": "diffusion_pytorch_model",  # of shards
    "vae": "Wan2.2_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
}
_COMFYUI_FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
}
# What tells a network of TI2V-5B from all else that may lie in ComfyUI's folders: a name, with
# any prefix, the axis of its tensor that counts latent channels, and their number.
_MARKS = {
    "transformer": (r"([\w.]+\.)?patch_embedding\.weight", 1, 48),
    "vae": (r"((model|vae|first_stage_model)\.)?(conv2|post_quant_conv)\.weight", 0, 48),
    "text_encoder": (
        r"(encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias"
        r"|blocks\.1\.pos_embedding\.embedding)\.weight",
        0,
        None,
    ),
}


def _find(network: Network, sources: Sources) -> TensorFiles:
    place = sources.place_of(network)
    if place.is_file():
        return _open_file(place)
    if not place.is_dir():
        raise BadInput(f"{place}: neither a file nor a folder; give that of Wan2.2-TI2V-5B")
    _refuse_other_models(place)
    if comfyui := _comfyui_root(place):
        return _find_in_comfyui(network, comfyui)
    if (place / "transformer").is_dir() or (place / network).is_dir():
        return SafetensorsFiles(place / network)
    is_for_all = getattr(sources, network) is None
    if (place / "config.json").is_file() and (is_for_all or _official_files(network, place)):
        return _open_official(network, place)
    if is_for_all:
        raise BadInput(
            f"{place}: config.json (official layout), transformer/ (Diffusers layout) or "
            "diffusion_models/ (ComfyUI's) was expected; give the folder that Wan2.2-TI2V-5B was "
            "downloaded into"
        )
    return SafetensorsFiles(place)


def _refuse_other_models(folder: Path) -> None:
    for name in ("high_noise_model", "low_noise_model", "transformer_2", "Wan2.1_VAE.pth"):
        if (folder / name).exists():
            raise BadInput(f"{folder / name}: {OTHER_MODEL}")


def _official_files(network: Network, folder: Path) -> list[Path]:
    stem = _OFFICIAL_STEMS[network]
    if network == "transformer":
        return list(folder.glob(f"{stem}*.safetensors"))
    files = [folder / f"{stem}.safetensors", folder / f"{stem}.pth"]
    return [file for file in files if file.is_file()]


def _open_official(network: Network, folder: Path) -> TensorFiles:
    stem, files = _OFFICIAL_STEMS[network], _official_files(network, folder)
    if network == "transformer":
        return SafetensorsFiles(folder, prefix=stem)
    if not files:
        raise BadInput(
            f"{folder / stem}.pth: this file, or {stem}.safetensors, was expected; download it"
        )
    return _open_file(files[0])


def _open_file(file: Path) -> TensorFiles:
    with file.open("rb") as content:
        start = content.read(9)
    if start[:4] == b"GGUF":
        raise BadInput(
            f"{file}: GGUF files cannot be read; use the float16 or float8 file of ComfyUI"
        )
    is_pickle = start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" or file.suffix == ".pth"
    is_safetensors = start[8:] == b"{"  # after a length, which may start with any byte
    return TorchFile(file) if is_pickle and not is_safetensors else SafetensorsFiles(file)


def _comfyui_root(place: Path) -> Path | None:
    for root in (place, place / "models", place / "split_files"):
        if any((root / name).is_dir() for name in _COMFYUI_FOLDERS["transformer"]):
            return root
    return None


def _find_in_comfyui(network: Network, root: Path) -> TensorFiles:
    folders = [root / name for name in _COMFYUI_FOLDERS[network]]
    found = []
    for file in sorted(file for folder in folders for file in folder.rglob("*.safetensors")):
        try:
            files = SafetensorsFiles(file)
        except BadInput:  # of another model, in a format that nothing here needs
            continue
        if _bears_mark(network, files.shapes):
            found.append(files)
    places = " or ".join(str(folder) for folder in folders)
    what = f"the {network.replace('_', ' ')} of TI2V-5B"
    if not found:
        raise BadInput(f"{places}: {what} was expected here; download it or add --{network} FILE")
    if len(found) > 1:
        names = ", ".join(files.where.name for files in found)
        raise BadInput(f"{places}: {what} is here more than once ({names}); add --{network} FILE")
    return found[0]


def _bears_mark(network: Network, shapes: Shapes) -> bool:
    pattern, axis, channels = _MARKS[network]
    return any(
        re.fullmatch(pattern, name) and channels in (None, *shape[axis : axis + 1])
        for name, shape in shapes.items()
    )


# Tokenizer

_TOKENIZER, _SPIECE = "tokenizer.json", "spiece.model"


def _read_tokenizer(sources: Sources, text_encoder: TensorFiles) -> dict[str, bytes]:
    """Reads the tokenizer's files: from the place named, else from that of the text encoder."""
    place = sources.tokenizer or _find_tokenizer(sources.place_of("text_encoder"))
    if place is None and sources.folder is not None and SPIECE_MODEL not in text_encoder.shapes:
        place = _find_tokenizer(sources.folder)
    if place is not None and place.is_dir():
        files = {file.name: file.read_bytes() for file in sorted(place.iterdir()) if file.is_file()}
    elif place is not None and place.is_file():
        name = _TOKENIZER if place.suffix == ".json" else _SPIECE
        files = {name: place.read_bytes()}
    elif SPIECE_MODEL in text_encoder.shapes and sources.tokenizer is None:
        place, files = text_encoder.where, {_SPIECE: text_encoder.read(SPIECE_MODEL).tobytes()}
    else:
        raise BadInput(
            f"{place or text_encoder.where}: the tokenizer, {_TOKENIZER} or {_SPIECE}, was "
            "expected; add --tokenizer with that folder of Wan2.2-TI2V-5B (google/umt5-xxl or "
            "tokenizer)"
        )
    if _TOKENIZER not in files and _SPIECE not in files:
        raise BadInput(
            f"{place}: {_TOKENIZER} or {_SPIECE} was expected; download this folder of "
            "Wan2.2-TI2V-5B too"
        )
    if _TOKENIZER not in files:
        files[_TOKENIZER] = make_tokenizer_json(files[_SPIECE], place)
    _check_tokenizer(files[_TOKENIZER], place)
    return dict(sorted(files.items()))


def _check_tokenizer(content: bytes, place: Path) -> None:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: {_TOKENIZER} is no JSON ({error}); download it again") from error
    if not isinstance(fields, dict) or "model" not in fields:
        raise BadInput(f"{place}: is no tokenizer; give {_TOKENIZER} or {_SPIECE} of umT5")


def _find_tokenizer(place: Path) -> Path | None:
    """The folder of the tokenizer in an official or a Diffusers folder, if there is one."""
    folders = (place / "google" / "umt5-xxl", place / "tokenizer", place.parent / "tokenizer")
    return next((folder for folder in folders if folder.is_dir()), None)
