"""What do the benchmarks run? The 5B transformer with random weights, and the step around it.

Weights are drawn on the device, one layer of one parameter at a time, so that making a model never
needs more memory than holding it. A float8 model is the bfloat16 model of the same seed, quantised.
"""

import argparse
import math
import os
import subprocess
import zlib
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from wan22_jax.model.fp8 import quantize_weight
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.model_folder import FLOAT8, abstract_transformer
from wan22_jax.sharding import Split, replicated
from wan22_jax.training.blockwise import BlockwiseOptimizer
from wan22_jax.training.draws import TaskMix
from wan22_jax.training.frozen import place_frozen
from wan22_jax.training.rounding import round_to_bfloat16
from wan22_jax.training.step import (
    Frozen,
    Optimizer,
    StepSettings,
    TrainState,
    compile_train_step,
    loss_fn,
)
from wan22_jax.weights import (
    is_stacked,
    scale_of,
    set_parameters,
    stacked_shapes,
    stored_dtype,
)

RANK = 32
I2V_FRACTION = 0.2
# Gates and scales of this order let every branch move the residual stream, as in a trained model;
# those of a fresh model (0.02) would hide errors that build up over the layers.
MODULATION_STD = 0.2
# For --tiny, which checks on a CPU that a program runs; its figures mean nothing.
TINY = TransformerConfig(
    dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=16, freq_dim=16
)


def make_model(
    config: TransformerConfig,
    *,
    dtype: str,
    seed: int = 0,
    sharpness: float = 1.0,
    on_host: bool = False,
) -> WanTransformer:
    """Draws the frozen weights of a model; it has no adapter yet.

    Args:
        config: sizes of the model.
        dtype: "bfloat16" or "float8".
        seed: of every weight; a weight's draw depends on the seed and its name alone.
        sharpness: mean of the norm weights of q and k. Attention logits have a standard
            deviation of about its square.
        on_host: leave the blocks' weights in host memory, as numpy arrays.
    """
    model = abstract_transformer(config, float8=dtype == FLOAT8)
    shapes = stacked_shapes(model)
    arrays: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.endswith(".weight_scale"):
            continue  # comes with its weight
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        mean, std = _mean_and_std(name, shape, sharpness)
        drawn = _draw(
            key,
            mean,
            std,
            shape=shape,
            stacked=is_stacked(name),
            dtype=stored_dtype(name, jnp.bfloat16),
            quantise=scale_of(name) in shapes,
        )
        if on_host and is_stacked(name):
            drawn = tuple(map(np.asarray, drawn))
        arrays[name] = drawn[0]
        if scale_of(name) in shapes:
            arrays[scale_of(name)] = drawn[1]
    set_parameters(model, arrays)
    return model


def add_lora(model: WanTransformer, *, seed: int, std_b: float = 0.0) -> None:
    """Attaches adapters of rank and alpha 32.

    Args:
        model: gets an adapter on the ten linears of each block.
        seed: of the adapter.
        std_b: standard deviation of the B matrices; at 0, how training starts, the A matrices
            have no gradient. At 0.03 an adapter adds a tenth to its linear's output.
    """
    a_key, b_key = jax.random.split(jax.random.key(seed))
    model.add_lora(a_key, rank=RANK, alpha=float(RANK))
    for number, (_, linear) in enumerate(model.lora_targets()):
        assert linear.lora_B is not None
        key = jax.random.fold_in(b_key, number)
        linear.lora_B[...] = std_b * jax.random.normal(key, linear.lora_B.shape)


def place(
    frozen: nnx.State, *, activation_checkpointing: bool | str, blocks_to_swap: int = 0, mesh: Mesh
) -> Frozen:
    """Moves the frozen weights to where the step reads them."""
    return place_frozen(
        frozen,
        activation_checkpointing=activation_checkpointing,
        blocks_to_swap=blocks_to_swap,
        sharding=replicated(mesh),
    )


def make_full_optimizer(full: str, *, offload: bool) -> BlockwiseOptimizer:
    """AdamW on all weights.

    Args:
        full: see --full.
        offload: keep its state in pinned host memory.
    """
    adamw = optax.adamw(1e-5, b1=0.9, b2=0.99, weight_decay=0.01)
    if full in ("stochastic", "kahan"):
        adamw = round_to_bfloat16(adamw, rounding=full, seed=0)
    return BlockwiseOptimizer(adamw, max_grad_norm=1.0, on_host=offload)


def masters_dtype(full: str) -> jnp.dtype:
    """What the weights that train are kept in."""
    return jnp.dtype(jnp.float32 if full == "float32" else jnp.bfloat16)


def build_step(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    *,
    activation_checkpointing: bool | str,
    state: TrainState,
    frozen: Frozen,
) -> jax.stages.Wrapped:
    """Jits the train step that wan22-train runs, on the devices where its arguments lie."""
    step = compile_train_step(
        graphdef,
        optimizer,
        StepSettings(TaskMix(I2V_FRACTION), activation_checkpointing=activation_checkpointing),
        state=state,
        frozen=frozen,
    )
    return cast(jax.stages.Wrapped, step)


def build_grad(
    graphdef: nnx.GraphDef, *, activation_checkpointing: bool | str
) -> jax.stages.Wrapped:
    """Jits (trainable, frozen, latents, text, draws) -> (loss, gradient), without an optimizer."""
    settings = StepSettings(activation_checkpointing=activation_checkpointing)

    def loss(*args: Any) -> jax.Array:
        return loss_fn(*args, graphdef=graphdef, settings=settings)[0]

    return jax.jit(jax.value_and_grad(loss))


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which train step is meant."""
    parser.add_argument("--bucket", default="1280x704x121", help="width x height x frames")
    parser.add_argument("--dtype", choices=("bfloat16", "float8"), default="bfloat16")
    parser.add_argument(
        "--activation_checkpointing",
        type=read_policy,
        default=True,
        metavar="POLICY",
        help="false, true, unsloth or a named policy, as in the training config",
    )
    parser.add_argument("--blocks_to_swap", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1, help="clips in a device's micro-batch")
    for axis in Split._fields:
        parser.add_argument(f"--{axis}", type=int, default=1, help="devices, as in [parallel]")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    parser.add_argument(
        "--full",
        choices=("float32", "stochastic", "kahan"),
        help="train all weights: float32 masters, or bfloat16 weights rounded so",
    )
    parser.add_argument(
        "--offload_optimizer", action="store_true", help="with --full: its state in host memory"
    )


def read_split(args: argparse.Namespace) -> Split:
    """Reads --data, --fsdp and --context."""
    return Split(args.data, args.fsdp, args.context)


def read_policy(text: str) -> bool | str:
    """Reads --activation_checkpointing: false, true or the name of a policy."""
    return {"false": False, "true": True}.get(text, text)


def limit_memory(memory_gb: float | None) -> None:
    """Limits JAX's allocator; before its first array, and before ``claim_gpu`` sets a default."""
    if memory_gb is None:
        return
    query = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    total_gb = int(listing.splitlines()[0]) * 2**20 / 1e9
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{memory_gb / total_gb:.5f}"


def _mean_and_std(name: str, shape: tuple[int, ...], sharpness: float) -> tuple[float, float]:
    if name.endswith("modulation"):
        return 0.0, MODULATION_STD
    if name.endswith("bias"):
        return 0.0, 0.02
    if "norm" in name:
        return (sharpness if "norm_" in name else 1.0), 0.05
    fan_in = math.prod(shape[1:] if name == "patch_embedding.weight" else shape[-1:])
    return 0.0, 1 / math.sqrt(fan_in)  # keeps the size of what goes in


@partial(jax.jit, static_argnames=("shape", "stacked", "dtype", "quantise"))
def _draw(
    key: jax.Array,
    mean: float,
    std: float,
    *,
    shape: tuple[int, ...],
    stacked: bool,
    dtype: jnp.dtype,
    quantise: bool,
) -> tuple[jax.Array, ...]:
    """Returns (weight,) or (weight in e4m3, its scales); one layer at a time is in float32."""
    num_layers, *layer_shape = shape if stacked else (1, *shape)

    def draw_layer(key: jax.Array) -> tuple[jax.Array, ...]:
        layer = mean + std * jax.random.normal(key, layer_shape, jnp.float32)
        if not quantise:
            return (layer.astype(dtype),)
        return quantize_weight(layer.astype(dtype))

    weight, *scales = jax.lax.map(draw_layer, jax.random.split(key, num_layers))
    return weight.reshape(shape), *scales
