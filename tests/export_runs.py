"""Runs to export: checkpoints as wan22-train leaves them, of a tiny model, without training."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from convert.weights import convert
from wan22_jax.adapter import BASE_MODEL, Adapter, make_adapter
from wan22_jax.adapter_targets import LoRATarget, describe_targets
from wan22_jax.checkpoint import open_checkpoints
from wan22_jax.model_folder import read_model_card
from wan22_jax.model_tensors import FolderTensors, stacked_weight_shapes
from wan22_jax.training.step import TrainState

RANK, ALPHA = 4, 6.0
ALL = ("cross_attn.k", "cross_attn.o", "cross_attn.q", "cross_attn.v", "ffn.0", "ffn.2")
ALL += ("self_attn.k", "self_attn.o", "self_attn.q", "self_attn.v")
SEVERAL = {"self_attn.q": LoRATarget(2, 6.0), "ffn.0": LoRATarget(3, 3.0)}


def draw_adapter(
    shapes: dict[str, tuple[int, ...]], targets: dict[str, LoRATarget], *, seed: int = 0
) -> Adapter:
    """A LoRA with B != 0, and alpha != rank unless the targets say so."""
    rng = np.random.default_rng(seed)
    matrices = {}
    for target, (rank, _, _) in targets.items():
        layers, num_out, num_in = shapes[target]
        for side, shape in (("lora_A", (rank, num_in)), ("lora_B", (num_out, rank))):
            drawn = rng.normal(size=(layers, *shape)).astype(np.float32) / 4
            matrices[f"blocks.{target}.{side}"] = drawn
    meta = {"targets": describe_targets(targets), "base_digest": "a" * 64, "step": 7}
    meta["config"] = {"adapter": {"dtype": "bfloat16"}}
    return make_adapter(matrices, meta, source="mine")


def start_lora_run(official: Path, folder: Path) -> tuple[Path, Path, Adapter]:
    """Converts a checkpoint and makes a run on it: the model's folder, the run's, the LoRA."""
    model, run_dir = folder / "model", folder / "lora_run"
    convert(official, model)
    return model, run_dir, write_lora_run(run_dir, model, ckpt_path=model)


def write_lora_run(
    run_dir: Path,
    model: Path,
    *,
    seed: int = 0,
    ckpt_path: Path,
    averages: Mapping[str, np.ndarray] | None = None,
) -> Adapter:
    """A run on a model folder with one checkpoint, of step 7; ``ckpt_path`` is in its config."""
    targets = dict.fromkeys(ALL, LoRATarget(RANK, ALPHA))
    adapter = draw_adapter(stacked_weight_shapes(FolderTensors(model)), targets, seed=seed)
    meta = _describe(model, ckpt_path) | {"targets": describe_targets(targets)}
    meta["config"]["adapter"] = {"dtype": "bfloat16", "rank": RANK, "alpha": ALPHA}
    _save(run_dir, adapter.matrices, meta, averages)
    return adapter


def write_full_run(
    run_dir: Path,
    model: Path,
    *,
    ckpt_path: Path,
    noise: float = 0.02,
    averages: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """A run without adapter on a model folder; returns its weights by official name."""
    tensors, rng = FolderTensors(model), np.random.default_rng(1)
    weights = {}
    for name, shape in tensors.shapes.items():
        base = tensors.read(name).astype(np.float32)
        weights[name] = base + noise * rng.normal(size=shape).astype(np.float32)
    _save(run_dir, weights, _describe(model, ckpt_path) | {"targets": None}, averages)
    return weights


def _describe(model: Path, ckpt_path: Path) -> dict:
    config = {"model": {"ckpt_path": str(ckpt_path), "dtype": "bfloat16"}}
    digest = read_model_card(model).digests["transformer"]
    return {"base_digest": digest, "seed": 0, "config": config, "base_model": BASE_MODEL}


def _save(
    run_dir: Path,
    matrices: Mapping[str, np.ndarray],
    meta: dict,
    averages: Mapping[str, np.ndarray] | None,
) -> None:
    run_dir.mkdir()
    arrays = {name: jnp.asarray(array) for name, array in matrices.items()}
    ema = None
    if averages is not None:
        ema = {name: jnp.asarray(array) for name, array in averages.items()}
    opt_state = optax.sgd(1.0, momentum=0.9).init(arrays)
    with open_checkpoints(run_dir) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(7), arrays, opt_state, ema), meta)
