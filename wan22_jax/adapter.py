"""What is a LoRA outside of training: which matrices, under which names in a file, on which model?

A file holds ComfyUI's names, one tensor per layer (also the names that diffusion-pipe saves)::

    diffusion_model.blocks.{i}.self_attn.q.lora_A.weight  [rank, in]
    diffusion_model.blocks.{i}.self_attn.q.lora_B.weight  [out, rank]
    diffusion_model.blocks.{i}.self_attn.q.alpha          [], only where alpha is not the rank

In memory the layers are stacked: ``blocks.self_attn.q.lora_A`` [N, rank, in]. The two are a
bijection: a name that it does not produce is an error, and so is one that it misses. Files of other
makers are read too: with the prefix ``transformer.``, ``base_model.model.`` or none, and with
kohya's names (``lora_unet_blocks_0_self_attn_q.lora_down.weight``). In all of them a linear without
an alpha tensor has alpha = rank.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from wan22_jax.adapter_targets import TARGETS, LoRATarget, parse_targets, trains_all
from wan22_jax.checkpoint import read_trainable
from wan22_jax.errors import BadInput
from wan22_jax.model.lora import LoRAParam
from wan22_jax.model.transformer import WanTransformer

BASE_MODEL = "Wan2.2-TI2V-5B"


@dataclass(frozen=True)
class Adapter:
    """A LoRA: each adapted weight becomes W + alpha / rank * B A.

    ``matrices`` maps ``blocks.<target>.lora_A`` to [N, rank, in] and ``...lora_B`` to
    [N, out, rank]; ``alphas`` maps ``<target>`` to alpha. ``metadata`` is the header of a file:
    strings, empty for files of other makers. ``source`` is where it was read, for messages.
    """

    matrices: dict[str, np.ndarray]
    alphas: dict[str, float]
    metadata: dict[str, str]
    source: str

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each target."""
        return {name: self.matrices[f"blocks.{name}.lora_A"].shape[1] for name in self.alphas}

    def scale(self, target: str) -> float:
        """What the product B A of a target is multiplied with."""
        return self.alphas[target] / self.ranks[target]

    def __str__(self) -> str:
        ranks, alphas = sorted(set(self.ranks.values())), sorted(set(self.alphas.values()))
        return f"rank {', '.join(map(str, ranks))}, alpha {', '.join(f'{a:g}' for a in alphas)}" + (
            f", {len(self.alphas)} of {len(TARGETS)} linears" * (len(self.alphas) < len(TARGETS))
        )


def load_adapter(
    path: Path, *, step: int | None = None, ema: bool = False, base_digest: str | None = None
) -> Adapter:
    """Reads a LoRA from a training run (or its checkpoints, or one of them) or a file.

    Args:
        path: a folder that wan22-train wrote, or a .safetensors file with ComfyUI names.
        step: which checkpoint of a run; the last one by default. A file holds only one.
        ema: of a run, the average over the steps instead of the weights themselves.
        base_digest: digest of the transformer it is meant for; a LoRA that states another one is
            refused, one that states none (other makers' files) is taken.

    Raises:
        BadInput: no such file, not a LoRA, truncated, incomplete, or made for another base model.
    """
    adapter = _read_checkpoint(path, step, ema) if path.is_dir() else _read_file(path)
    trained_on = adapter.metadata.get("base_digest")
    if base_digest is not None and trained_on not in (None, base_digest):
        raise BadInput(
            f"{path}: was trained on base model {trained_on}, this model is {base_digest}; "
            "use the model folder that it was trained with"
        )
    return adapter


def make_adapter(matrices: dict[str, np.ndarray], meta: dict[str, Any], *, source: str) -> Adapter:
    """Makes the adapter that a run has trained; ``meta`` is that of a checkpoint of it."""
    names = [name.removeprefix("blocks.").rpartition(".")[0] for name in matrices]
    alphas = {name: target.alpha for name, target in parse_targets(meta, names).items()}
    adapter = Adapter(matrices, alphas, metadata={}, source=source)
    return replace(
        adapter,
        metadata={
            "format": "pt",
            "base_model": BASE_MODEL,
            "base_digest": meta["base_digest"],
            **_describe_sizes(adapter),
            "step": str(meta["step"]),
            "config": json.dumps(meta["config"]),
        },
    )


def attach_adapter(model: WanTransformer, adapter: Adapter, *, strength: float = 1.0) -> None:
    """Puts the adapter on the model's linears, in place of any that they carry.

    Args:
        model: changed in place; its weights stay as they are.
        adapter: kept in the dtype that it is stored in.
        strength: factor on the adapter's contribution; 1 is as trained.

    Raises:
        BadInput: a matrix does not fit the model (another model, another number of layers).
    """
    linears = {path.removeprefix("blocks."): layer for path, layer in model.lora_targets()}
    expected = {}
    for target, rank in adapter.ranks.items():
        num_layers, num_out, num_in = linears[target].weight.shape
        expected[f"blocks.{target}.lora_A"] = (num_layers, rank, num_in)
        expected[f"blocks.{target}.lora_B"] = (num_layers, num_out, rank)
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
    for target, linear in linears.items():
        linear.lora_A, linear.lora_B = (
            LoRAParam(jnp.asarray(adapter.matrices[name])) if name in adapter.matrices else None
            for name in (f"blocks.{target}.lora_A", f"blocks.{target}.lora_B")
        )
        if target in adapter.alphas:
            linear.lora_scale = strength * adapter.scale(target)


def add_adapter(model: WanTransformer, key: jax.Array, targets: Mapping[str, LoRATarget]) -> None:
    """Attaches fresh float32 adapters to the chosen linears of every block; B starts at zero.

    A linear's first values do not depend on which others are adapted.
    """
    for index, (path, layer) in enumerate(model.lora_targets()):
        if target := targets.get(path.removeprefix("blocks.")):
            layer.add_lora(jax.random.fold_in(key, index), rank=target.rank, alpha=target.alpha)


def start_from_existing(model: WanTransformer, path: Path) -> str:
    """Gives the model's fresh adapters the values of an existing LoRA; says what it did.

    The LoRA starts as the same function: where its alpha / rank is another than that of the model's
    adapter, B is multiplied by their ratio. Targets that the file lacks start afresh.

    Args:
        model: with adapters, whose values are replaced, in float32.
        path: a file, or a folder with exactly one .safetensors file.

    Raises:
        BadInput: no such file, not a LoRA of this model, another rank, or a target that the config
            leaves out.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise BadInput(
                f"{path}: init_from_existing takes a folder with one .safetensors file, this one "
                f"has {len(files)}; name the file"
            )
    adapter = _read_file(files[0])
    layers = {name.removeprefix("blocks."): layer for name, layer in model.lora_targets()}
    for target, rank in adapter.ranks.items():
        layer = layers[target]
        if layer.lora_A is None or layer.lora_B is None:
            raise BadInput(
                f"{files[0]}: has an adapter of {target}, which the config does not train; "
                "add it to [[adapter.targets]]"
            )
        if rank != layer.lora_A.shape[1]:
            raise BadInput(
                f"{files[0]}: rank {rank} at {target}, the config has {layer.lora_A.shape[1]}; set "
                f"rank = {rank}"
            )
        ratio = adapter.scale(target) / layer.lora_scale
        for own, side, factor in ((layer.lora_A, "lora_A", 1.0), (layer.lora_B, "lora_B", ratio)):
            matrix = adapter.matrices[f"blocks.{target}.{side}"].astype(np.float32)
            if matrix.shape != own.shape:
                raise BadInput(
                    f"{files[0]}: {target}.{side} is {list(matrix.shape)}, the model takes "
                    f"{list(own.shape)}; choose one that was trained on {BASE_MODEL}"
                )
            own[...] = jnp.asarray(matrix * np.float32(factor))
    fresh = sum(layer.lora_A is not None for layer in layers.values()) - len(adapter.alphas)
    return f"adapter: starts from {files[0]} ({adapter})" + (f", {fresh} afresh" if fresh else "")


def to_comfyui(adapter: Adapter) -> dict[str, np.ndarray]:
    """Names the matrices as ComfyUI does, one tensor per layer, in their own dtype."""
    tensors = {}
    for path, matrix in adapter.matrices.items():
        target, side = path.removeprefix("blocks.").rsplit(".", 1)
        for layer, tensor in enumerate(matrix):
            tensors[f"{_PREFIX}{layer}.{target}.{side}.weight"] = np.ascontiguousarray(tensor)
            if adapter.scale(target) != 1:
                alpha = np.asarray(adapter.alphas[target], np.float32)
                tensors[f"{_PREFIX}{layer}.{target}.alpha"] = alpha
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
        BadInput: names it does not know or misses, shapes or alphas that differ between layers.
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
    ranks = {target: _find_rank(target, matrices, source) for target in layers}
    alphas = {target: _find_alpha(target, layers, ranks[target], source) for target in layers}
    return Adapter(matrices, alphas, metadata=metadata, source=source)


_PREFIX = "diffusion_model.blocks."
_NAME = re.compile(
    r"(?:(?:diffusion_model|transformer|base_model\.model)\.)?blocks\."
    + r"(0|[1-9][0-9]?)\."
    + f"({'|'.join(map(re.escape, TARGETS))})"
    + r"\.(lora_A\.weight|lora_B\.weight|lora_down\.weight|lora_up\.weight|alpha)"
)
_KOHYA = {name.replace(".", "_"): name for name in TARGETS}
_KOHYA_NAME = re.compile(
    r"lora_unet_blocks_(0|[1-9][0-9]?)_"
    + f"({'|'.join(_KOHYA)})"
    + r"\.(lora_down\.weight|lora_up\.weight|alpha)"
)
_KINDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


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


def _read_checkpoint(path: Path, step: int | None, ema: bool) -> Adapter:
    matrices, meta = read_trainable(path, step, ema=ema)
    if trains_all(meta):
        raise BadInput(
            f"{path}: holds all weights of a model, not a LoRA; make a model folder of it with "
            "wan22-export --model BASE --out FOLDER, and use that"
        )
    adapter = make_adapter(matrices, meta, source=str(path))
    # The same checks as for a file: a checkpoint of another kind of training must not pass.
    from_comfyui(to_comfyui(adapter), metadata={}, source=str(path))
    return adapter


_Layers = dict[str, dict[int, dict[str, np.ndarray]]]  # target, layer, "lora_A.weight" and so on


def _sort_by_target(tensors: Mapping[str, np.ndarray], source: str) -> _Layers:
    layers: _Layers = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name) or _KOHYA_NAME.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        layer, target, kind = match.groups()
        target = _KOHYA.get(target, target)
        of_target = layers.setdefault(target, {})
        of_layer, kind = of_target.setdefault(int(layer), {}), _KINDS.get(kind, kind)
        if kind in of_layer:
            raise BadInput(f"{source}: has {target}.{kind} of layer {layer} under two names")
        of_layer[kind] = tensor
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
    kinds = {  # a target has an alpha in all layers or in none
        target: {kind for of_layer in of_target.values() for kind in of_layer}
        for target, of_target in layers.items()
    }
    missing = [
        f"{_PREFIX}{layer}.{target}.{kind}"
        for target, of_target in layers.items()
        for layer in range(num_layers)
        for kind in sorted(kinds[target] | {"lora_A.weight", "lora_B.weight"})
        if kind not in of_target.get(layer, {})
    ]
    if missing:
        raise BadInput(f"{source}: is incomplete, export it again; missing: {_list(missing)}")
    return num_layers


def _find_rank(target: str, matrices: dict[str, np.ndarray], source: str) -> int:
    a, b = (matrices[f"blocks.{target}.{side}"] for side in ("lora_A", "lora_B"))
    if a.shape[1] != b.shape[2]:
        raise BadInput(
            f"{source}: one rank was expected at {target}, lora_A is {list(a.shape[1:])} and "
            f"lora_B is {list(b.shape[1:])}"
        )
    return a.shape[1]


def _find_alpha(target: str, layers: _Layers, rank: int, source: str) -> float:
    """The alpha that all layers share; without any, alpha = rank."""
    alphas = {
        float(alpha)
        for of_layer in layers[target].values()
        for alpha in np.ravel(of_layer.get("alpha", rank))
    }
    if len(alphas) != 1:
        raise BadInput(
            f"{source}: one alpha for all layers of {target} was expected, came {sorted(alphas)}"
        )
    return alphas.pop()


def _describe_sizes(adapter: Adapter) -> dict[str, str]:
    sizes = {(rank, adapter.alphas[name]) for name, rank in adapter.ranks.items()}
    if len(sizes) == 1:
        ((rank, alpha),) = sizes
        return {"rank": str(rank), "alpha": str(alpha)}
    names = adapter.ranks
    return {
        "rank": json.dumps(names),
        "alpha": json.dumps({name: adapter.alphas[name] for name in names}),
    }


def _list(items: list[str]) -> str:
    shown = ", ".join(items[:8])
    return shown if len(items) <= 8 else f"{shown} and {len(items) - 8} more"
