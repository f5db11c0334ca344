"""What is where, and in which precision, before the first step of a run?

With an adapter, the model's weights are frozen and the adapter trains in float32. Without one all
weights train: see ``training.full`` for what they are kept in, ``training.blockwise`` for where
the optimizer's state lies.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from wan22_jax.adapter import add_adapter, start_from_existing
from wan22_jax.config import TrainConfig
from wan22_jax.errors import BadInput
from wan22_jax.full_config import FullConfig
from wan22_jax.model.remat import POLICIES
from wan22_jax.model.shards import is_split
from wan22_jax.model_folder import FLOAT8, ModelCard, abstract_transformer, load_transformer
from wan22_jax.parallel import Workload, choose_split
from wan22_jax.processes import gather
from wan22_jax.sharding import device_memory, make_mesh, put
from wan22_jax.training.blockwise import BlockwiseOptimizer
from wan22_jax.training.ema import start_ema
from wan22_jax.training.frozen import place_frozen
from wan22_jax.training.full import describe_full, place_full, split_full
from wan22_jax.training.memory import FullPlan, MemoryPlan
from wan22_jax.training.rounding import round_to_bfloat16
from wan22_jax.training.step import (
    Frozen,
    Optimizer,
    TrainState,
    init_state,
    split_model,
)
from wan22_jax.weights import is_stacked

log = logging.getLogger(__name__)


class Training(NamedTuple):
    """What a train step is compiled from, and its first arguments."""

    graphdef: nnx.GraphDef
    optimizer: Optimizer
    state: TrainState
    frozen: Frozen


def check_deterministic(config: TrainConfig) -> None:
    """Raises BadInput if a GPU cannot compute the same bits each time in such a run.

    XLA 0.11.2 compiles cuDNN's deterministic gradient of attention once for all calls of a shape,
    and then fails to find it for the second: there may be one call, in a loop over the blocks.
    """
    if not _wants_loop(config):
        return
    on_host = POLICIES[config.activation_checkpointing].on_host > 0
    for key, is_set in (
        ("no [adapter] (full fine-tuning)", config.adapter is None),
        (f"blocks_to_swap = {config.blocks_to_swap}", config.blocks_to_swap > 0),
        (f"activation_checkpointing = '{config.activation_checkpointing}'", on_host),
    ):
        if is_set:
            raise BadInput(
                f"deterministic = true with {key}: a GPU cannot do both yet; leave out one of them"
            )


def _wants_loop(config: TrainConfig) -> bool:
    return config.deterministic and jax.default_backend() == "gpu"


def plan_memory(
    config: TrainConfig, card: ModelCard, optimizer: Optimizer, *, dtype: str
) -> MemoryPlan | FullPlan:
    """Says what of the run takes memory, before any of it is there.

    Args:
        config: of the run.
        card: of the model's folder.
        optimizer: from ``choose_optimizer``.
        dtype: of frozen weights.
    """
    if not isinstance(optimizer, BlockwiseOptimizer):
        return MemoryPlan(
            dtype,
            num_blocks=card.transformer.num_layers,
            blocks_to_swap=config.blocks_to_swap,
            activation_checkpointing=config.activation_checkpointing,
            micro_batch=config.micro_batch,
            num_shares=config.parallel.split.fsdp,
        )
    full = config.full or FullConfig()
    model = abstract_transformer(card.transformer, float8=False)
    masters = describe_full(model, dtype=full.weights)
    count = partial(_count_share, num_shares=config.parallel.split.fsdp)
    return FullPlan(
        weights=full.weights,
        rounding=full.weight_rounding,
        offload_optimizer=full.offload_optimizer,
        accumulates=config.accumulates,
        activation_checkpointing=config.activation_checkpointing,
        micro_batch=config.micro_batch,
        num_parameters=sum(leaf.size for leaf in masters.values()),
        weight_bytes=count(masters),
        gradient_bytes=count(describe_full(model, dtype=config.model.dtype)),
        state_bytes=count(jax.eval_shape(optimizer.init, masters)),
        num_shares=config.parallel.split.fsdp,
    )


def divide_work(
    config: TrainConfig, card: ModelCard, *, dtype: str, num_tokens: int
) -> tuple[TrainConfig, Mesh]:
    """Decides what ``[parallel]`` leaves open; returns the config with it, and the mesh.

    A CPU's devices share its cores: one a process takes part, unless more are asked for.

    Args:
        config: of the run.
        card: of the model's folder.
        dtype: of frozen weights.
        num_tokens: of the largest micro-batch of a device.

    Raises:
        BadInput: see ``choose_split``.
    """
    model = abstract_transformer(card.transformer, float8=dtype == FLOAT8)
    num_bytes = _count_bytes(nnx.state(model))
    if dtype == "bfloat16":
        num_bytes //= 2  # abstract weights are float32
    if config.adapter is None:
        full = config.full or FullConfig()
        num_bytes *= 2 if full.offload_optimizer else 4  # weights, gradients, two moments
        if full.weights == "bfloat16":
            num_bytes //= 2
    sizes = card.transformer
    work = Workload(
        sizes.dim,
        sizes.ffn_dim,
        sizes.num_heads,
        sizes.num_layers,
        trains_all=config.adapter is None,
        state_bytes=num_bytes,
        activation_checkpointing=config.activation_checkpointing,
        num_tokens=num_tokens,
    )
    devices = jax.devices()
    if jax.default_backend() == "cpu":
        devices = _list_cores(config.parallel.split.num_devices)
    # All processes have to choose the same, whatever GPUs they have.
    limits = [limit for limit in gather(device_memory(), "memory") if limit is not None]
    split, reason = choose_split(
        config.parallel,
        work,
        num_devices=len(devices),
        memory_bytes=min(limits, default=None),
    )
    mesh = make_mesh(split, devices)
    kind = mesh.devices.flat[0].device_kind
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    log.info(
        "devices: %d x %s%s: data %d x fsdp %d x context %d%s",
        *(split.num_devices, kind, hosts, *split, f" ({reason})" if reason else ""),
    )
    return config.model_copy(update={"parallel": config.parallel.fix(split)}), mesh


def choose_optimizer(config: TrainConfig, inner: optax.GradientTransformation) -> Optimizer:
    """Returns the optimizer as it is for an adapter, else its form for all weights.

    Args:
        config: of the run.
        inner: from ``make_optimizer``; without an adapter one that does not clip.
    """
    if config.adapter is not None:
        return inner
    full = config.full or FullConfig()
    if full.weight_rounding is not None:
        inner = round_to_bfloat16(inner, rounding=full.weight_rounding, seed=config.seed)
    return BlockwiseOptimizer(inner, config.gradient_clipping, on_host=full.offload_optimizer)


def start_training(
    config: TrainConfig,
    folder: Path,
    optimizer: Optimizer,
    *,
    dtype: str,
    key: jax.Array,
    is_new: bool,
    sharding: NamedSharding,
) -> Training:
    """Loads the model and makes the state before the first step.

    Args:
        config: of the run.
        folder: of the model.
        optimizer: from ``choose_optimizer``.
        dtype: of frozen weights.
        key: of the adapter's first values.
        is_new: the run does not go on from a checkpoint.
        sharding: of what is on the device.

    Raises:
        BadInput: the folder has not the weights that are wanted.
    """
    # Placing copies each block: from the host, so that no weight is on the device twice.
    if isinstance(optimizer, BlockwiseOptimizer):
        full = config.full or FullConfig()
        model = load_transformer(folder, dtype=full.weights, host=True)
        graphdef, weights, template = split_full(model, dtype=config.model.dtype)
        del model
        masters = place_full(weights, sharding, dtype=full.weights)
        step = put(jnp.zeros((), jnp.int32), sharding)
        ema = start_ema(masters) if config.ema_decay > 0 else None
        state = TrainState(step, masters, optimizer.place_state(masters), ema)
        return Training(graphdef, optimizer, state, Frozen(put(template, sharding)))
    model = load_transformer(folder, dtype=dtype, host=True)
    add_adapter(model, key, config.lora_targets)
    if config.adapter and config.adapter.init_from_existing and is_new:
        log.info("%s", start_from_existing(model, Path(config.adapter.init_from_existing)))
    graphdef, trainable, frozen = split_model(model)
    state = init_state(trainable, optimizer, ema_decay=config.ema_decay)
    state = put(state, sharding)
    placed = place_frozen(
        frozen,
        activation_checkpointing=config.activation_checkpointing,
        blocks_to_swap=config.blocks_to_swap,
        sharding=sharding,
        in_loop=_wants_loop(config),
    )
    return Training(graphdef, optimizer, state, jax.block_until_ready(placed))


def _list_cores(num_asked: int) -> list[Any]:
    """As many CPU devices of each process."""
    num_each = -(-num_asked // jax.process_count())
    devices = jax.devices()
    if num_each > jax.local_device_count():
        raise BadInput(f"[parallel] asks for {num_asked} devices, there are {len(devices)}")
    return [
        device
        for process in range(jax.process_count())
        for device in [one for one in devices if one.process_index == process][:num_each]
    ]


def _count_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _count_share(tree: Any, *, num_shares: int) -> int:
    """Of one device, where rows of the blocks' matrices are divided among so many."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        is_divided = is_stacked(names[-1]) and leaf.ndim > 1 and is_split(names[-1], 2)
        total += leaf.size * leaf.dtype.itemsize // (num_shares if is_divided else 1)
    return total
