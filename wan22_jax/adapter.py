"""What is a LoRA outside of training: which matrices, how do they get into files and on models?

In memory the layers are stacked: ``blocks.self_attn.q.lora_A`` [N, rank, in] and ``.lora_B``
[N, out, rank]. A file has one tensor per layer, in one of the dialects of ``lora_names``. The two
are a bijection: a name that it does not know is an error, and so is one that it misses. A linear
is adapted in every block: files in which it is adapted in some blocks only are refused, since
nothing tells them from damaged ones.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tomli_w

from wan22_jax.adapter_targets import TARGETS, LoRATarget, parse_targets, trains_all
from wan22_jax.checkpoint import read_trainable
from wan22_jax.errors import BadInput
from wan22_jax.lora_names import (
    PEFT_HEADER,
    PEFT_PREFIX,
    Dialect,
    Entry,
    Kind,
    Spelling,
    find_peft_alpha,
    read_name,
    read_peft_header,
    spell_name,
    write_peft_header,
)
from wan22_jax.model.lora import LoRAParam
from wan22_jax.model.transformer import WanTransformer
from wan22_jax.tensor_files import SafetensorsFiles

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
        path: a folder that wan22-train wrote, or a .safetensors file of any dialect.
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
            f"{path}: was trained on base model {trained_on:.64}, this model is {base_digest}; "
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
            **describe_sizes(adapter),
            "step": str(meta["step"]),
            "config_digest": digest_config(meta["config"]),
            "config": json.dumps(meta["config"]),
        },
    )


def describe_sizes(adapter: Adapter) -> dict[str, str]:
    """Makes the part of a header that says what is adapted; by target where that differs."""
    names = [name for name in TARGETS if name in adapter.alphas]
    ranks = {name: adapter.ranks[name] for name in names}
    alphas = {name: adapter.alphas[name] for name in names}
    rank, alpha = json.dumps(ranks), json.dumps(alphas)
    if len(set(ranks.values())) == len(set(alphas.values())) == 1:
        rank, alpha = str(ranks[names[0]]), str(alphas[names[0]])
    return {"rank": rank, "alpha": alpha, "targets": json.dumps(names)}


def digest_config(config: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a run's config as the run folder holds it, in TOML."""
    return hashlib.sha256(tomli_w.dumps(config).encode()).hexdigest()


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
    check_fit(adapter, {target: layer.weight.shape for target, layer in linears.items()})
    for target, linear in linears.items():
        linear.lora_A, linear.lora_B = (
            LoRAParam(jnp.asarray(adapter.matrices[name])) if name in adapter.matrices else None
            for name in (f"blocks.{target}.lora_A", f"blocks.{target}.lora_B")
        )
        if target in adapter.alphas:
            linear.lora_scale = strength * adapter.scale(target)


def check_fit(adapter: Adapter, weight_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BadInput if a matrix does not fit a model; ``weight_shapes`` are [N, out, in]."""
    expected = {}
    for target, rank in adapter.ranks.items():
        num_layers, num_out, num_in = weight_shapes[target]
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
            + _say_model([matrix.shape for matrix in adapter.matrices.values()])
        )


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


def to_tensors(adapter: Adapter, dialect: Dialect = "comfyui") -> dict[str, np.ndarray]:
    """Names the matrices as a dialect does, one tensor per layer, in their own dtype."""
    tensors = {}
    for path, matrix in adapter.matrices.items():
        target, _, side = path.removeprefix("blocks.").rpartition(".")
        kind: Kind = "lora_A" if side == "lora_A" else "lora_B"
        alpha = np.asarray(adapter.alphas[target], np.float32)
        for layer, tensor in enumerate(matrix):
            name = spell_name(dialect, Entry(layer, target, kind))
            tensors[name] = np.ascontiguousarray(tensor)
            if dialect == "kohya" or (dialect == "comfyui" and adapter.scale(target) != 1):
                tensors[spell_name(dialect, Entry(layer, target, "alpha"))] = alpha
    return tensors


def to_header(adapter: Adapter, dialect: Dialect) -> dict[str, str]:
    """Makes the header of a file: the adapter's metadata, and the alphas that no tensor holds."""
    if dialect != "diffusers":
        return adapter.metadata
    return adapter.metadata | {PEFT_HEADER: write_peft_header(adapter.ranks, adapter.alphas)}


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str],
    source: str,
    peft: Mapping[str, Any] | None = None,
) -> Adapter:
    """Stacks the tensors of a file in whatever dialect; the inverse of ``to_tensors``.

    Args:
        tensors: everything in the file; any of the ten targets, each in all layers.
        metadata: the file's header.
        source: the file, for messages.
        peft: PEFT's config of the file, if it has one apart.

    Raises:
        BadInput: names it does not know or misses, shapes or alphas that differ between layers.
    """
    layers, spelling = _sort_by_target(tensors, source)
    num_layers = _count_layers(layers, source)
    metadata = dict(metadata)
    header = metadata.pop(PEFT_HEADER, None)
    matrices = {}
    for target, of_target in layers.items():
        for side in ("lora_A", "lora_B"):
            parts = [of_target[layer][side] for layer in range(num_layers)]
            if len({(part.shape, part.dtype) for part in parts}) > 1 or parts[0].ndim != 2:
                raise BadInput(f"{source}: {target}.{side}: matrices alike in all layers expected")
            matrices[f"blocks.{target}.{side}"] = np.stack(parts)
    ranks = {target: _find_rank(target, matrices, source) for target in layers}
    _check_numbers(matrices, source)
    alphas = {}
    try:
        peft = read_peft_header(header) if header else peft
        for target, rank in ranks.items():
            default = [float(rank)] * num_layers
            if peft is not None:
                modules = [spelling.module(target, layer) for layer in range(num_layers)]
                default = [find_peft_alpha(peft, module, rank=rank) for module in modules]
            alphas[target] = _find_alpha(target, layers, default, source)
    except ValueError as error:
        raise BadInput(
            f"{source}: what PEFT says of this LoRA does not fit it ({error}); export it again"
        ) from None
    return Adapter(matrices, alphas, metadata=metadata, source=source)


def _read_file(path: Path) -> Adapter:
    if not path.exists():
        raise BadInput(f"{path}: no such file or training run")
    files = SafetensorsFiles(path)
    for name, kind in files.dtypes.items():
        if kind not in ("F64", "F32", "F16", "BF16"):
            raise BadInput(f"{path}: {name} is {kind}; a LoRA of 16 or 32 bits was expected")
    tensors = {name: files.read(name) for name in files.shapes}
    peft = None
    config = path.with_name("adapter_config.json")
    if config.is_file() and any(name.startswith(PEFT_PREFIX) for name in tensors):
        try:
            peft = json.loads(config.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{config}: is not JSON ({error}); copy it again") from None
    return from_tensors(tensors, metadata=files.metadata, source=str(path), peft=peft)


def _read_checkpoint(path: Path, step: int | None, ema: bool) -> Adapter:
    matrices, meta = read_trainable(path, step, ema=ema)
    if trains_all(meta):
        raise BadInput(
            f"{path}: holds all weights of a model, not a LoRA; make a model folder of it with "
            "wan22-export --model BASE --out FOLDER, and use that"
        )
    adapter = make_adapter(matrices, meta, source=str(path))
    # The same checks as for a file: a checkpoint of another kind of training must not pass.
    from_tensors(to_tensors(adapter), metadata={}, source=str(path))
    return adapter


_Layers = dict[str, dict[int, dict[Kind, np.ndarray]]]  # by target and layer


def _sort_by_target(tensors: Mapping[str, np.ndarray], source: str) -> tuple[_Layers, Spelling]:
    read = {name: read_name(name) for name in tensors}
    known = {name: found for name, found in read.items() if found is not None}
    unknown = [f"{name} {list(tensors[name].shape)}" for name in tensors if name not in known]
    if unknown:
        raise BadInput(
            f"{source}: is not a LoRA of the blocks of {BASE_MODEL} in the dialect of ComfyUI "
            f"({spell_name('comfyui', Entry(0, 'self_attn.q', 'lora_A'))} and the like), Diffusers "
            f"or kohya; {_say_model([t.shape for t in tensors.values()])}; unknown: "
            + _list(unknown)
        )
    if not known:
        raise BadInput(f"{source}: holds no tensors, a LoRA was expected")
    first, (_, spelling) = next(iter(known.items()))
    layers: _Layers = {}
    for name, (entry, other) in known.items():
        if not spelling.agrees(other):
            raise BadInput(
                f"{source}: holds names of two makers, {first} and {name}; keep one LoRA a file"
            )
        spelling = spelling.join(other)
        of_layer = layers.setdefault(entry.target, {}).setdefault(entry.layer, {})
        of_layer[entry.kind] = tensors[name]
    return layers, spelling


def _count_layers(layers: _Layers, source: str) -> int:
    """The number of layers, all of which must have both matrices of every target."""
    num_layers = 1 + max(layer for of_target in layers.values() for layer in of_target)
    kinds = {  # a target has an alpha in all layers or in none
        target: {kind for of_layer in of_target.values() for kind in of_layer}
        for target, of_target in layers.items()
    }
    missing = [
        f"blocks.{layer}.{target}.{kind}"
        for target, of_target in layers.items()
        for layer in range(num_layers)
        for kind in sorted(kinds[target] | {"lora_A", "lora_B"})
        if kind not in of_target.get(layer, {})
    ]
    if missing:
        raise BadInput(
            f"{source}: is incomplete, export it again; a linear is adapted in every block or in "
            f"none, missing: {_list(missing)}"
        )
    return num_layers


def _find_rank(target: str, matrices: dict[str, np.ndarray], source: str) -> int:
    a, b = (matrices[f"blocks.{target}.{side}"] for side in ("lora_A", "lora_B"))
    if a.shape[1] != b.shape[2]:
        raise BadInput(
            f"{source}: one rank was expected at {target}, lora_A is {list(a.shape[1:])} and "
            f"lora_B is {list(b.shape[1:])}"
        )
    return a.shape[1]


def _check_numbers(matrices: Mapping[str, np.ndarray], source: str) -> None:
    for name, matrix in matrices.items():
        if not matrix.size:
            raise BadInput(f"{source}: {name} is empty, {list(matrix.shape)}; export it again")
        if not np.isfinite(matrix).all():
            raise BadInput(
                f"{source}: {name} has infinite or NaN values; choose an earlier checkpoint of it"
            )


def _find_alpha(target: str, layers: _Layers, default: list[float], source: str) -> float:
    """The alpha that all layers share; ``default`` has that of each layer without a tensor."""
    alphas = {
        float(alpha)
        for layer, of_layer in layers[target].items()
        for alpha in np.ravel(of_layer.get("alpha", default[layer]))
    }
    if len(alphas) != 1:
        raise BadInput(
            f"{source}: one alpha for all layers of {target} was expected, came {sorted(alphas)}"
        )
    if not math.isfinite(alpha := alphas.pop()):
        raise BadInput(f"{source}: {target}.alpha is {alpha}, a number was expected")
    return alpha


def _say_model(shapes: list[tuple[int, ...]]) -> str:
    remedy = f"choose one that was trained on {BASE_MODEL}"
    is_other = any(_WIDTH_14B in shape for shape in shapes)
    return f"this one is of Wan2.1 or Wan2.2 14B, {remedy}" if is_other else remedy


_WIDTH_14B = 5120


def _list(items: list[str]) -> str:
    shown = ", ".join(items[:8])
    return shown if len(items) <= 8 else f"{shown} and {len(items) - 8} more"
