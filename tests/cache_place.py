"""A folder of clips, its config and ``wan22-cache``, as fixtures."""

import dataclasses
from types import SimpleNamespace

import pytest
from make_clips import write_image, write_video

from convert.weights import main as convert
from wan22_jax import clip_encoder, encode, text
from wan22_jax.data.cache import name_encoders
from wan22_jax.dataset import open_caches
from wan22_jax.demo_checkpoint import TINY_VAE, write_checkpoint
from wan22_jax.geometry import Bucket
from wan22_jax.model_folder import read_model_card
from wan22_jax.text import encode_text

BUCKET = Bucket(32, 32, 5)
VAE = dataclasses.replace(TINY_VAE, num_res_blocks=1)
CAPTIONS = {"a": "a grey square", "b": "ein graues Quadrat — größer", "c": "a still"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A converted model, model0; the others that ``convert_model`` adds differ in their weights."""
    folder = tmp_path_factory.mktemp("models")
    convert_model(folder, seed=0)
    return folder


def convert_model(folder, *, seed):
    official = folder / f"official{seed}"
    write_checkpoint(official, captions=CAPTIONS.values(), vae=VAE, seed=seed)
    out = str(folder / f"model{seed}")
    assert convert(["--ckpt_path", str(official), "--out", out, "--dtype", "float32"]) == 0


class Place:
    """A data set, its config files and the command."""

    def __init__(self, folder, models):
        self.clips = folder / "clips"
        self.clips.mkdir()
        self.model = models / "model0"
        self.config = folder / "main.toml"
        self.dataset = folder / "dataset.toml"
        self.config.write_text(
            f"output_dir = 'out'\ndataset = '{self.dataset}'\nepochs = 1\n"
            f"[model]\nckpt_path = '{self.model}'\nvae_dtype = 'float32'\n"
            "[adapter]\ntype = 'lora'\n"
        )
        self.write_dataset("resolutions = [32]\nframe_buckets = [5]")

    def write_dataset(self, keys):
        self.dataset.write_text(f"{keys}\n[[directory]]\npath = '{self.clips}'\n")

    def fill(self):
        write_video(self.clips / "a.mp4", 12, size=(96, 64))
        write_video(self.clips / "b.mp4", 20, fps=30, size=(64, 80), seed=40)
        write_image(self.clips / "c.png", (70, 64))
        for stem, caption in CAPTIONS.items():
            (self.clips / f"{stem}.txt").write_text(f"{caption}\n", encoding="utf-8")

    def run(self, *arguments):
        # Each device compiles for itself here: see test_devices.py for several.
        return encode.main(["--config", str(self.config), "--devices=1", *arguments])

    def encoders(self):
        return name_encoders(read_model_card(self.model).digests, vae_dtype="float32")

    def open(self):
        return open_caches(self.dataset, encoders=self.encoders())

    def stored(self):
        ((cache, _),) = self.open()
        return {
            clip.file: (clip.bucket, cache.read(number)) for number, clip in enumerate(cache.clips)
        }


@pytest.fixture
def place(tmp_path, models):
    return Place(tmp_path, models)


@pytest.fixture
def counted(monkeypatch):
    """What was encoded: number of captions and of clips."""
    count = SimpleNamespace(captions=0, clips=0)

    def encode_text_(encoder, tokenizer, prompts):
        count.captions += sum(prompt != "" for prompt in prompts)
        return encode_text(encoder, tokenizer, prompts)

    start_encoding = clip_encoder.start_encoding

    def start_encoding_(vae, pixels_TYX3):
        count.clips += 1
        return start_encoding(vae, pixels_TYX3)

    monkeypatch.setattr(text, "encode_text", encode_text_)
    monkeypatch.setattr(clip_encoder, "start_encoding", start_encoding_)
    return count
