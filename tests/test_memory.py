"""When memory runs out: does the message name the setting that helps next, and only that?"""

import jax
import optax
import pytest

from wan22_jax.config import ModelConfig, TrainConfig
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket
from wan22_jax.model.remat import POLICIES
from wan22_jax.model.transformer import TI2V_5B
from wan22_jax.model.umt5 import UMT5_XXL
from wan22_jax.model.vae import WAN22_VAE
from wan22_jax.model_folder import ModelCard
from wan22_jax.sharding import Split
from wan22_jax.start import choose_optimizer, plan_memory
from wan22_jax.training.memory import FullPlan, MemoryPlan, explain_exhaustion

BUCKET = Bucket(1280, 704, 121)
PLAN = MemoryPlan(
    "bfloat16", num_blocks=30, blocks_to_swap=0, activation_checkpointing=False, micro_batch=1
)


def run_out(plan: MemoryPlan, bucket: Bucket | None = BUCKET) -> str:
    with pytest.raises(BadInput) as refusal, explain_exhaustion(plan, bucket):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    return str(refusal.value)


@pytest.mark.parametrize(
    ("plan", "described"),
    [
        (PLAN, "bfloat16 weights, 0 of 30 blocks in host memory, activations: kept"),
        (
            PLAN._replace(dtype="float8", blocks_to_swap=99, activation_checkpointing="unsloth"),
            "float8 weights, 30 of 30 blocks in host memory, activations: unsloth",
        ),
        (
            PLAN._replace(blocks_to_swap=7, activation_checkpointing=True),
            "bfloat16 weights, 7 of 30 blocks in host memory, activations: recomputed",
        ),
        (
            PLAN._replace(num_shares=4),
            "bfloat16 weights divided among 4 devices, 0 of 30 blocks in host memory, "
            "activations: kept",
        ),
    ],
)
def test_a_plan_says_what_runs(plan, described):
    assert str(plan) == described


@pytest.mark.parametrize("policy", POLICIES)
def test_following_the_advice_ends_at_the_least_memory(policy):
    plan, advice = PLAN._replace(activation_checkpointing=policy), []
    changes = {
        "set activation_checkpointing = 'offload_attention'": {
            "activation_checkpointing": "offload_attention"
        },
        "set [model] transformer_dtype = 'float8'": {"dtype": "float8"},
        "set blocks_to_swap = 30": {"blocks_to_swap": 30},
    }
    while "; set " in run_out(plan):
        said = run_out(plan).partition("; ")[2].partition(", or ")[0]
        advice.append(said)
        plan = plan._replace(**changes[said])
    steps = list(changes)
    assert advice == steps[policy in ("unsloth", "offload_attention") :]
    assert run_out(plan) == (
        "out of GPU memory, or pinned host memory, at 1280x704x121 (27280 tokens a clip); "
        "train on smaller resolutions or frame_buckets"
    )


def test_advice_fits_the_moment():
    assert "lower micro_batch_size_per_gpu" not in run_out(PLAN)
    assert "lower micro_batch_size_per_gpu" in run_out(PLAN._replace(micro_batch=2))
    assert run_out(PLAN, None) == (
        "out of GPU memory loading the model; set [model] transformer_dtype = 'float8', "
        "or lower [adapter] rank"
    )


def test_other_errors_pass():
    error = jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError) as passed, explain_exhaustion(PLAN):
        raise error
    assert passed.value is error


FULL = FullPlan(
    weights="float32",
    rounding=None,
    offload_optimizer=True,
    accumulates=False,
    activation_checkpointing=True,
    micro_batch=1,
    num_parameters=4_999_787_712,
    weight_bytes=19_999_150_848,
    gradient_bytes=10_160_000_000,
    state_bytes=39_998_301_696,
)


def test_a_plan_of_a_full_fine_tuning_says_what_each_part_takes():
    assert str(FULL) == (
        "4,999,787,712 weights train: float32 weights 20.0 GB, gradients 10.2 GB, optimizer state "
        "40.0 GB in host memory; 30.2 GB on a device, activations on top"
    )
    other = FULL._replace(
        weights="bfloat16", rounding="kahan", accumulates=True, offload_optimizer=False
    )
    assert "bfloat16 weights (kahan rounding) 20.0 GB" in str(other)
    assert "gradients 10.2 GB, their sum 20.0 GB, optimizer state 40.0 GB; 90.2 GB" in str(other)


def test_a_plan_of_divided_weights_is_that_of_one_device():
    config = TrainConfig(
        output_dir="runs",
        dataset="dataset.toml",
        model=ModelConfig(ckpt_path="model"),
        epochs=1,
        activation_checkpointing=True,
    )
    card = ModelCard("bfloat16", "", TI2V_5B, WAN22_VAE, UMT5_XXL, {}, "")
    plans = []
    for split in (Split(), Split(fsdp=2)):
        asked = config.model_copy(update={"parallel": config.parallel.fix(split)})
        optimizer = choose_optimizer(asked, optax.adamw(1e-5))
        plans.append(plan_memory(asked, card, optimizer, dtype="bfloat16"))
    alone, halves = plans
    assert alone.weight_bytes == 4 * 4_999_787_712
    assert 0.5 < halves.device_bytes / alone.device_bytes < 0.52  # what is in no block is whole
    assert "weights train, divided among 2 devices: float32 weights 10." in str(halves)


def test_the_advice_of_a_full_fine_tuning_ends_with_a_lora():
    plan = FULL._replace(
        offload_optimizer=False, accumulates=True, activation_checkpointing="keep_qkv"
    )
    changes: list[tuple[str, dict]] = [
        ("set activation_checkpointing = true", {"activation_checkpointing": True}),
        ("set [full] offload_optimizer = true", {"offload_optimizer": True}),
        ("set [full] weights = 'bfloat16'", {"weights": "bfloat16"}),
        ("set gradient_accumulation_steps = 1", {"accumulates": False}),
        ("train a LoRA", {}),
    ]
    for advice, change in changes:
        assert advice in run_out(plan)
        plan = plan._replace(**change)
    assert run_out(plan, None).startswith("out of GPU memory, or pinned host memory, loading")
