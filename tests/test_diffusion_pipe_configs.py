"""Configs made of the keys that diffusion-pipe documents for Wan run unchanged.

Their ckpt_path is a folder that wan22-convert wrote; the rest is as its users write it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from test_train import DATASET, compiled, folder, only_run, read_scalars  # noqa: F401

from wan22_jax import train
from wan22_jax.checkpoint import read_trainable
from wan22_jax.config import list_ignored, load_config
from wan22_jax.errors import BadInput

LORA = """
# Output path for training runs. Each training run makes a new directory in here.
output_dir = 'runs'
dataset = 'dataset.toml'
eval_datasets = [
    {name = 'pets', config = 'eval.toml'},
]

# training settings
epochs = 2
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1.0
warmup_steps = 2
lr_scheduler = 'linear'

# eval settings
eval_every_n_epochs = 1
eval_before_first_step = true
eval_micro_batch_size_per_gpu = 1
eval_gradient_accumulation_steps = 1

# misc settings
save_every_n_epochs = 1
checkpoint_every_n_minutes = 120
activation_checkpointing = true
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
map_num_proc = 8
steps_per_print = 1
logging_steps = 1
video_clip_mode = 'single_beginning'
x_axis_examples = true
compile = false

[model]
type = 'wan'
ckpt_path = 'model'
dtype = 'bfloat16'
timestep_sample_method = 'logit_normal'
sigmoid_scale = 1.0
shift = 3
min_t = 0.0
max_t = 1.0

[adapter]
type = 'lora'
rank = 4
dtype = 'bfloat16'

[optimizer]
type = 'adamw_optimi'
lr = 2e-3
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8

[monitoring]
enable_wandb = false
wandb_api_key = ''
wandb_tracker_name = ''
wandb_run_name = ''
"""

BLOCK_SWAP = """
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 100
max_steps = 4
micro_batch_size_per_gpu = [[512, 1], [1024, 1]]
image_micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 0.5
warmup_steps = 2
blocks_to_swap = 28
save_every_n_steps = 2
checkpoint_every_n_epochs = 1
activation_checkpointing = 'unsloth'
reentrant_activation_checkpointing = true
partition_method = 'manual'
partition_split = []
save_dtype = 'bfloat16'
caching_batch_size = 4
steps_per_print = 10
video_clip_mode = 'single_beginning'
huber_delta = 0.1
uncond_fraction = 0.1

[model]
type = 'wan'
ckpt_path = 'model'
dtype = 'bfloat16'
transformer_dtype = 'float8'
timestep_sample_method = 'uniform'
flux_shift = true
cache_text_embeddings = true

[adapter]
type = 'lora'
rank = 8
dtype = 'bfloat16'
dropout = 0.0

[optimizer]
type = 'AdamW8bitKahan'
lr = 5e-3
betas = [0.9, 0.99]
weight_decay = 0.01
stabilize = false
"""

FULL = """
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 1
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 3
gradient_clipping = 1.0
warmup_steps = 0
lr_scheduler = 'constant'
save_every_n_epochs = 1
checkpoint_every_n_minutes = 60
activation_checkpointing = true
partition_method = 'uniform'
save_dtype = 'bfloat16'
steps_per_print = 1
compile = true
pseudo_huber_c = 0.5

[model]
type = 'wan'
ckpt_path = 'model'
dtype = 'bfloat16'
timestep_sample_method = 'logit_normal'
shift = 5

[optimizer]
type = 'adamw_optimi'
lr = 1e-4
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8
"""


def run_unchanged(text: str) -> Path:
    Path("user.toml").write_text(text)
    load_config(Path("user.toml"))
    assert train.main(["--config", "user.toml"]) == 0
    return only_run()


@pytest.mark.usefixtures("here")
def test_a_lora_with_evaluation(capsys):
    Path("eval.toml").write_text(DATASET)
    run_dir = run_unchanged(LORA)
    said = capsys.readouterr().out
    assert "map_num_proc has no effect: wan22-cache chooses its own parallelism" in said
    assert sum(line.startswith("step ") and "avr_loss" in line for line in said.splitlines()) == 6
    scalars = read_scalars(run_dir)
    assert sorted(scalars["train/loss"]) == [1, 2, 3, 4, 5, 6]  # one example a step
    assert sorted(scalars["pets/loss"]) == [0, 3, 6]
    quantiles = [name for name in scalars if name.startswith("pets/loss_quantile_0.")]
    assert len(quantiles) == 9
    rates = scalars["train/lr"]
    assert rates[1] == pytest.approx(1e-3)  # lr / warmup_steps
    assert rates[6] < rates[4] < rates[3]
    trained, meta = read_trainable(run_dir)
    assert meta["targets"]["ffn.0"][0] == 4
    assert all(matrix.any() for matrix in trained.values())


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_lora_on_float8_with_blocks_on_the_host(capsys):
    run_dir = run_unchanged(BLOCK_SWAP)
    said = capsys.readouterr().out
    assert "memory: float8 weights, 2 of 2 blocks in host memory, activations: unsloth" in said
    assert "reentrant_activation_checkpointing has no effect" in said
    assert sorted(read_scalars(run_dir)["train/loss"]) == [1, 2, 3, 4]
    assert all(np.isfinite(matrix).all() for matrix in read_trainable(run_dir)[0].values())


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_full_fine_tuning():
    run_dir = run_unchanged(FULL)
    assert sorted(read_scalars(run_dir)["train/loss"]) == [1]  # three clips in one step
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"


def test_what_changes_nothing_is_said_in_a_sentence_and_the_rest_is_refused(tmp_path):
    path = tmp_path / "user.toml"
    text = "output_dir = 'runs'\ndataset = 'dataset.toml'\nepochs = 1\n"
    tables = "[model]\nckpt_path = 'model'\n[adapter]\n"
    path.write_text(text + tables)
    assert list_ignored(load_config(path)) == []
    path.write_text(text + "compile = true\ncaching_batch_size = 2\n" + tables)
    said = list_ignored(load_config(path))
    assert [line.partition(" has no effect: ")[0] for line in said] == [
        "caching_batch_size",
        "compile",
    ]
    for line, expected in (
        ("pipeline_stages = 2", "pipeline_stages = 2: layers are not divided among GPUs"),
        ("map_num_proc = 'many'", "key map_num_proc"),
        ("compile = 1", "key compile"),
        ("steps_per_print = 0", "key steps_per_print"),
    ):
        path.write_text(f"{text}{line}\n{tables}")
        with pytest.raises(BadInput, match=expected):
            load_config(path)
    path.write_text(text + tables + "[monitoring]\nenable_wandb = false\nproject = 'x'\n")
    with pytest.raises(BadInput, match=r"unknown key monitoring\.project"):
        load_config(path)
