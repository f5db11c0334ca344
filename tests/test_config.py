"""What does the schema take, and what does it refuse?"""

import itertools
import json
from pathlib import Path

import pytest

from wan22_jax.config import dump_config, load_config, load_dataset
from wan22_jax.data.batching import make_batching
from wan22_jax.errors import BadInput
from wan22_jax.model.flow import SQUARED, Penalty
from wan22_jax.model.remat import POLICIES
from wan22_jax.training.draws import TaskMix

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG, DATASET = CONFIGS / "wan2.2_5b_lora.toml", CONFIGS / "dataset_video.toml"


DATASETS = sorted(CONFIGS.rglob("dataset*.toml"))
SMALL_GPUS = {"24gb": ("offload_attention", 0), "12gb": ("offload_attention", 30)}


@pytest.mark.parametrize(
    "path", sorted({*CONFIGS.rglob("*.toml")} - {*DATASETS}), ids=lambda path: path.name
)
def test_the_configs_of_the_repository_load_and_are_written_back(path, tmp_path):
    config = load_config(path)
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml") == config


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.name)
def test_the_dataset_files_of_the_repository_load(path):
    assert load_dataset(path).directory


@pytest.mark.parametrize("size", SMALL_GPUS)
def test_the_configs_for_small_gpus_differ_in_memory_alone(size):
    small = load_config(CONFIGS / f"wan2.2_5b_lora_{size}.toml")
    assert small.model.transformer_dtype == "float8"
    assert (small.activation_checkpointing, small.blocks_to_swap) == SMALL_GPUS[size]
    assert [1280, 704, 121] in (load_dataset(CONFIGS.parent / small.dataset).size_buckets or [])
    plain = load_config(CONFIG).model_dump()
    changed = {name for name, value in small.model_dump().items() if value != plain[name]}
    memory = {"activation_checkpointing", "blocks_to_swap", "model"}
    assert changed - memory == {"output_dir", "dataset"}


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_is_accepted_and_written_back(policy, tmp_path):
    config = load_config(CONFIG, [f"activation_checkpointing={json.dumps(policy)}"])
    assert config.activation_checkpointing is policy or config.activation_checkpointing == policy
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("overrides", "accumulates"),
    [
        ([], False),
        (["gradient_accumulation_steps=2"], True),
        (["global_batch_size=4", "micro_batch_size_per_gpu=2"], True),
        (["global_batch_size=4", "micro_batch_size_per_gpu=2", "parallel.data=2"], False),
        (["global_batch_size=4", "micro_batch_size_per_gpu=[[512, 4], [1024, 1]]"], True),
    ],
)
def test_whether_a_step_sums_gradients(overrides, accumulates):
    assert load_config(CONFIG, overrides).accumulates == accumulates


def test_an_override_wins_over_the_file():
    assert load_config(CONFIG, ["optimizer.lr=0.5", "model.shift=3"]).model.shift == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr, did you mean optimizer.lr?"),
        ("ckpt_path='x'", "unknown key ckpt_path, did you mean model.ckpt_path?"),
        ("epochs=1.5", "key epochs: Input should be a valid integer, got 1.5"),
        ("epochs=0", "key epochs: Input should be greater than or equal to 1"),
        ("optimizer.lr=inf", "key optimizer.lr: "),
        ("model.shift=inf", "key model.shift: "),
        ("gradient_clipping=nan", "key gradient_clipping: "),
        ("optimizer.betas=[0.9,1.5]", "key optimizer.betas.1: "),
        ("optimizer.betas=[0.9]", "key optimizer.betas: "),
        ("optimizer.type='prodigi'", "[optimizer] type = 'prodigi' is unknown (known: adamw, "),
        ("optimizer.type='automagic'", "use 'prodigy'"),
        ("optimizer.gradient_release=true", "steps inside the backward pass"),
        ("optimizer.d0=1", "unknown key optimizer.d0 (AdamW takes lr, weight_decay, betas, "),
        ("optimizer=3", "[optimizer] must be a table"),
        ("lr_scheduler='cosin'", "key lr_scheduler: Input should be 'constant', 'linear' or 'cos"),
        ("model.min_t=1.0", "key model.min_t: "),
        ("blocks_to_swap=-1", "key blocks_to_swap: Input should be greater than or equal to 0"),
        ("activation_checkpointing=keep_atention", "unknown, did you mean 'keep_attention'? (kno"),
        ("activation_checkpointing=True", "'True' is unknown, did you mean true? (known: false, "),
        ("activation_checkpointing=cpu", "'cpu' is unknown (known: false, true, 'unsloth', "),
        ("adapter.type='lokr'", "only low-rank matrices are trained; use 'lora'"),
        ("adapter.type='dora'", "only low-rank matrices are trained; use 'lora'"),
        ("adapter.exclude_modules='.*'", "[adapter] exclude_modules leaves no linear to train"),
        ("adapter.exclude_modules=['to_q']", "'to_q' is none of the linears of a block: self_attn"),
        ("adapter.targets=[{pattern='q('}]", "'q(' is not a regular expression"),
        ("adapter.targets=[{pattern='blocks.[0-9].ffn.0'}]", "fits ffn.0 in some blocks only"),
        ("adapter.targets=[{pattern='q'}]", "targets pattern 'q' is none of the linears"),
        ("adapter.targets=[{rank=2}]", "key adapter.targets.0.pattern is missing"),
        ("model.transformer_path='x'", "wan22-convert --ckpt_path MODEL --transformer FILE --out"),
        ("model.llm_path='x'", "wan22-convert --ckpt_path MODEL --text_encoder FILE --out FOLDER"),
        ("model.transformer_dtype='float8_e5m2'", "e5m2 keeps two bits of a weight's mantissa"),
        ("model=3", "key model: "),
        ("huber_delta=0.0", "key huber_delta: Input should be greater than 0"),
        ("i2v_first_frames=0", "key i2v_first_frames"),
        ("i2v_first_frames=[]", "key i2v_first_frames"),
        ("i2v_last_frame_fraction=1.5", "key i2v_last_frame_fraction: "),
        ("micro_batch_size_per_gpu=0", "key micro_batch_size_per_gpu"),
        ("micro_batch_size_per_gpu=[[512]]", "key micro_batch_size_per_gpu"),
        ("micro_batch_size_per_gpu=[[512, 0]]", "key micro_batch_size_per_gpu"),
        ("eval_datasets=['a.toml', {name='eval0', config='b'}]", "two have one name; give each"),
        ("eval_datasets=[{name='train', config='b'}]", "the name 'train' is taken; choose one"),
        ("eval_datasets=[{name='a_ema', config='b'}]", "the name 'a_ema' is taken"),
        ("eval_datasets=[{config='b'}]", "eval_datasets.0"),
        ("novalue", "expected key.path=value"),
    ],
)
def test_what_is_refused_is_named(override, message):
    with pytest.raises(BadInput) as refusal:
        load_config(CONFIG, [override])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("first", "second"),
    list(itertools.combinations(["huber_delta=1", "smooth_l1_beta=0.5", "pseudo_huber_c=1"], 2)),
)
def test_one_loss_is_chosen(first, second):
    with pytest.raises(BadInput, match="each choose the loss; set one of them"):
        load_config(CONFIG, [first, second])


def test_the_config_says_which_loss_tasks_and_batches(tmp_path):
    plain = load_config(CONFIG)
    assert plain.penalty == SQUARED
    assert plain.tasks == TaskMix(0.2)
    assert plain.batching == plain.eval_batching == make_batching(1, 1)
    assert plain.eval_sets == {}
    for key, kind in (
        ("huber_delta", "huber"),
        ("smooth_l1_beta", "smooth_l1"),
        ("pseudo_huber_c", "pseudo_huber"),
    ):
        assert load_config(CONFIG, [f"{key}=0.25"]).penalty == Penalty(kind, 0.25)
    config = load_config(
        CONFIG,
        [
            "i2v_first_frames=[1, 2]",
            "i2v_last_frame_fraction=0.25",
            "micro_batch_size_per_gpu=[[512, 4], [1024, 1]]",
            "gradient_accumulation_steps=2",
            "image_micro_batch_size_per_gpu=8",
            "eval_image_micro_batch_size_per_gpu=[[512, 3]]",
            "eval_gradient_accumulation_steps=5",
            "eval_datasets=['a.toml', {name='held_out', config='b.toml'}]",
        ],
    )
    assert config.tasks == TaskMix(0.2, (1, 2), 0.25)
    sizes = [[512, 4], [1024, 1]]
    assert config.batching == make_batching(sizes, 8, accumulation=2)
    assert config.eval_batching == make_batching(sizes, [[512, 3]], accumulation=5)
    assert config.micro_batch == 4
    assert config.eval_sets == {"eval0": Path("a.toml"), "held_out": Path("b.toml")}
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml") == config
    follows = load_config(CONFIG, ["eval_micro_batch_size_per_gpu=2"])
    assert follows.eval_batching == make_batching(2, 2)
    two = [f"{name}_micro_batch_size_per_gpu" for name in ("image_eval", "eval_image")]
    for key in two:
        assert load_config(CONFIG, [f"{key}=2"]).eval_batching == make_batching(1, 2)
    assert load_config(CONFIG, [f"{key}=2" for key in two]).eval_batching == make_batching(1, 2)
    with pytest.raises(BadInput, match="are one key and differ"):
        load_config(CONFIG, [f"{two[0]}=2", f"{two[1]}=3"])
    assert load_config(CONFIG, ["i2v_first_frames=3"]).tasks.first_frames == (3,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "is not valid TOML"),
        (b"output_dir = '\xe9'", "is not valid TOML"),
        (b"", "key output_dir is missing"),
    ],
)
def test_a_broken_file_is_named(content, message, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=rf"bad\.toml: .*{message}"):
        load_config(path)
    with pytest.raises(BadInput, match=r"none\.toml: no such config file"):
        load_config(tmp_path / "none.toml")
