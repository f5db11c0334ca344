"""What is a LoRA outside of training: which matrices, under which names in a file, on which model?

A file holds ComfyUI's names, one tensor per layer (also the names that diffusion-pipe saves)::

    diffusion_model.blocks.{i}.self_attn.q.lora_A.weight  [rank, in]
    diffusion_model.blocks.{i}.self_attn.q.lora_B.weight  [out, rank]
    diffusion_model.blocks.{i}.self_attn.q.alpha          [], only where alpha is not the rank

In memory the layers are stacked: ``blocks.self_attn.q.lora_A`` [N, rank, in]. The two are a
bijection: a name that it does not produce is an error, and so is one that it misses.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from wan22_jax.checkpoint import read_trainable
from wan22_jax.errors import BadInput
from wan22_jax.model.lora import LoRAParam
from wan22_jax.model.transformer import WanTransformer

TARGETS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)
BASE_MODEL = "Wan2.2-TI2V-5B"


@dataclass(frozen=True)
class Adapter:
    """A LoRA: each adapted weight becomes W + alpha / rank * B A.

    ``matrices`` maps ``blocks.<target>.lora_A`` to [N, rank, in] and ``...lora_B`` to
    [N, out, rank]. ``metadata`` is the header of a file: strings, empty for files of other makers.
    ``source`` is where it was read, for messages.
    """

    matrices: dict[str, np.ndarray]
    rank: int
    alpha: float
    metadata: dict[str, str]
    source: str


def load_adapter(path: Path, *, step: int | None = None, base_digest: str | None = None) -> Adapter:
    """Reads a LoRA from a training run (or its checkpoints, or one of them) or a file.

    Args:
        path: a folder that wan22-train wrote, or a .safetensors file with ComfyUI names.
        step: which checkpoint of a run; the last one by default. A file holds only one.
        base_digest: digest of the transformer it is meant for; a LoRA that states another one is
            refused, one that states none (other makers' files) is taken.

    Raises:
        BadInput: no such file, not a LoRA, truncated, incomplete, or made for another base model.
    """
    adapter = _read_checkpoint(path, step) if path.is_dir() else _read_file(path)
    trained_on = adapter.metadata.get("base_digest")
    if base_digest is not None and trained_on not in (None, base_digest):
        raise BadInput(
            f"{path}: was trained on base model {trained_on}, this model is {base_digest}; "
            "use the model folder that it was trained with"
        )
    return adapter


def attach_adapter(model: WanTransformer, adapter: Adapter, *, strength: float = 1.0) -> None:
    """Puts the adapter on the model's linears, in place of any that they carry.

    Args:
        model: changed in place; its weights stay as they are.
        adapter: kept in the dtype that it is stored in.
        strength: factor on the adapter's contribution; 1 is as trained.

    Raises:
        BadInput: a matrix does not fit the model (another model, another number of layers).
    """
    linears = dict(model.lora_targets())
    expected = {}
    for path, linear in linears.items():
        num_layers, num_out, num_in = linear.weight.shape
        expected[f"{path}.lora_A"] = (num_layers, adapter.rank, num_in)
        expected[f"{path}.lora_B"] = (num_layers, num_out, adapter.rank)
    problems = [
        f"{name} is {list(matrix.shape)}, the model takes {list(expected[name])}"
        for name, matrix in adapter.matrices.items()
        if matrix.shape != expected[name]
    ]
    if problems:
        raise BadInput(
            f"{adapter.source}: is not a LoRA of this model ({_list(problems)}); "
            f"choose one that was trained on {BASE_MODEL}"
        )
    for path, linear in linears.items():
        linear.lora_A, linear.lora_B = (
            LoRAParam(jnp.asarray(adapter.matrices[name])) if name in adapter.matrices else None
            for name in (f"{path}.lora_A", f"{path}.lora_B")
        )
        linear.lora_scale = strength * adapter.alpha / adapter.rank


def to_comfyui(adapter: Adapter) -> dict[str, np.ndarray]:
    """Names the matrices as ComfyUI does, one tensor per layer, in their own dtype."""
    tensors = {}
    for path, matrix in adapter.matrices.items():
        target, side = path.removeprefix("blocks.").rsplit(".", 1)
        for layer, tensor in enumerate(matrix):
            tensors[f"{_PREFIX}{layer}.{target}.{side}.weight"] = np.ascontiguousarray(tensor)
            if adapter.alpha != adapter.rank:
                tensors[f"{_PREFIX}{layer}.{target}.alpha"] = np.asarray(adapter.alpha, np.float32)
    return tensors


def from_comfyui(
    tensors: Mapping[str, np.ndarray], *, metadata: dict[str, str], source: str
) -> Adapter:
    """Stacks the tensors of a file; the inverse of ``to_comfyui``.

    Args:
        tensors: everything in the file; any of the ten targets, each in all layers.
        metadata: the file's header.
        source: the file, for messages.

    Raises:
        BadInput: names it does not know or misses, shapes of more than one rank, several alphas.
    """
    layers = _sort_by_target(tensors, source)
    num_layers = _count_layers(layers, source)
    matrices = {}
    for target, of_target in layers.items():
        for side in ("lora_A", "lora_B"):
            parts = [of_target[layer][f"{side}.weight"] for layer in range(num_layers)]
            if len({(part.shape, part.dtype) for part in parts}) > 1 or parts[0].ndim != 2:
                raise BadInput(f"{source}: {target}.{side}: matrices alike in all layers expected")
            matrices[f"blocks.{target}.{side}"] = np.stack(parts)
    rank = _find_rank(matrices, source)
    alpha = _find_alpha(layers, rank, source)
    return Adapter(matrices, rank=rank, alpha=alpha, metadata=metadata, source=source)


_PREFIX = "diffusion_model.blocks."
_NAME = re.compile(
    re.escape(_PREFIX)
    + r"(0|[1-9][0-9]?)\."
    + f"({'|'.join(map(re.escape, TARGETS))})"
    + r"\.(lora_A\.weight|lora_B\.weight|alpha)"
)


def _read_file(path: Path) -> Adapter:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file or training run") from None
    except SafetensorError as error:
        raise BadInput(
            f"{path}: is not a complete safetensors file ({error}); copy or export it again"
        ) from None
    return from_comfyui(tensors, metadata=metadata, source=str(path))


def _read_checkpoint(path: Path, step: int | None) -> Adapter:
    matrices, meta = read_trainable(path, step)
    if meta["rank"] is None:
        raise BadInput(
            f"{path}: holds all weights of a model, not a LoRA; make a model folder of it with "
            "wan22-export --model BASE --out FOLDER, and use that"
        )
    adapter = Adapter(matrices, meta["rank"], float(meta["alpha"]), metadata={}, source=str(path))
    # The same checks as for a file: a checkpoint of another kind of training must not pass.
    from_comfyui(to_comfyui(adapter), metadata={}, source=str(path))
    return replace(
        adapter,
        metadata={
            "format": "pt",
            "base_model": BASE_MODEL,
            "base_digest": meta["base_digest"],
            "rank": str(meta["rank"]),
            "alpha": str(meta["alpha"]),
            "step": str(meta["step"]),
            "config": json.dumps(meta["config"]),
        },
    )


_Layers = dict[str, dict[int, dict[str, np.ndarray]]]  # target, layer, "lora_A.weight" and so on


def _sort_by_target(tensors: Mapping[str, np.ndarray], source: str) -> _Layers:
    layers: _Layers = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            unknown.append(name)
        else:
            layer, target, kind = match.groups()
            layers.setdefault(target, {}).setdefault(int(layer), {})[kind] = tensor
    if unknown:
        raise BadInput(
            f"{source}: is not a {BASE_MODEL} LoRA with ComfyUI's names "
            f"({_PREFIX}0.self_attn.q.lora_A.weight and the like); unknown: {_list(unknown)}"
        )
    if not layers:
        raise BadInput(f"{source}: holds no tensors, a LoRA was expected")
    return layers


def _count_layers(layers: _Layers, source: str) -> int:
    """The number of layers, all of which must have both matrices of every target."""
    num_layers = 1 + max(layer for of_target in layers.values() for layer in of_target)
    kinds = {
        kind
        for of_target in layers.values()
        for of_layer in of_target.values()
        for kind in of_layer
    }
    missing = [
        f"{_PREFIX}{layer}.{target}.{kind}"
        for target, of_target in layers.items()
        for layer in range(num_layers)
        for kind in sorted(kinds | {"lora_A.weight", "lora_B.weight"})
        if kind not in of_target.get(layer, {})
    ]
    if missing:
        raise BadInput(f"{source}: is incomplete, export it again; missing: {_list(missing)}")
    return num_layers


def _find_rank(matrices: dict[str, np.ndarray], source: str) -> int:
    rank = next(iter(matrices.values())).shape[1]
    for name, matrix in matrices.items():
        if matrix.shape[1 if name.endswith("lora_A") else 2] != rank:
            shape = list(matrix.shape[1:])
            raise BadInput(f"{source}: rank {rank} was expected throughout, {name} is {shape}")
    return rank


def _find_alpha(layers: _Layers, rank: int, source: str) -> float:
    """The alpha that all layers share; files without any mean alpha = rank."""
    alphas = {
        float(alpha)
        for of_target in layers.values()
        for of_layer in of_target.values()
        for alpha in np.ravel(of_layer.get("alpha", rank))
    }
    if len(alphas) != 1:
        raise BadInput(f"{source}: one alpha for all layers was expected, came {sorted(alphas)}")
    return alphas.pop()


def _list(items: list[str]) -> str:
    shown = ", ".join(items[:8])
    return shown if len(items) <= 8 else f"{shown} and {len(items) - 8} more"
