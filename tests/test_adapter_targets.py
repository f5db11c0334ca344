"""Adapters of some linears, of several ranks: chosen, joined, written, read and started from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from wan22_jax.adapter import (
    Adapter,
    add_adapter,
    attach_adapter,
    from_tensors,
    load_adapter,
    start_from_existing,
    to_tensors,
)
from wan22_jax.adapter_file import write_adapter
from wan22_jax.adapter_targets import (
    TARGETS,
    AdapterConfig,
    LoRATarget,
    TargetConfig,
    choose_targets,
    describe_targets,
    lr_ratios,
    parse_targets,
)
from wan22_jax.errors import BadInput
from wan22_jax.lora_names import DIALECTS
from wan22_jax.model.transformer import TransformerConfig, WanTransformer

CONFIG = TransformerConfig(
    dim=16, ffn_dim=24, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=8,
    text_len=6, freq_dim=16,
)  # fmt: skip
SEVERAL = {
    "self_attn.q": LoRATarget(2, 6.0),
    "self_attn.v": LoRATarget(5, 5.0),  # k has none; q is padded to the rank of v
    "cross_attn.k": LoRATarget(1, 4.0),
    "cross_attn.v": LoRATarget(3, 2.0),
    "ffn.2": LoRATarget(4, 6.0),
}


def target(pattern: str, **settings) -> TargetConfig:
    return TargetConfig(pattern=pattern, **settings)


def test_the_default_is_all_ten_linears():
    assert choose_targets(AdapterConfig(rank=8)) == dict.fromkeys(TARGETS, LoRATarget(8, 8.0))
    config = AdapterConfig(rank=8, alpha=4.0)
    assert choose_targets(config) == dict.fromkeys(TARGETS, LoRATarget(8, 4.0))


def test_patterns_choose_and_the_first_one_wins():
    config = AdapterConfig(
        rank=8,
        alpha=4.0,
        targets=[
            target(r"self_attn\.(q|k)", rank=64, alpha=32.0, lr=1e-5),
            target(r"blocks\.\d+\.self_attn\..*", rank=16),
            target(r"ffn\.\d"),
        ],
        exclude_modules=["self_attn.o", "2"],
    )
    chosen = choose_targets(config)
    assert chosen == {
        "self_attn.q": LoRATarget(64, 32.0, 1e-5),
        "self_attn.k": LoRATarget(64, 32.0, 1e-5),
        "self_attn.v": LoRATarget(16, 16.0),  # a rank of its own: alpha is not that of [adapter]
        "ffn.0": LoRATarget(8, 4.0),
    }
    assert lr_ratios(chosen, 2e-5) == {"blocks.self_attn.q": 0.5, "blocks.self_attn.k": 0.5}
    meta = {"rank": 8, "alpha": 4.0, "targets": describe_targets(chosen)}
    assert parse_targets(meta, ()) == {n: t._replace(lr=None) for n, t in chosen.items()}
    del meta["targets"]
    assert parse_targets(meta, ["ffn.0"]) == {"ffn.0": LoRATarget(8, 4.0)}


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["q", "ffn.0"], [t for t in TARGETS if t[-2:] != ".q" and t != "ffn.0"]),
        (r".*attn.*", ["ffn.0", "ffn.2"]),
        ("blocks.*cross_attn.*", [t for t in TARGETS if not t.startswith("cross")]),
    ],
)
def test_exclude_modules_is_read_as_peft_does(exclude, left):
    assert list(choose_targets(AdapterConfig(exclude_modules=exclude))) == left


def make_model(targets=None) -> WanTransformer:
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    if targets is not None:
        add_adapter(model, jax.random.key(1), targets)
        for index, (_, layer) in enumerate(model.lora_targets()):
            if layer.lora_B is not None:
                layer.lora_B[...] = jax.random.normal(jax.random.key(index), layer.lora_B.shape) / 9
    return model


def predict(model: WanTransformer) -> np.ndarray:
    latents = jax.random.normal(jax.random.key(7), (1, 2, 4, 4, 4))
    text = jax.random.normal(jax.random.key(8), (1, 3, 8))
    return np.asarray(model(latents, jnp.full((1, 2), 0.4), text))


def take(model: WanTransformer, source: str = "mine") -> Adapter:
    matrices, alphas = {}, {}
    for path, layer in model.lora_targets():
        if layer.lora_A is not None and layer.lora_B is not None:
            matrices[f"{path}.lora_A"] = np.asarray(layer.lora_A[...])
            matrices[f"{path}.lora_B"] = np.asarray(layer.lora_B[...])
            alphas[path.removeprefix("blocks.")] = layer.lora_scale * layer.lora_A.shape[1]
    return Adapter(matrices, alphas, {}, source)


@pytest.fixture(scope="module")
def adapted() -> WanTransformer:
    return make_model(SEVERAL)


def test_joined_linears_of_several_ranks_compute_what_merged_weights_do(adapted):
    merged = make_model()
    for path, layer in merged.lora_targets():
        own = SEVERAL.get(path.removeprefix("blocks."))
        if own is None:
            continue
        source = dict(adapted.lora_targets())[path]
        assert source.lora_A.shape[1] == own.rank
        delta = jnp.einsum("nor,nri->noi", source.lora_B[...], source.lora_A[...])
        layer.weight[...] = layer.weight[...] + own.alpha / own.rank * delta
    np.testing.assert_allclose(predict(adapted), predict(merged), rtol=1e-4, atol=1e-4)
    assert np.abs(predict(adapted) - predict(make_model())).max() > 0.01


def test_only_what_is_chosen_trains_in_its_own_rank(adapted):
    def loss(matrices):
        model = nnx.clone(adapted)
        for path, layer in model.lora_targets():
            if layer.lora_A is not None:
                layer.lora_A[...] = matrices[f"{path}.lora_A"]
                layer.lora_B[...] = matrices[f"{path}.lora_B"]
        latents = jax.random.normal(jax.random.key(7), (1, 2, 4, 4, 4))
        return jnp.sum(model(latents, jnp.full((1, 2), 0.4), jnp.ones((1, 3, 8))) ** 2)

    matrices = {name: jnp.asarray(m) for name, m in take(adapted).matrices.items()}
    gradients = jax.grad(loss)(matrices)
    assert len(gradients) == 2 * len(SEVERAL)
    for name, gradient in gradients.items():
        assert gradient.shape == matrices[name].shape
        assert np.all(np.any(np.asarray(gradient) != 0, axis=(0, 2 if "_A" in name else 1))), name


def test_the_first_values_do_not_depend_on_the_other_targets():
    one = make_model({"ffn.2": LoRATarget(4, 6.0)})
    both = make_model(SEVERAL)
    a, b = (dict(m.lora_targets())["blocks.ffn.2"].lora_A[...] for m in (one, both))
    np.testing.assert_array_equal(a, b)


def test_files_keep_ranks_and_alphas_of_each_linear(adapted, tmp_path):
    adapter = take(adapted)
    path = tmp_path / "lora.safetensors"
    write_adapter(adapter, path)
    names = set(safetensors.numpy.load_file(path))
    assert "diffusion_model.blocks.1.self_attn.q.alpha" in names
    assert "diffusion_model.blocks.1.self_attn.v.alpha" not in names  # is its rank
    back = load_adapter(path)
    assert back.ranks == {name: own.rank for name, own in SEVERAL.items()} | {}
    assert back.alphas == {name: own.alpha for name, own in SEVERAL.items()}
    assert str(back) == "rank 1, 2, 3, 4, 5, alpha 2, 4, 5, 6, 5 of 10 linears"
    loaded = make_model()
    attach_adapter(loaded, back)
    np.testing.assert_array_equal(predict(loaded), predict(adapted))


KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def rename(name: str, style: str) -> str:
    if style != "kohya":
        return name.replace("diffusion_model.", style)
    path, _, kind = name.removeprefix("diffusion_model.").partition(
        ".lora" if ".lora" in name else ".alpha"
    )
    kind = f"lora{kind}" if ".lora" in name else "alpha"
    for ours, theirs in KOHYA.items():
        kind = kind.replace(ours, theirs)
    return f"lora_unet_{path.replace('.', '_')}.{kind}"


@pytest.mark.parametrize("style", ["transformer.", "base_model.model.", "", "kohya"])
def test_spellings_of_other_makers_are_read(style, adapted):
    adapter = take(adapted)
    tensors = {rename(name, style): tensor for name, tensor in to_tensors(adapter).items()}
    assert not any(name.startswith("diffusion_model.") for name in tensors)
    back = from_tensors(tensors, metadata={}, source="file")
    assert back.alphas == adapter.alphas
    for name, matrix in adapter.matrices.items():
        np.testing.assert_array_equal(back.matrices[name], matrix)


# --- init_from_existing ---------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_training_starts_as_the_function_of_an_existing_lora(dialect, adapted, tmp_path):
    write_adapter(take(adapted), tmp_path / "lora.safetensors", dialect)
    targets = {name: own._replace(alpha=2 * own.alpha) for name, own in SEVERAL.items()}
    targets["ffn.0"] = LoRATarget(3, 3.0)
    model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
    add_adapter(model, jax.random.key(5), targets)
    said = start_from_existing(model, tmp_path)  # a folder with one file
    assert said.endswith("5 of 10 linears), 1 afresh")
    layers = dict(model.lora_targets())
    assert layers["blocks.self_attn.q"].lora_scale == 12 / 2
    assert not np.any(layers["blocks.ffn.0"].lora_B[...])
    np.testing.assert_allclose(predict(model), predict(adapted), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_started_from_is_refused(adapted, tmp_path):
    write_adapter(take(adapted), tmp_path / "lora.safetensors")

    def start(targets, path=tmp_path):
        model = WanTransformer(CONFIG, rngs=nnx.Rngs(0))
        add_adapter(model, jax.random.key(5), targets)
        start_from_existing(model, path)

    with pytest.raises(BadInput, match=r"lora\.safetensors: rank 4 at ffn\.2, the config has 8; s"):
        start(SEVERAL | {"ffn.2": LoRATarget(8, 8.0)})
    without = {name: own for name, own in SEVERAL.items() if name != "ffn.2"}
    with pytest.raises(
        BadInput, match=r"has an adapter of ffn\.2, which the config does not train"
    ):
        start(without)
    with pytest.raises(BadInput, match="no such file"):
        start(SEVERAL, tmp_path / "none.safetensors")
    write_adapter(take(adapted), tmp_path / "second.safetensors")
    with pytest.raises(BadInput, match=r"one \.safetensors file, this one has 2; name the file"):
        start(SEVERAL)
