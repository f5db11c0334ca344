"""The train step on several devices: the same draws, loss and weights as on one."""

import functools
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from wan22_jax.batch import Batch
from wan22_jax.geometry import Bucket
from wan22_jax.model.flow import sigma_grid
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.prompts import Request
from wan22_jax.sample import choose_split
from wan22_jax.sampling import sample_latents
from wan22_jax.sharding import Split, make_mesh, put, put_examples, replicated
from wan22_jax.training.blockwise import BlockwiseOptimizer
from wan22_jax.training.draws import TaskMix
from wan22_jax.training.frozen import Frozen, place_frozen
from wan22_jax.training.full import place_full, split_full
from wan22_jax.training.optimizer import make_optimizer
from wan22_jax.training.optimizer_options import (
    SGD,
    Adafactor,
    AdamW,
    Adopt,
    Lion,
    Muon,
    Prodigy,
    ScheduleFreeAdamW,
    StableAdamW,
)
from wan22_jax.training.rounding import round_to_bfloat16
from wan22_jax.training.step import (
    StepSettings,
    TrainState,
    compile_train_step,
    init_state,
    split_model,
)
from wan22_jax.velocity import place_velocity
from wan22_jax.videos import Video
from wan22_jax.weights import stored_dtype

CONFIG = TransformerConfig(
    dim=128, ffn_dim=96, num_heads=8, num_layers=1, text_dim=8, text_len=6, freq_dim=16
)
# With a large eps: what is next to zero shall not decide by its sign.
OPTIMIZERS = {
    "adamw": AdamW(eps=0.01),
    "stableadamw": StableAdamW(eps=0.01),
    "sgd": SGD(momentum=0.9),
    "adopt": Adopt(eps=0.01),
    "lion": Lion(),
    "adafactor": Adafactor(),
    "muon": Muon(adam_eps=0.01),
    "prodigy": Prodigy(d0=1e-3, eps=0.01),
    "schedule_free": ScheduleFreeAdamW(eps=0.01),
}
NUM_EXAMPLES, FRAMES = 8, 3  # of 2 x 3 tokens each: parts of 3, 2 or 1; the last ones have none


@pytest.fixture(scope="module", autouse=True)
def _without_optimizations():
    """Compiling is most of the time that these tests take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_batch(num_accumulate: int) -> Batch:
    rng = np.random.default_rng(0)
    size = NUM_EXAMPLES // num_accumulate
    latents = rng.normal(size=(NUM_EXAMPLES, FRAMES, 4, 6, 48)).astype(jnp.bfloat16)
    text = rng.normal(size=(NUM_EXAMPLES, 6, 8)).astype(jnp.bfloat16)
    mask = rng.integers(0, 3, (NUM_EXAMPLES, 4, 6)).astype(jnp.bfloat16) / 2
    return Batch(*(x.reshape(num_accumulate, size, *x.shape[1:]) for x in (latents, text, mask)))


def make_model(*, dtype: str) -> WanTransformer:
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    if dtype == "float8":
        narrow = [
            (
                path,
                leaf.replace(leaf[...].astype(stored_dtype(".".join(map(str, path)), "bfloat16"))),
            )
            for path, leaf in nnx.to_flat_state(nnx.state(model))
        ]
        nnx.update(model, nnx.from_flat_state(narrow))
        model.to_float8()
    return model


def start(
    split: Split,
    *,
    full: bool,
    dtype: str,
    settings: StepSettings,
    swap: int,
    in_loop: bool,
    optimizer: str,
) -> tuple[Any, TrainState, Frozen]:
    sharding = replicated(make_mesh(split))
    schedule = optax.constant_schedule(1e-2)
    inner = make_optimizer(
        OPTIMIZERS[optimizer], schedule=schedule, gradient_clipping=0.0 if full else 1.0
    )
    model = make_model(dtype=dtype)
    if full:
        blockwise = BlockwiseOptimizer(inner, max_grad_norm=1.0, on_host=swap > 0)
        graphdef, weights, template = split_full(model, dtype="float32")
        masters = place_full(weights, sharding, dtype="float32")
        state = TrainState(
            put(jnp.zeros((), jnp.int32), sharding), masters, blockwise.place_state(masters)
        )
        frozen = Frozen(put(template, sharding))
    else:
        model.add_lora(jax.random.key(1), rank=2, alpha=6.0)
        graphdef, trainable, base = split_model(model)
        trainable = jax.tree.map(lambda leaf: leaf + 0.05, trainable)
        state = put(init_state(trainable, inner), sharding)
        frozen = place_frozen(
            base,
            activation_checkpointing=settings.activation_checkpointing,
            blocks_to_swap=swap,
            sharding=sharding,
            in_loop=in_loop,
        )
    step = compile_train_step(
        graphdef, blockwise if full else inner, settings, state=state, frozen=frozen
    )
    return step, state, frozen


@functools.cache
def train(
    split: Split,
    *,
    full: bool = False,
    dtype: str = "float32",
    num_accumulate: int = 1,
    policy: bool | str = True,
    dropout: float = 0.0,
    swap: int = 0,
    in_loop: bool = False,
    optimizer: str = "adamw",
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]], TrainState, Frozen]:
    """Trains three steps; returns weights and metrics on the host, and what is on the devices."""
    settings = StepSettings(
        TaskMix(0.5), activation_checkpointing=policy, lora_dropout=dropout, ema_decay=0.0
    )
    step, state, frozen = start(
        split,
        full=full,
        dtype=dtype,
        settings=settings,
        swap=swap,
        in_loop=in_loop,
        optimizer=optimizer,
    )
    mesh = state.step.sharding.mesh
    key, grid = put((jax.random.key(3), jnp.asarray(sigma_grid())), replicated(mesh))
    batch = make_batch(num_accumulate)
    placed = put_examples(batch, mesh, total=batch.text_ABSE.shape[1])
    history = []
    for _ in range(3):
        state, metrics = step(state, frozen, placed, key, grid)
        history.append(jax.tree.map(np.asarray, metrics))
    weights = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.trainable)
    }
    return weights, history, state, frozen


def assert_equal_to_one_device(
    split: Split, *, tolerance: float = 1e-5, **options: Any
) -> tuple[TrainState, Frozen]:
    alone, history, *_ = train(Split(), **options)
    weights, other_history, state, frozen = train(split, **options)
    assert state.step.sharding.mesh.size == split.num_devices > 1
    for metrics, others in zip(history, other_history, strict=True):
        for name in ("sigma_AB", "task_AB"):
            np.testing.assert_array_equal(metrics[name], others[name])
        for name in ("loss", "loss_AB", "grad_norm"):
            np.testing.assert_allclose(metrics[name], others[name], rtol=tolerance, err_msg=name)
    for name, array in alone.items():
        np.testing.assert_allclose(weights[name], array, atol=tolerance, err_msg=name)
    return state, frozen


def cases(quick: list[Split]) -> list[Any]:
    """All ways to divide 2, 4 and 8 devices; but for some, make long runs them."""
    sizes = (1, 2, 4, 8)
    every = [Split(*split) for split in itertools.product(sizes, repeat=3)]
    long = [one for one in every if one.num_devices in (2, 4, 8) and one not in quick]
    return [*quick, *(pytest.param(one, marks=pytest.mark.long) for one in long)]


def name(split: Split) -> str:
    return "x".join(map(str, split))


QUICK = [Split(1, 4), Split(1, 1, 8), Split(2, 2, 2)]


@pytest.mark.parametrize("split", cases(QUICK), ids=name)
def test_an_adapter_trains_as_on_one_device(split):
    state, frozen = assert_equal_to_one_device(split)
    (rows,) = frozen.parts
    weight = rows[0]["ffn.0.weight"]
    assert weight.sharding.spec == PartitionSpec("fsdp")
    assert weight.addressable_shards[0].data.shape == (96 // split.fsdp, 128)
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(state)} == {PartitionSpec()}


@pytest.mark.parametrize("split", cases([Split(2, 2, 2)]), ids=name)
def test_all_weights_train_as_on_one_device(split):
    state, _ = assert_equal_to_one_device(split, full=True)
    of_weight = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jax.tree_util.DictKey("blocks.0.ffn.0.weight") in path
    ]
    assert len(of_weight) == 3  # with two moments
    for leaf in of_weight:
        assert leaf.addressable_shards[0].data.size == leaf.size // split.fsdp


def test_float8_trains_as_on_one_device():
    # Programs differ in what XLA fuses, and so in how it rounds to bfloat16.
    assert_equal_to_one_device(Split(1, 2, 2), tolerance=1e-3, dtype="float8")


@pytest.mark.long
def test_blocks_activations_and_optimizer_state_on_the_host():
    _, frozen = assert_equal_to_one_device(
        Split(1, 2, 2), num_accumulate=2, policy="offload_attention", swap=1, dropout=0.25
    )
    (part,) = frozen.parts
    weight = part.on_host[0]["ffn.0.weight"]
    assert weight.sharding.memory_kind == "pinned_host"
    assert weight.sharding.spec == PartitionSpec("fsdp")
    state, _ = assert_equal_to_one_device(Split(1, 2, 2), full=True, swap=1)
    assert any(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(state))


@pytest.mark.long
@pytest.mark.parametrize("split", [Split(1, 2), Split(1, 1, 2)], ids=str)
def test_blocks_in_a_loop_train_as_on_one_device(split):
    _, frozen = assert_equal_to_one_device(split, in_loop=True)
    assert not frozen.parts


def test_stacks_of_matrices_are_divided_by_rows_and_those_of_vectors_are_not():
    _, _, base = split_model(make_model(dtype="float32"))
    sharding = replicated(make_mesh(Split(1, 2)))
    placed = place_frozen(
        base, activation_checkpointing=True, blocks_to_swap=0, sharding=sharding, in_loop=True
    )
    for path, leaf in nnx.to_flat_state(placed.rest):
        is_divided = path[0] == "blocks" and path[-1] == "weight" and leaf[...].ndim == 3
        spec = PartitionSpec(None, "fsdp") if is_divided else PartitionSpec()
        assert leaf[...].sharding.spec == spec, path


# Not of an adapter: lion, adafactor and muon, which make steps of the same size of gradients that
# are zero up to rounding. Its state is on every device, so its update is the same program anyway.
@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["stableadamw", "sgd", "adopt", "prodigy", "schedule_free"])
def test_optimizers_train_an_adapter_as_on_one_device(optimizer):
    assert_equal_to_one_device(Split(1, 2), optimizer=optimizer)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["stableadamw", "sgd", "adopt", "lion", "adafactor", "muon"])
def test_optimizers_train_all_weights_as_on_one_device(optimizer):
    assert_equal_to_one_device(Split(1, 2), optimizer=optimizer, full=True)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_weights_are_rounded_by_the_same_bits(rounding):
    rng = np.random.default_rng(0)
    shapes = {
        "blocks.0.ffn.0.weight": (96, 64),
        "blocks.0.ffn.0.bias": (96,),
        "blocks.1.ffn.0.weight": (96, 64),
        "head.head.weight": (48, 64),
    }
    weights, *grads = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    )
    found = []
    for split in (Split(), Split(1, 2)):
        sharding = replicated(make_mesh(split))
        trained = place_full(weights, sharding, dtype="bfloat16")
        inner = make_optimizer(
            AdamW(), schedule=optax.constant_schedule(1e-2), gradient_clipping=0.0
        )
        inner = round_to_bfloat16(inner, rounding=rounding, seed=0)
        optimizer = BlockwiseOptimizer(inner, max_grad_norm=1.0, on_host=False)
        state, step = optimizer.place_state(trained), jax.jit(optimizer.step)
        for each in grads:
            placed = {name: put(grad, trained[name].sharding) for name, grad in each.items()}
            trained, state = step(placed, state, trained, jnp.float32(3.0))
        found.append(jax.tree.map(np.asarray, (trained, state)))
        assert trained["blocks.1.ffn.0.weight"].addressable_shards[0].data.shape == (
            96 // split.fsdp,
            64,
        )
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_devices_that_share_a_video_sample_it_as_one_does():
    rng = np.random.default_rng(0)
    texts = (jnp.asarray(rng.normal(size=(1, 6, 8)), jnp.float32) for _ in range(2))
    sample = partial(
        sample_latents,
        text=next(texts),
        negative=next(texts),
        shape=(1, FRAMES, 4, 6, 48),
        solver="unipc",
        steps=2,
        shift=5.0,
        guidance=4.0,
        key=jax.random.key(0),
    )
    found = []
    for split in (Split(), Split(2, 2, 2)):
        sharding = replicated(make_mesh(split))
        model = place_velocity(make_model(dtype="float32"), blocks_to_swap=1, sharding=sharding)
        found.append(sample(model, paired=split.data > 1))
        assert found[-1].sharding.mesh.size == split.num_devices
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_guidance_is_divided_where_there_are_halves():
    guided, unguided = (
        Video(Request("a cat", guidance=guidance), Path("out.mp4"), Bucket(64, 64, 5), None)
        for guidance in (5.0, 1.0)
    )
    divide = partial(choose_split, num_heads=24)
    assert divide([guided], num_devices=1) == Split()
    assert divide([guided], num_devices=2) == Split(2)
    assert divide([guided], num_devices=8) == Split(2, 1, 4)
    assert divide([guided], num_devices=10) == Split(2, 1, 4)  # of 5, which 24 heads do not divide
    assert divide([guided], num_devices=3) == Split(1, 1, 3)
    assert divide([guided, unguided], num_devices=2) == Split(1, 1, 2)
