"""Weights from .pth files: the same as from safetensors, without running what they hold."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from convert.weights import convert as convert_folder
from wan22_jax.errors import BadInput

VAE_FILE = "Wan2.2_VAE.safetensors"


@pytest.fixture
def copied(official, tmp_path):
    """A copy of the official folder to break."""
    return shutil.copytree(official, tmp_path / "official")


def test_pth_without_torch_names_the_ways_out(copied, monkeypatch, tmp_path):
    (copied / VAE_FILE).unlink()
    (copied / "Wan2.2_VAE.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if not installed
    with pytest.raises(BadInput) as error:
        convert_folder(copied, tmp_path / "out")
    for part in ("Wan2.2_VAE.pth: ", "wan22-jax[parity]", VAE_FILE, "Wan2.2-TI2V-5B-Diffusers"):
        assert part in str(error.value)


@pytest.mark.parity
def test_pth_gives_the_same_digest(official, copied, tmp_path):
    pickle_parts(copied)
    digests = [
        convert_folder(f, tmp_path / f"out{i}").digest for i, f in enumerate((official, copied))
    ]
    assert digests[0] == digests[1]


@pytest.mark.parity
def test_bad_pth_is_named(copied, tmp_path):
    torch = pytest.importorskip("torch")
    pickle_parts(copied)
    file = copied / "Wan2.2_VAE.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"Wan2\.2_VAE\.pth: a complete PyTorch state dict"):
        convert_folder(copied, tmp_path / "out")
    torch.save({"a": Path("not a tensor")}, file)  # would run code with weights_only off
    with pytest.raises(BadInput, match=r"Wan2\.2_VAE\.pth: a complete PyTorch state dict"):
        convert_folder(copied, tmp_path / "out")
    torch.save({"a": RunsCode(str(tmp_path / "ran"))}, file)
    with pytest.raises(BadInput, match=r"Wan2\.2_VAE\.pth: a complete PyTorch state dict"):
        convert_folder(copied, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)  # as it would have
    assert (tmp_path / "ran").exists()
    torch.save({"a": 1}, file)
    with pytest.raises(BadInput, match="a flat dictionary of tensors was expected"):
        convert_folder(copied, tmp_path / "out")


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def pickle_parts(folder):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    for stem in ("Wan2.2_VAE", "models_t5_umt5-xxl-enc-bf16"):
        file = folder / f"{stem}.safetensors"
        torch.save(load_torch(file), folder / f"{stem}.pth")
        file.unlink()
