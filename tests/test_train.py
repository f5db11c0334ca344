"""wan22-train as a user runs it: new runs, resumed runs, killed runs and full disks."""

import dataclasses
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto.event_pb2 import Event
from tiny_run import keep_programs

from convert.weights import convert
from wan22_jax import examples, run_folder, start, train
from wan22_jax.checkpoint import FOLDER, read_trainable
from wan22_jax.config import load_config
from wan22_jax.data.batching import make_batching
from wan22_jax.data.cache import (
    CACHE_FOLDER,
    make_latents_key,
    make_mask_key,
    make_text_key,
    name_encoders,
)
from wan22_jax.data.cache_writer import open_writer
from wan22_jax.data.index import ClipEntry
from wan22_jax.demo_checkpoint import TINY_TEXT_ENCODER, TINY_TRANSFORMER, write_checkpoint
from wan22_jax.geometry import LATENT_CHANNELS, Bucket
from wan22_jax.model.flow import flux_shift, sigma_grid
from wan22_jax.model_folder import read_model_card
from wan22_jax.training.optimizer_options import AdamW

BUCKET = Bucket(32, 32, 5)
CLIPS = 3  # a step each
CONFIG = """
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 2
checkpoint_every_n_steps = 2
[model]
ckpt_path = 'model'
[adapter]
rank = 2
[optimizer]
lr = 1e-2
"""
DATASET = f"size_buckets = [{list(BUCKET)}]\n[[directory]]\npath = 'clips'\n"


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory) -> Iterator[None]:
    """A program that several tests run is compiled once; compiling is most of their time."""
    with keep_programs(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny model, a cache of random latents and the two config files."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "lora.toml").write_text(CONFIG)
    (folder / "dataset.toml").write_text(DATASET)
    write_checkpoint(folder / "checkpoint", captions=["a cat"])
    card = convert(folder / "checkpoint", folder / "model")
    rng = np.random.default_rng(0)
    entries = []
    encoders = name_encoders(card.digests, vae_dtype="bfloat16")
    with open_writer(folder / "clips" / CACHE_FOLDER, encoders=encoders) as writer:
        for number in range(CLIPS):
            entry = ClipEntry(
                f"{number}.mp4", BUCKET, make_latents_key(f"{number}", BUCKET), (make_text_key(""),)
            )
            latents = rng.standard_normal((*BUCKET.latent_TYX, LATENT_CHANNELS), np.float32)
            writer.add(entry.latents_key, latents)
            entries.append(entry)
        writer.add(make_text_key(""), rng.standard_normal((3, TINY_TEXT_ENCODER.dim), np.float32))
        writer.finish(entries, buckets=[BUCKET])
    return folder


def run(*flags: str) -> int:
    return train.main(["--config", "lora.toml", *flags])


def only_run(output_dir: str = "runs") -> Path:
    (run_dir,) = Path(output_dir).iterdir()
    return run_dir


def list_checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / FOLDER).iterdir())


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(capsys):
    assert run("output_dir=whole") == 0
    assert run("max_steps=4") == 0
    unfinished = only_run() / FOLDER / "5.unfinished.orbax-checkpoint-tmp" / "trainable"
    unfinished.mkdir(parents=True)  # what a kill in the middle of a save leaves
    capsys.readouterr()
    assert run("--resume_from_checkpoint") == 0
    assert "4 steps done, of 6" in capsys.readouterr().out
    assert list_checkpoints(only_run()) == ["2", "4", "6"]
    whole, _ = read_trainable(only_run("whole"))
    resumed, meta = read_trainable(only_run())
    assert meta["step"] == 6
    assert any(np.any(matrix) for name, matrix in whole.items() if name.endswith("lora_B"))
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name])
    capsys.readouterr()
    assert run("--resume_from_checkpoint", "max_steps=5") == 0  # fewer than are done
    said = capsys.readouterr().out
    assert "nothing is left to do" in said
    assert "done: 6 steps" in said


def test_resuming_passes_over_a_run_without_checkpoint(here, capsys):
    assert run("max_steps=2") == 0
    (here / "runs" / "99991231_23-59-59" / FOLDER).mkdir(parents=True)  # killed before the first
    assert run("--resume_from_checkpoint", "max_steps=3") == 0
    capsys.readouterr()
    assert run("--resume_from_checkpoint", "99991231_23-59-59") == 2
    assert "is not a run folder with checkpoints" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_another_base_model_or_adapter_is_not_resumed(monkeypatch, capsys):
    assert run("max_steps=1") == 0
    capsys.readouterr()
    assert run("--resume_from_checkpoint", "adapter.rank=4") == 2
    assert (
        "was trained with other ranks or alphas than [adapter] has now (cross_attn.k [2"
        in capsys.readouterr().err
    )
    card = read_model_card(Path("model"))
    other = dataclasses.replace(card, digests=card.digests | {"transformer": "another"})
    monkeypatch.setattr(train, "read_model_card", lambda _: other)
    assert run("--resume_from_checkpoint") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"was trained with base model {card.digests['transformer']}" in error
    assert "the config has another; resume with the original or start a new run" in error


@pytest.mark.usefixtures("here")
def test_two_runs_in_one_second_have_two_folders(monkeypatch):
    monkeypatch.setattr(run_folder.time, "sleep", lambda _: shutil.move("runs/now", "runs/before"))
    monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(now=lambda _: Clock()))
    for _ in range(2):
        run_folder.make_run_dir(Path("runs"))
    assert sorted(path.name for path in Path("runs").iterdir()) == ["before", "now"]


class Clock:
    """A time that always reads the same."""

    def strftime(self, _: str) -> str:
        return "now"


class Reached(Exception):
    """The run has got as far as the test wants it to."""


@pytest.mark.usefixtures("here")
def test_each_setting_reaches_what_uses_it(monkeypatch):
    calls = {}

    def record(name: str, *, module: ModuleType = train, stop: bool = False):
        function = getattr(module, name)

        def recorded(*args, **options):
            calls[name] = options | dict(enumerate(args))
            if stop:
                raise Reached
            return function(*args, **options)

        monkeypatch.setattr(module, name, recorded)

    record("make_loader", module=examples)
    for name in ("load_transformer", "split_model", "place_frozen"):
        record(name, module=start)
    record("make_optimizer")
    record("make_schedule")
    record("compile_train_step", stop=True)
    settings = ["seed=7", "i2v_fraction=0.75", "activation_checkpointing=true", "warmup_steps=9"]
    settings += ["gradient_accumulation_steps=3", "gradient_clipping=0.5", "adapter.alpha=6"]
    settings += ["optimizer.lr=3e-3", "optimizer.betas=[0.5, 0.6]", "optimizer.weight_decay=0.25"]
    settings += [
        "optimizer.eps=1e-5",
        "optimizer.beta2_half_life=60",
        "model.transformer_dtype=float32",
        "blocks_to_swap=1",
    ]
    with pytest.raises(Reached):
        train.train(Path("lora.toml"), settings)
    loader = calls["make_loader"]
    assert (loader["seed"], loader["batching"]) == (7, make_batching(1, 1, accumulation=3))
    assert calls["load_transformer"]["dtype"] == "float32"
    scales = {linear.lora_scale for _, linear in calls["split_model"][0].lora_targets()}
    assert scales == {6 / 2}
    optimizer = calls["make_optimizer"]
    assert optimizer[0] == AdamW(
        lr=3e-3, betas=[0.5, 0.6], eps=1e-5, weight_decay=0.25, beta2_half_life=60.0
    )
    assert (optimizer["gradient_clipping"], optimizer["global_batch"]) == (0.5, 3)
    assert calls["make_schedule"][0].warmup_steps == 9
    assert calls["make_schedule"]["total_steps"] == 2  # of one epoch each
    assert optimizer["schedule"](0) == pytest.approx(3e-3 / 9)
    step = calls["compile_train_step"]
    settings = step[2]
    assert (settings.tasks.i2v_fraction, settings.activation_checkpointing) == (0.75, True)
    assert calls["place_frozen"]["blocks_to_swap"] == 1


@pytest.mark.usefixtures("here")
def test_masks_of_the_data_set_reach_the_loss():
    """Where nothing counts the loss is zero, and so is the gradient."""
    encoders = name_encoders(read_model_card(Path("model")).digests, vae_dtype="bfloat16")
    entry = ClipEntry(
        "0.mp4",
        BUCKET,
        make_latents_key("0", BUCKET),
        (make_text_key(""),),
        mask_key=make_mask_key("0", BUCKET),
    )
    assert entry.mask_key is not None
    with open_writer(Path("masked") / CACHE_FOLDER, encoders=encoders) as writer:
        writer.add(entry.latents_key, np.ones((*BUCKET.latent_TYX, LATENT_CHANNELS)))
        writer.add(entry.text_keys[0], np.ones((3, TINY_TEXT_ENCODER.dim)))
        writer.add(entry.mask_key, np.zeros(BUCKET.latent_TYX[1:]))
        writer.finish([entry], buckets=[BUCKET])
    Path("masked.toml").write_text(DATASET.replace("'clips'", "'masked'"))
    assert run("dataset=masked.toml", "max_steps=1", "logging_steps=1") == 0
    scalars = read_scalars(only_run())
    assert scalars["train/loss"] == {1: 0.0}
    assert scalars["train/grad_norm"] == {1: 0.0}


@pytest.mark.usefixtures("here")
def test_float8_weights_train(capsys):
    card = convert(Path("checkpoint"), Path("float8"), dtype="float8")
    settings = ["max_steps=2", "model.ckpt_path=float8"]
    assert run(*settings, "model.transformer_dtype=bfloat16") == 2
    assert "convert again with --dtype bfloat16" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert run(*settings, "output_dir=ready") == 0
    assert "frozen weights: float8, from float8 of float8" in capsys.readouterr().out
    assert run("max_steps=1", "output_dir=plain") == 0
    settings = ["max_steps=2", "output_dir=plain", "model.transformer_dtype=float8"]
    assert run(*settings, "--resume_from_checkpoint") == 0
    said = capsys.readouterr().out
    assert "frozen weights: float8, from model of bfloat16" in said
    assert "changed since the checkpoint: config.model.transformer_dtype None -> float8" in said
    digests = {"ready": card.digests, "plain": read_model_card(Path("model")).digests}
    for output_dir in ("ready", "plain"):
        trained, meta = read_trainable(only_run(output_dir))
        assert meta["base_digest"] == digests[output_dir]["transformer"]
        assert all(np.isfinite(matrix).all() and matrix.any() for matrix in trained.values())


# Updates in proportion to the gradients, not to their signs, so that rounding stays rounding.
LINEAR_ADAM = ("optimizer.eps=10", "optimizer.lr=100", "optimizer.weight_decay=0")


def train_two_steps(*settings: str) -> dict[str, np.ndarray]:
    """Runs two steps; returns what the second one changed: only then does A have a gradient."""
    assert run("max_steps=2", "checkpoint_every_n_steps=1", *LINEAR_ADAM, *settings) == 0
    first, _ = read_trainable(only_run(), 1)
    second, _ = read_trainable(only_run(), 2)
    shutil.rmtree("runs")
    return {name: second[name] - first[name] for name in second}


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, dict[str, np.ndarray]]:
    """Changes by dtype, with every weight and activation on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {
            dtype: train_two_steps(f"model.transformer_dtype={dtype}")
            for dtype in ("float32", "float8")
        }


@pytest.mark.long
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("dtype", "policy", "blocks_to_swap", "tolerance"),
    [
        ("float32", "unsloth", 0, 1e-3),
        ("float32", "offload_attention", 1, 1e-3),
        ("float8", "offload_attention", 99, 0.3),
    ],
)
def test_what_saves_memory_trains_the_same(
    dtype, policy, blocks_to_swap, tolerance, plain, monkeypatch, capsys
):
    sizes = {name: Counter() for name in ("load_transformer", "place_frozen")}

    def watch(name: str) -> None:
        real = getattr(start, name)

        def watched(*args, **options):
            result = real(*args, **options)
            for leaf in jax.tree.leaves(result if name == "place_frozen" else nnx.state(result)):
                is_numpy = isinstance(leaf, np.ndarray)
                sizes[name]["numpy" if is_numpy else leaf.sharding.memory_kind] += leaf.size
            return result

        monkeypatch.setattr(start, name, watched)

    for name in sizes:
        watch(name)
    trained = train_two_steps(
        f"model.transformer_dtype={dtype}",
        f"activation_checkpointing={policy}",
        f"blocks_to_swap={blocks_to_swap}",
    )
    on_host = min(blocks_to_swap, 2)
    said = f"memory: {dtype} weights, {on_host} of 2 blocks in host memory, activations: {policy}"
    assert said in capsys.readouterr().out
    assert set(sizes["load_transformer"]) == {"numpy"}
    linears = 8 * TINY_TRANSFORMER.dim**2 + 2 * TINY_TRANSFORMER.dim * TINY_TRANSFORMER.ffn_dim
    assert sizes["place_frozen"]["pinned_host"] == linears * on_host
    for name, expected in plain[dtype].items():
        # In 16 bits the same step, put differently, rounds differently: less than float8 does.
        scale = expected if dtype == "float32" else expected - plain["float32"][name]
        error = np.linalg.norm(trained[name] - expected) / np.linalg.norm(scale)
        assert error < tolerance, name


@pytest.mark.usefixtures("here")
def test_running_out_of_memory_names_the_next_setting(monkeypatch, capsys):
    def fail(*_args, **_options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_train_step", lambda *_, **__: fail)
        assert run() == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert (
            "at 32x32x5 (2 tokens a clip); set activation_checkpointing = 'offload_attention'"
            in error
        )
    monkeypatch.setattr(start, "place_frozen", fail)
    assert run("model.transformer_dtype=float8") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out of GPU memory loading the model; set blocks_to_swap = 2" in error


@pytest.mark.usefixtures("here")
def test_a_clip_mode_that_was_not_cached_is_refused(capsys):
    assert run("video_clip_mode=single_middle") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "video_clip_mode was not set, is 'single_middle'); run wan22-cache" in error
    assert not Path("runs").exists()


@pytest.mark.usefixtures("here")
def test_an_output_dir_that_cannot_be_made_is_refused(capsys):
    assert run("output_dir=/proc/x") == 2
    assert "error: /proc/x: cannot be written (" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("here")
def test_the_seed_changes_what_is_trained():
    trained = {}
    for name in ("seed=0", "seed=1"):
        assert run("max_steps=1", f"output_dir={name}", name) == 0
        trained[name], _ = read_trainable(only_run(name))
    name = "blocks.self_attn.q.lora_A"
    assert np.any(trained["seed=0"][name] != trained["seed=1"][name])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model.shift": 3}, {"shift": 3.0}),
        ({"model.flux_shift": "true"}, {"shift": flux_shift(1024)}),
        ({"model.shift": 3, "model.flux_shift": "true"}, {"shift": 3.0}),
        ({"model.timestep_sample_method": "uniform"}, {"method": "uniform"}),
        ({"model.sigmoid_scale": 1.5}, {"sigmoid_scale": 1.5}),
        ({"model.min_t": 0.5, "model.max_t": 0.8}, {"min_t": 0.5, "max_t": 0.8}),
    ],
)
def test_the_config_chooses_the_noise_levels(settings, expected):
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load_config(Path("lora.toml"), overrides)
    grid = np.asarray(train.make_grid(config, Bucket(1024, 1024, 5)))
    np.testing.assert_array_equal(grid, sigma_grid(**expected))
    assert not np.array_equal(grid, sigma_grid())


@pytest.mark.usefixtures("here")
def test_tensorboard_gets_its_scalars():
    assert run("max_steps=5", "warmup_steps=4") == 0
    scalars = read_scalars(only_run())
    assert scalars["train/lr"] == pytest.approx(
        {1: 2.5e-3, 2: 4.4e-3, 3: 6.3e-3, 4: 8.1e-3, 5: 1e-2}, rel=0.02
    )
    losses = scalars["train/loss"]
    assert sorted(losses) == [1, 2, 3, 4, 5]
    assert scalars["train/epoch_loss"] == {
        1: pytest.approx((losses[1] + losses[2] + losses[3]) / 3)
    }
    assert all(value > 0 for value in scalars["train/grad_norm"].values())
    tasks = scalars["train/loss_t2v"] | scalars.get("train/loss_i2v", {})
    assert tasks == losses  # of one clip each
    seconds, speed = scalars["train/step_time_s"], scalars["train/tokens_per_s"]
    assert seconds
    assert speed == pytest.approx({k: BUCKET.num_tokens / s for k, s in seconds.items()}, rel=1e-3)


EVALUATE = ("eval_datasets=['eval.toml', {name='held_out', config='eval.toml'}]",)


@pytest.mark.usefixtures("here")
def test_a_run_with_evaluation_equals_one_without_bit_for_bit(capsys):
    Path("eval.toml").write_text(DATASET)
    assert run("output_dir=plain") == 0
    assert run("output_dir=evaluated", *EVALUATE, "eval_every_n_steps=2", "eval_i2v=true") == 0
    assert "evaluation set held_out: 3 examples" in capsys.readouterr().out
    plain, _ = read_trainable(only_run("plain"))
    evaluated, _ = read_trainable(only_run("evaluated"))
    for name in plain:
        np.testing.assert_array_equal(plain[name], evaluated[name])
    before, scalars = (read_scalars(only_run(name)) for name in ("plain", "evaluated"))
    assert scalars["train/loss"] == before["train/loss"]
    curves = ["loss", "loss_i2v", *(f"loss_quantile_0.{k}0" for k in range(1, 10))]
    for curve in curves:
        assert sorted(scalars[f"held_out/{curve}"]) == [0, 2, 4, 6]
        assert scalars[f"held_out/{curve}"] == scalars[f"eval0/{curve}"]
        assert len(set(scalars[f"held_out/{curve}"].values())) == 4
    assert len(scalars["eval/eval_time_sec"]) == 4
    assert not any(name.startswith(("eval", "held_out")) for name in before)


@pytest.mark.usefixtures("here")
def test_running_out_of_memory_in_an_evaluation_names_its_keys(monkeypatch, capsys):
    def fail(*_args, **_options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    Path("eval.toml").write_text(DATASET)
    monkeypatch.setattr("wan22_jax.training.evaluate.Evaluator.__call__", fail)
    assert run(*EVALUATE) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "in the evaluation at step 0; set eval_micro_batch_size_per_gpu = 1" in error


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_resumed_run_is_not_evaluated_before_its_first_step():
    Path("eval.toml").write_text(DATASET)
    settings = (*EVALUATE, "eval_every_n_epochs=1")
    assert run("max_steps=1", *settings) == 0
    assert sorted(read_scalars(only_run())["eval0/loss"]) == [0]
    assert run("--resume_from_checkpoint", *settings, "max_steps=3") == 0
    assert sorted(read_scalars(only_run())["eval0/loss"]) == [0, 3]
    assert run("output_dir=none", *settings, "max_steps=1", "eval_before_first_step=false") == 0
    assert "eval0/loss" not in read_scalars(only_run("none"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("subsample_ratio = 0.5", "subsample_ratio: an evaluation takes every clip"),
        ("uncond_fraction = 0.1", "uncond_fraction: an evaluation takes every clip"),
        ("caption_prefix = 'a'", "clips is also a folder of dataset.toml, with other buckets"),
    ],
)
def test_an_evaluation_set_that_does_not_fit_is_refused(key, message, capsys):
    Path("eval.toml").write_text(f"{key}\n{DATASET}")
    assert run(*EVALUATE) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "eval.toml: " in error
    assert message in error
    assert not Path("runs").exists()


@pytest.mark.usefixtures("here")
def test_the_gpu_is_set_up_before_anything_is_read(monkeypatch):
    assert run("max_steps=1") == 0
    calls = []
    for name in ("claim_gpu", "keep_compiled", "read_model_card", "open_run"):
        real = getattr(train, name)

        def call(*args, name=name, real=real, **options):
            calls.append((name, options.get("deterministic")))
            return real(*args, **options)

        monkeypatch.setattr(train, name, call)
    assert run("--resume_from_checkpoint", "max_steps=1", "deterministic=true") == 0
    assert calls[0] == ("claim_gpu", True)
    assert [name for name, _ in calls[1:]] == ["keep_compiled", "read_model_card", "open_run"]


def read_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """Reads an event file: records of length, checksum, content and checksum."""
    paths = sorted(run_dir.glob("events.out.tfevents.*"))
    data, scalars = b"".join(path.read_bytes() for path in paths), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            scalars.setdefault(value.tag, {})[event.step] = value.simple_value
        data = data[16 + length :]
    return scalars
