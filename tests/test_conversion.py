"""A conversion that goes on where one was killed, and --verify: nothing is believed unread."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import convert.weights
import convert.written_network
from convert.progress import identify
from convert.weights import convert as convert_folder
from convert.weights import main
from wan22_jax.model_folder import open_array
from wan22_jax.tensor_files import SafetensorsFiles

VAE_FILE = "Wan2.2_VAE.safetensors"


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    """A folder of dtype float8, whose other weights are bfloat16 and float32."""
    out = tmp_path_factory.mktemp("models") / "float8"
    return out, convert_folder(official, out, dtype="float8")


@pytest.fixture
def killed(official, monkeypatch, tmp_path):
    """A conversion that was killed when all was written but the card."""

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert.weights, "write_model_card", kill)
        with pytest.raises(KeyboardInterrupt):
            convert_folder(official, tmp_path / "out", dtype="float8")
    return tmp_path / "out.partial"


@pytest.fixture
def reads(monkeypatch):
    names = []
    read = SafetensorsFiles.read

    def watch(self, name, rows=slice(None)):
        names.append(name)
        return read(self, name, rows)

    monkeypatch.setattr(SafetensorsFiles, "read", watch)
    return names


# Going on


def test_what_is_written_is_not_read_again(killed, official, converted, reads, tmp_path):
    assert (killed / "text_encoder").is_dir()
    card = convert_folder(official, tmp_path / "out", dtype="float8")
    assert (card.digest, reads) == (converted[1].digest, [])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_the_disk_has_lost_is_written_again(killed, official, converted, reads, tmp_path):
    """As after a power cut: the note is there, the numbers are not."""
    weights = killed / "transformer" / "blocks.self_attn.q.weight"
    (weights / "1.0.0").unlink()
    flip_bit(killed / "vae" / "conv2.bias" / "0")
    flip_bit(killed / "transformer" / "blocks.ffn.0.weight_scale" / "0")
    card = convert_folder(official, tmp_path / "out", dtype="float8")
    assert card.digest == converted[1].digest
    assert sorted(reads) == ["blocks.0.ffn.0.weight", "blocks.1.self_attn.q.weight", "conv2.bias"]


def test_a_note_that_was_cut_off_does_not_count(killed, official, converted, reads, tmp_path):
    notes = killed / "progress.jsonl"
    notes.write_bytes(notes.read_bytes()[:-5])
    card = convert_folder(official, tmp_path / "out", dtype="float8")
    assert (card.digest, len(reads)) == (converted[1].digest, 1)


def test_another_source_starts_anew(killed, official, converted, reads, tmp_path):
    (killed / "stray").write_text("of another version")
    changed = shutil.copytree(official, tmp_path / "changed")
    tensors = load_file(changed / VAE_FILE)
    tensors["conv2.bias"][0] += 1
    save_file(tensors, changed / VAE_FILE)
    card = convert_folder(changed, tmp_path / "out", dtype="float8")
    assert card.digest != converted[1].digest
    assert card.digests["transformer"] == converted[1].digests["transformer"]
    assert len(reads) > 100
    assert not (tmp_path / "out" / "stray").exists()


def test_the_identity_is_of_files_and_options(official, tmp_path):
    file = Path(shutil.copy(official / VAE_FILE, tmp_path))
    first = identify({"vae": [file]}, "float8")
    assert identify({"vae": [file]}, "float8") == first
    assert identify({"vae": [file]}, "float32") != first
    assert identify({"vae": [official / VAE_FILE]}, "float8") != first
    os.utime(file, (0, 0))
    assert identify({"vae": [file]}, "float8") != first


def test_two_at_a_time_are_refused(killed, official, capsys, tmp_path):
    flags = ["--ckpt_path", str(official), "--out", str(tmp_path / "out")]
    with (killed / "progress.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([*flags, "--dtype", "float8"]) == 2
    assert "out.partial: another wan22-convert is writing here" in capsys.readouterr().err
    assert (killed / "vae").is_dir()


def test_a_bad_source_leaves_nothing(official, tmp_path):
    bad = shutil.copytree(official, tmp_path / "bad")
    tensors = load_file(bad / VAE_FILE)
    tensors["conv2.bias"][0] = float("nan")
    save_file(tensors, bad / VAE_FILE)
    with pytest.raises(convert.weights.BadInput, match=r"conv2\.bias has infinite or NaN"):
        convert_folder(bad, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


# Comparing


def verify(official, out, *flags):
    return main(["--ckpt_path", str(official), "--out", str(out), "--verify", *flags])


def test_verify_reads_every_tensor_of_both(official, converted, capsys, reads, monkeypatch):
    opened = []
    monkeypatch.setattr(
        convert.written_network,
        "open_array",
        lambda path, **_: opened.append(path.name) or open_array(path),
    )
    before = {path: path.stat().st_mtime_ns for path in converted[0].rglob("*")}
    assert verify(official, converted[0]) == 0
    assert f"{converted[0]}: {len(reads)} tensors equal the source" in capsys.readouterr().out
    assert len(reads) == len(set(reads)) > 100
    assert len(opened) == sum(len(list(converted[0].glob(f"{n}/*/.zarray"))) for n in NETWORKS)
    assert before == {path: path.stat().st_mtime_ns for path in converted[0].rglob("*")}


NETWORKS = ("transformer", "vae", "text_encoder")


@pytest.mark.parametrize(
    ("chunk", "named"),
    [
        ("transformer/blocks.ffn.0.weight/1.0.0", "transformer blocks.1.ffn.0.weight"),
        ("transformer/blocks.modulation/0.0.0.0", "transformer blocks.0.modulation"),
        ("vae/conv2.bias/0", "vae conv2.bias"),
        ("text_encoder/token_embedding.weight/0.0", "text_encoder token_embedding.weight"),
    ],
)
def test_verify_names_the_tensor_that_differs(chunk, named, official, converted, capsys, tmp_path):
    out = shutil.copytree(converted[0], tmp_path / "out")
    flip_bit(out / chunk)
    assert verify(official, out) == 2
    assert f"out: {named} differs from the source; convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (
            "transformer/blocks.ffn.0.weight/1.0.0",
            r"ffn\.0\.weight/1\.0\.0: this part .* is missing",
        ),
        ("vae/conv2.bias/.zarray", "vae: "),
        ("text_encoder/_METADATA", "text_encoder: an Orbax checkpoint was expected"),
        ("tokenizer/tokenizer.json", "its tokenizer is not that of the source"),
    ],
)
def test_verify_names_what_is_lost(lost, named, official, converted, capsys, tmp_path):
    out = shutil.copytree(converted[0], tmp_path / "out")
    (out / lost).unlink()
    assert verify(official, out) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.search(named, line), line


def test_verify_compares_scales_sizes_and_tokenizer(official, converted, capsys, tmp_path):
    out = shutil.copytree(converted[0], tmp_path / "out")
    scale = out / "transformer" / "blocks.ffn.0.weight_scale" / "0"
    flip_bit(scale)
    assert verify(official, out) == 2
    assert "blocks.0.ffn.0.weight_scale differs from the source" in capsys.readouterr().err
    flip_bit(scale)
    assert verify(official, out, "--dtype", "float32") == 2
    assert "out: is float8, not float32" in capsys.readouterr().err
    (out / "tokenizer" / "tokenizer.json").write_text("{}")
    assert verify(official, out) == 2
    assert "out: its tokenizer is not that of the source" in capsys.readouterr().err
    card = json.loads((out / "model.json").read_text())
    card["transformer"]["eps"] = 1.0
    (out / "model.json").write_text(json.dumps(card))
    assert verify(official, out) == 2
    assert "out: its transformer has other sizes than the source" in capsys.readouterr().err


def test_verify_converts_first_where_nothing_is_there(official, capsys, tmp_path):
    assert verify(official, tmp_path / "out", "--dtype", "float32") == 0
    printed = capsys.readouterr().out
    assert "out: complete, digest" in printed
    assert "tensors equal the source bit for bit" in printed
