"""What we export, opened by Diffusers and PEFT themselves: the same numbers, and not the base's."""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from export_runs import SEVERAL, draw_adapter, write_full_run, write_lora_run
from flax import nnx
from safetensors import safe_open

from convert import export
from convert.weights import convert
from convert.whole_model import diffusers_transformer_config, diffusers_vae_config
from wan22_jax.adapter import Adapter, attach_adapter
from wan22_jax.adapter_file import write_adapter
from wan22_jax.demo_checkpoint import TINY_TRANSFORMER
from wan22_jax.lora_names import DIALECTS
from wan22_jax.model.transformer import TI2V_5B, WanTransformer
from wan22_jax.model.vae import WAN22_VAE, WanVAE
from wan22_jax.model_folder import load_transformer, load_vae
from wan22_jax.model_tensors import FolderTensors, stacked_weight_shapes
from wan22_jax.weights import parameter_shapes, transformer_names, vae_names

pytestmark = pytest.mark.parity


class Models(NamedTuple):
    folder: Path
    model: Path
    base: Path  # Diffusers' folder of the base
    adapter: Adapter


@pytest.fixture(scope="module")
def models(official, tmp_path_factory) -> Models:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("models")
    convert(official, folder / "model", dtype="float32")
    adapter = write_lora_run(folder / "lora", folder / "model", ckpt_path=folder / "model")
    # A run that has changed nothing is the base.
    write_full_run(folder / "untrained", folder / "model", ckpt_path=folder / "model", noise=0.0)
    run("--checkpoint", folder / "untrained", "--format", "diffusers", "--out", folder / "base")
    return Models(folder, folder / "model", folder / "base", adapter)


def run(*words: object) -> None:
    assert export.main([*map(str, words), "--dtype", "float32"]) == 0


def draw_inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(1, 2, 4, 4, TINY_TRANSFORMER.in_channels)).astype(np.float32)
    text = rng.normal(size=(1, 512, TINY_TRANSFORMER.text_dim)).astype(np.float32)
    return latents, text


def ours(model: Path, adapter: Adapter | None = None) -> np.ndarray:
    transformer = load_transformer(model, dtype="float32")
    if adapter is not None:
        attach_adapter(transformer, adapter)
    latents, text = draw_inputs()
    return np.asarray(transformer(latents, jnp.full((1, 2), 0.4), text))


def open_theirs(folder: Path):
    import diffusers

    return diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").eval()


def theirs(transformer) -> np.ndarray:
    import torch

    latents, text = draw_inputs()
    with torch.no_grad():
        velocity = transformer(
            torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy()),
            torch.tensor([400.0]),
            torch.from_numpy(text),
        ).sample
    return velocity.numpy().transpose(0, 2, 3, 4, 1)


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def assert_differs(found: np.ndarray, base: np.ndarray) -> None:
    assert np.linalg.norm(found - base) > 0.05 * np.linalg.norm(base)


@pytest.mark.parametrize(
    ("dialect", "targets"),
    [  # Diffusers takes kohya's names of all ten linears only
        *((dialect, "all") for dialect in DIALECTS),
        ("comfyui", "several"),
        ("diffusers", "several"),
    ],
)
def test_diffusers_loads_a_lora_in_each_dialect(dialect, targets, models, tmp_path):
    import diffusers

    out, adapter = tmp_path / "lora.safetensors", models.adapter
    if targets == "all":
        run("--checkpoint", models.folder / "lora", "--format", dialect, "--out", out)
    else:
        adapter = draw_adapter(stacked_weight_shapes(FolderTensors(models.model)), SEVERAL)
        write_adapter(adapter, out, dialect)
    transformer = open_theirs(models.base)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    base = theirs(transformer)
    pipeline.load_lora_weights(str(out))
    wanted = ours(models.model, adapter)
    assert_close(theirs(transformer), wanted)
    assert_differs(wanted, base)


@pytest.mark.parametrize("targets", ["all", "several"])
def test_peft_loads_the_diffusers_file(targets, models, tmp_path):
    peft = pytest.importorskip("peft")
    import torch

    out, adapter = tmp_path / "lora.safetensors", models.adapter
    if targets == "several":
        adapter = draw_adapter(stacked_weight_shapes(FolderTensors(models.model)), SEVERAL)
    write_adapter(adapter, out, "diffusers")
    with safe_open(out, framework="numpy") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        state = {
            name.removeprefix("transformer."): torch.from_numpy(file.get_tensor(name))
            for name in file.offset_keys()
        }
    fields = {key.removeprefix("transformer."): value for key, value in header.items()}
    transformer = open_theirs(models.base)
    base = theirs(transformer)
    peft.inject_adapter_in_model(peft.LoraConfig(**fields), transformer)
    loaded = peft.set_peft_model_state_dict(transformer, state)
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if "lora_" in name]
    wanted = ours(models.model, adapter)
    assert_close(theirs(transformer), wanted)
    assert_differs(wanted, base)


def test_diffusers_opens_the_folder_of_a_merged_model(models, tmp_path):
    import diffusers
    import torch

    out = tmp_path / "merged"
    run("--checkpoint", models.folder / "lora", "--merge", "--format", "diffusers", "--out", out)
    wanted = ours(models.model, models.adapter)
    assert_close(theirs(open_theirs(out)), wanted)
    assert_close(theirs(open_theirs(models.base)), ours(models.model))
    assert_differs(wanted, ours(models.model))

    vae = diffusers.AutoencoderKLWan.from_pretrained(out, subfolder="vae").eval()
    latents = np.random.default_rng(2).normal(size=(1, 2, 2, 2, 48)).astype(np.float32)
    own = load_vae(models.model)
    decoded = np.asarray(own.decode(own_latents := jnp.asarray(latents)))
    mean, std = (
        np.asarray(values, np.float32)
        for values in (own.config.latents_mean, own.config.latents_std)
    )
    raw = np.asarray(own_latents) * std + mean
    with torch.no_grad():
        video = vae.decode(torch.from_numpy(raw.transpose(0, 4, 1, 2, 3).copy())).sample
    np.testing.assert_allclose(
        np.clip(decoded, -1, 1), video.numpy().transpose(0, 2, 3, 4, 1), atol=1e-5
    )
    assert vae.config.scale_factor_spatial == 16
    assert list(vae.config.latents_mean) == list(own.config.latents_mean)


def test_diffusers_opens_the_official_file(models, tmp_path):
    import diffusers

    out = tmp_path / "merged.safetensors"
    run("--checkpoint", models.folder / "lora", "--merge", "--out", out)
    transformer = diffusers.WanTransformer3DModel.from_single_file(
        str(out), config=str(models.base), subfolder="transformer"
    ).eval()
    assert_close(theirs(transformer), ours(models.model, models.adapter))


def test_names_and_shapes_at_full_size_are_those_of_diffusers():
    import diffusers
    import torch

    for config, table, own, kind in (
        (
            diffusers_transformer_config(TI2V_5B),
            transformer_names(),
            nnx.eval_shape(lambda: WanTransformer(TI2V_5B, rngs=nnx.Rngs(0))),
            diffusers.WanTransformer3DModel,
        ),
        (
            diffusers_vae_config(WAN22_VAE),
            vae_names(WAN22_VAE.num_res_blocks),
            nnx.eval_shape(lambda: WanVAE(WAN22_VAE, rngs=nnx.Rngs(0))),
            diffusers.AutoencoderKLWan,
        ),
    ):
        with torch.device("meta"):
            model = kind.from_config(config)
        shapes = {table.to_diffusers(name): s for name, s in parameter_shapes(own).items()}
        assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes
        assert set(config) - {"_class_name"} <= set(model.config)
