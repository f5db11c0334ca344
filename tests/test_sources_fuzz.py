"""Whatever configs, indexes and scales say: they are read, or one line names the file."""

import json
import math
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_convert import write_diffusers_folder

from convert.checkpoints import Sources, open_checkpoint
from convert.weights import main, plan_networks
from wan22_jax.errors import BadInput
from wan22_jax.quantised import WeightFiles
from wan22_jax.tensor_files import SafetensorsFiles
from wan22_jax.weights import OfficialTensors

QUICK = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 48, 2**31, 2**63, 10**30, 10**400])
scalars = numbers | st.booleans() | st.none() | st.text(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folders(official, tmp_path_factory):
    """A folder in each layout, whose small files may be written to."""
    made = {name: tmp_path_factory.mktemp(name) / "folder" for name in ("official", "diffusers")}
    shutil.copytree(official, made["official"], copy_function=os.link)
    made["diffusers"].mkdir()
    write_diffusers_folder(official, made["diffusers"])
    return made


def try_config(folder, path, text):
    """Opens a folder whose config has this text, and puts the config back."""
    before = path.read_bytes()
    path.unlink()  # it may be a link to one of a fixture
    path.write_text(text, "utf-8")
    try:
        return open_checkpoint(Sources(folder))
    except BadInput as error:
        refusal = str(error)
    finally:
        path.write_bytes(before)
    assert str(path.parent) in refusal  # where it is like no config, what is to be there is said
    assert len(refusal) < 1000
    return None


# Configs


OF_TRANSFORMER = {
    "official": ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim"),
    "diffusers": ("attention_head_dim", "ffn_dim", "num_attention_heads", "num_layers", "eps"),
}


@pytest.mark.parametrize("layout", OF_TRANSFORMER)
@QUICK
@given(data=st.data())
def test_any_config_of_a_transformer_is_read_or_named(layout, data, folders):
    folder = folders[layout]
    path = folder / "config.json" if layout == "official" else folder / "transformer/config.json"
    config = json.loads(path.read_text())
    for key in data.draw(st.lists(st.sampled_from(OF_TRANSFORMER[layout]), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            config[key] = data.draw(values)
        else:
            config.pop(key, None)
    found = try_config(folder, path, json.dumps(config))
    if found is not None:
        assert found.transformer_config.num_layers >= 1


@pytest.mark.parametrize(
    "key", ["num_layers", "ffn_dim", "dim", "freq_dim", "text_len", "num_heads"]
)
@pytest.mark.parametrize("value", [10**5, 10**9, 2**63, 10**30])
def test_a_size_beyond_all_models_costs_nothing(key, value, folders):
    path = folders["official"] / "config.json"
    config = json.loads(path.read_text()) | {key: value}
    assert try_config(folders["official"], path, json.dumps(config)) is None


def test_an_eps_that_is_no_number_is_refused(folders):
    path = folders["official"] / "config.json"
    for eps in (math.inf, math.nan, -1e-6, 1e9, 0.0):
        text = json.dumps(json.loads(path.read_text()) | {"eps": eps})
        assert try_config(folders["official"], path, text) is None


def test_sizes_that_the_tensors_have_not_are_refused(folders):
    path = folders["official"] / "config.json"
    for fields in ({"num_layers": 1000}, {"ffn_dim": 2**16}, {"dim": 2**12, "num_heads": 1}):
        found = try_config(
            folders["official"], path, json.dumps(json.loads(path.read_text()) | fields)
        )
        assert found is not None
        with pytest.raises(BadInput, match="not the tensors of the transformer that the config"):
            plan_networks(found, "bfloat16")


@QUICK
@given(fields=st.dictionaries(st.sampled_from(["latents_mean", "latents_std"]), values) | values)
@example(fields={"latents_mean": [10**400] * 48})
@example(fields={"latents_mean": [True] * 48})
def test_any_config_of_a_vae_is_read_or_named(fields, folders):
    path = folders["diffusers"] / "vae" / "config.json"
    config = json.loads(path.read_text())
    config = config | fields if isinstance(fields, dict) else fields
    try_config(folders["diffusers"], path, json.dumps(config))


@QUICK
@given(text=st.text(max_size=20) | st.sampled_from(["[" * 10**5, "9" * 5000, '{"dim": 1e999}', ""]))
def test_any_text_is_a_config_or_named(text, folders):
    path = folders["official"] / "config.json"
    try_config(folders["official"], path, text.encode(errors="replace").decode())


# Indexes


names = st.text(max_size=6) | st.sampled_from(
    ["a.safetensors", "b.safetensors", "gone.safetensors", "../out.safetensors", "..", "", "/"]
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with two shards, and a safetensors file beside it that is not of it."""
    folder = tmp_path_factory.mktemp("shards") / "folder"
    folder.mkdir()
    for name in ("a", "b", "../out"):
        save_file({name[-1]: np.zeros(3, np.float32)}, folder / f"{name}.safetensors")
    return folder


@QUICK
@given(
    index=st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.sampled_from("abcd"), names | values) | values}
    )
    | values
)
def test_any_index_is_read_or_named(index, shards):
    (shards / "m.safetensors.index.json").write_text(json.dumps(index))
    try:
        files = SafetensorsFiles(shards)
    except BadInput as error:
        refusal = str(error)
    else:
        assert {path.name for path in files.paths} <= {"a.safetensors", "b.safetensors"}
        return
    assert str(shards) in refusal


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ('{"weight_map": {"a": "../out.safetensors"}}', r"\.\./out\.safetensors is no safetensors"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "/etc/passwd is no safetensors file of this"),
        ('{"weight_map": {"a": "..safetensors"}}', r"\.\.safetensors is no safetensors file"),
        ('{"weight_map": {"a": "a.pth"}}', r"a\.pth is no safetensors file of this folder"),
        ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "a comes twice"),
        ('{"weight_map": {}}', "it names no file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"missing gone\.safetensors of its index"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(index, why, shards):
    (shards / "m.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=why) as caught:
        SafetensorsFiles(shards)
    assert str(shards) in str(caught.value)


def test_the_command_refuses_an_index_that_leads_elsewhere(official, tmp_path, capsys):
    folder = shutil.copytree(official, tmp_path / "official", copy_function=os.link)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text().replace('"diffusion_pytorch', '"../diffusion_pytorch', 1)
    index.unlink()
    index.write_text(text)
    assert main(["--ckpt_path", str(folder), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{index}: an index with a weight_map was expected (../diffusion_pytorch" in line
    assert not (tmp_path / "out").exists()


# Scales of float8 weights


bad = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-300, 1e300, 3e38, 1e-45])


@QUICK
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    number=bad | st.floats(),
    dtype=st.sampled_from(["f2", "f4", "f8", "i4", "u1", "?", ml_dtypes.bfloat16]),
    name=st.sampled_from(["scale_weight", "weight_scale", "weight_scale_inv", "scale_input"]),
    of_weight=st.sampled_from([(4, 6), (4,), (2, 2, 3), ()]),
)
def test_any_scale_is_used_or_named(shape, number, dtype, name, of_weight, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "scaled.safetensors"
    with np.errstate(all="ignore"):
        scale = np.full(shape, number if dtype not in ("i4", "u1", "?") else 1).astype(dtype)
    weight = np.full(of_weight, 448, ml_dtypes.float8_e4m3fn)
    save_file({"q.weight": weight, f"q.{name}": scale}, file)
    try:
        files = WeightFiles(SafetensorsFiles(file), "transformer")
        read = OfficialTensors(files, {"q.weight": "q.weight"}, ()).read("q.weight")
    except BadInput as error:
        refusal = str(error)
    else:
        assert read.shape == of_weight
        wanted = np.float32(448)
        if name != "scale_input":
            wanted *= scale.astype(np.float32).flat[0]
        assert np.isfinite(wanted)
        np.testing.assert_array_equal(read, np.full(of_weight, wanted))
        return
    assert str(file) in refusal


def test_the_command_names_a_scale_that_is_none(official, tmp_path, capsys):
    tensors = {}
    for shard in official.glob("diffusion_pytorch_model*.safetensors"):
        tensors |= load_file(shard)
    name = "blocks.0.ffn.0.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    (tmp_path / "config.json").write_bytes((official / "config.json").read_bytes())
    words = ["--ckpt_path", official, "--transformer", tmp_path / "x.safetensors"]
    for scale in (math.nan, math.inf, 0.0, -1.0):
        scaled = {"blocks.0.ffn.0.scale_weight": np.float32([scale])}
        save_file(tensors | scaled, tmp_path / "x.safetensors")
        assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "x.safetensors: blocks.0.ffn.0.scale_weight is not a positive finite" in line
