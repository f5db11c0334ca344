"""Evaluation: every clip once, the same noise every time, and nothing of training touched."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_loader import LARGE, SMALL, make_rich_cache
from test_step import fill_lora_b

from wan22_jax.data.batching import make_batching
from wan22_jax.data.eval_clips import EvalSet
from wan22_jax.errors import BadInput
from wan22_jax.model.flow import SQUARED, Penalty, sigma_grid
from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.sharding import make_mesh, replicated
from wan22_jax.training.evaluate import Evaluator
from wan22_jax.training.frozen import place_frozen
from wan22_jax.training.step import split_model

CONFIG = TransformerConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=8, text_len=512, freq_dim=16
)
SHARDING = replicated(make_mesh())
GRIDS = {SMALL: sigma_grid(), LARGE: sigma_grid(shift=3.0)}
COUNTS = {SMALL: 2, LARGE: 3}  # clips; clip i has i % 3 + 1 captions
PSEUDO_HUBER = Penalty("pseudo_huber", 0.5)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiling is most of the time that these tests take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def make_weights():
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    model.add_lora(jax.random.key(1), rank=2, alpha=6.0)
    graphdef, trainable, frozen = split_model(model)
    return graphdef, fill_lora_b(trainable), frozen


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return {
        bucket: make_rich_cache(
            tmp_path_factory.mktemp("eval"), count=count, bucket=bucket, masked=(1,)
        )
        for bucket, count in COUNTS.items()
    }


def make_evaluator(caches, *, size=2, accumulation=1, policy=False, swap=0, sets=None, **options):
    graphdef, _, frozen = make_weights()
    placed = place_frozen(
        frozen, activation_checkpointing=policy, blocks_to_swap=swap, sharding=SHARDING
    )
    batching = make_batching(size, size, accumulation=accumulation)
    sets = sets or {"held_out": list(caches)}
    return Evaluator(
        {
            name: EvalSet([(caches[bucket], 1) for bucket in buckets], batching=batching)
            for name, buckets in sets.items()
        },
        graphdef=graphdef,
        frozen=placed,
        penalty=options.pop("penalty", SQUARED),
        make_grid=GRIDS.__getitem__,
        sharding=SHARDING,
        **options,
    )


@pytest.fixture(scope="module")
def expected(caches):
    """Of each quantile and number of given frames, the losses of all clips, one by one."""
    graphdef, trainable, frozen = make_weights()
    predict = jax.jit(nnx.merge(graphdef, trainable, frozen).__call__)
    found = {}
    for bucket, cache in caches.items():
        for number in range(COUNTS[bucket]):
            for caption in range(number % 3 + 1):
                clip = cache.read(number, caption=caption)
                keys = cache.clips[number]
                text = np.zeros((1, 512, 8), np.float32)
                text[0, : len(clip.text_SE)] = clip.text_SE
                clean = clip.latents_TYXC.astype(np.float64)
                mask = 1 if clip.mask_YX is None else clip.mask_YX.astype(np.float64)[..., None]
                for quantile in range(9):
                    noise = make_noise(keys.latents_key, keys.text_keys[caption], quantile, clean)
                    level = GRIDS[bucket][int((quantile + 1) / 10 * len(GRIDS[bucket]))]
                    for given in range(min(2, len(clean))):
                        sigma = np.full(len(clean), level)
                        sigma[:given] = 0
                        mix = sigma[:, None, None, None]
                        noisy = (1 - mix) * clean + mix * noise
                        velocity = predict(
                            jnp.asarray(noisy[None], jnp.float32), sigma[None], jnp.asarray(text)
                        )
                        error = np.asarray(velocity[0], np.float64) - (noise - clean)
                        cost = np.sqrt(error**2 + 0.25) - 0.5
                        found.setdefault((quantile, given), []).append(
                            np.mean((mask * cost)[given:])
                        )
    return found


def make_noise(latents_key, text_key, quantile, clean):
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(f"{latents_key} {text_key}".encode()))
    return np.asarray(jax.random.normal(jax.random.fold_in(key, quantile), clean.shape), np.float64)


@pytest.fixture(scope="module")
def evaluated(caches):
    evaluator = make_evaluator(
        caches, size=2, accumulation=2, penalty=PSEUDO_HUBER, evaluates_i2v=True
    )
    return evaluator, evaluator(make_weights()[1])


def test_each_clip_counts_once_with_its_own_noise(evaluated, expected):
    """Images and videos, with masks, in batches that they do not fill, in float64 NumPy."""
    _, values = evaluated
    assert sorted(values) == sorted(
        [f"held_out/loss_quantile_0.{k}0" for k in range(1, 10)]
        + ["held_out/loss", "held_out/loss_i2v", "eval/eval_time_sec"]
    )
    t2v = [np.mean(expected[quantile, 0]) for quantile in range(9)]
    i2v = [np.mean(expected[quantile, 1]) for quantile in range(9)]
    assert {len(expected[0, 0]), len(expected[0, 1])} == {9, 6}  # images have no i2v
    got = [values[f"held_out/loss_quantile_0.{k}0"] for k in range(1, 10)]
    np.testing.assert_allclose(got, t2v, rtol=1e-5)
    np.testing.assert_allclose(values["held_out/loss"], np.mean(t2v), rtol=1e-5)
    np.testing.assert_allclose(values["held_out/loss_i2v"], np.mean(i2v), rtol=1e-5)
    assert len({round(loss, 3) for loss in [*t2v, np.mean(i2v)]}) > 5


def test_evaluations_repeat_to_the_bit_and_compile_once_a_bucket(evaluated):
    evaluator, values = evaluated
    again = evaluator(make_weights()[1])
    assert without_time(again) == without_time(values)
    assert evaluator._losses._cache_size() == len(COUNTS)


def without_time(values):
    return {name: value for name, value in values.items() if name != "eval/eval_time_sec"}


@pytest.fixture(scope="module")
def reference(caches):
    return make_evaluator({LARGE: caches[LARGE]}, penalty=PSEUDO_HUBER)(make_weights()[1])


@pytest.mark.parametrize(
    ("policy", "swap", "options"),
    [
        (True, 0, {"size": 4, "accumulation": 1}),
        ("offload_attention", 1, {"size": 1}),
        ("unsloth", 2, {"gathers_blocks": True}),
    ],
)
def test_values_depend_neither_on_batches_nor_on_where_weights_lie(
    reference, caches, policy, swap, options
):
    evaluator = make_evaluator(
        {LARGE: caches[LARGE]}, policy=policy, swap=swap, penalty=PSEUDO_HUBER, **options
    )
    frozen = jax.tree.leaves(evaluator._frozen)
    on_host = [leaf for leaf in frozen if leaf.sharding.memory_kind == "pinned_host"]
    assert bool(on_host) == bool(swap)
    values = evaluator(make_weights()[1])
    for name in without_time(values):
        np.testing.assert_allclose(values[name], reference[name], rtol=1e-5)


def test_averaged_weights_have_curves_of_their_own_and_decide(caches):
    _, trainable, _ = make_weights()
    ema = jax.tree.map(lambda leaf: 0.5 * leaf, trainable)
    evaluator = make_evaluator(caches, sets={"a": [SMALL], "b": [SMALL]})
    alone = evaluator(trainable)
    assert evaluator.score(alone) == (alone["a/loss"] + alone["b/loss"]) / 2
    both = evaluator(trainable, ema)
    averaged = evaluator(ema)
    for name, value in without_time(alone).items():
        assert both[name] == value
        renamed = name.replace("/", "_ema/")
        assert both[renamed] == averaged[name] != value
    assert len(without_time(both)) == 2 * len(without_time(alone))
    assert evaluator.score(both) == evaluator.score(averaged) != evaluator.score(alone)


def test_weights_are_only_read(caches):
    _, trainable, _ = make_weights()
    before = jax.tree.map(np.array, trainable)
    make_evaluator(caches, sets={"a": [SMALL]})(trainable)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(trainable), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_set_without_clips_is_refused(caches):
    with pytest.raises(BadInput, match="an evaluation data set without clips"):
        EvalSet([(caches[SMALL], 0.1)], batching=make_batching(1, 1))
