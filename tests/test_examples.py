"""What is said of a step is what the train step does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_loader import LARGE, make_rich_cache

from wan22_jax.config import load_config
from wan22_jax.data.loader import make_loader
from wan22_jax.examples import describe_step, make_grid
from wan22_jax.training import step as step_module
from wan22_jax.training.step import Frozen, StepSettings, init_state, split_seed, train_step

CONFIG = """
output_dir = 'out'
dataset = 'dataset.toml'
epochs = 1
seed = 5
micro_batch_size_per_gpu = 2
gradient_accumulation_steps = 3
i2v_fraction = 0.5
[model]
ckpt_path = 'model'
shift = 3
[adapter]
type = 'lora'
"""


class Scalar(nnx.Module):
    def __init__(self):
        self.x = nnx.Param(jnp.zeros(1))


@pytest.mark.parametrize("number", [0, 7])
def test_a_described_step_is_the_one_that_is_trained(tmp_path, monkeypatch, number):
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "dataset.toml").write_text("[[directory]]\npath = 'clips'\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(tmp_path / "config.toml")
    cache = make_rich_cache(tmp_path / "clips" / "cache" / "wan2.2_5b", bucket=LARGE)
    loader = make_loader(
        [(cache, 1)], seed=config.seed, batching=config.batching, uncond_fraction=0.4
    )
    found = [
        re.fullmatch(r" *(\d) +(0\.\d{4}) (t2v|i2v)   (\S+): (.*)", line).groups()
        for line in describe_step(config, loader, number)[2:]
    ]

    seen = []

    def record(trainable, _frozen, latents, text, draws, *_, **__):
        seen.append((latents, text, draws))
        return jnp.sum(trainable["x"][...]), jnp.zeros(2)

    monkeypatch.setattr(step_module, "loss_fn", record)
    graphdef, trainable = nnx.split(Scalar())
    state = init_state(trainable, optax.sgd(0.1))._replace(step=jnp.int32(number))
    batch, bucket, _ = loader[number]
    with jax.disable_jit():  # which lets the scan over micro-batches show its values
        train_step(
            state,
            Frozen(nnx.State({})),
            batch,
            split_seed(config.seed)[1],
            make_grid(config, bucket),
            graphdef=graphdef,
            optimizer=optax.sgd(0.1),
            settings=StepSettings(config.tasks),
        )
    assert len(seen) == 3
    trained = [
        (latents[b], text[b], jax.tree.map(lambda leaf: leaf[b], draws))  # noqa: B023
        for latents, text, draws in seen
        for b in range(2)
    ]
    assert len(found) == len(trained) == 6
    for position, (said, (latents, text, draws)) in enumerate(zip(found, trained, strict=True)):
        micro_batch, sigma, task, path, caption = said
        assert int(micro_batch) == position // 2 + 1
        np.testing.assert_allclose(float(sigma), draws.sigma_T[-1], atol=5.1e-5)
        assert (draws.sigma_T[0] == 0) == (task == "i2v")
        clip = int(latents[0, 0, 0, 0])
        assert path == str(tmp_path / "clips" / str(clip))
        value = int(text[0, 0])
        expected = "(dropped)" if value > 4000 else f"'{clip} {value - 10 * clip - 1}'"
        assert caption == expected
    assert {said[2] for said in found} == {"t2v", "i2v"}
    assert "(dropped)" in {said[4] for said in found}
