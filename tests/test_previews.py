"""[sample]: videos of fixed prompts while a run trains, which change nothing of what it trains."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import CONFIG, digest_state, keep_programs, prepare

from wan22_jax import train

SMALL = "--w 32 --h 32 --f 5 --s 2"
SAMPLE = f"""
[sample]
prompts = ["a cat {SMALL} --d 1", "a dog looks up {SMALL} --i dog.png --g 1"]
every_n_steps = 2
"""
LORA = CONFIG + SAMPLE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Model, cache and configs; what is compiled is kept beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    prepare(folder)
    (folder / "sample.toml").write_text(LORA)
    pixels_YX3 = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels_YX3).save(folder / "dog.png")
    with keep_programs(tmp_path_factory.mktemp("compiled")):
        yield folder


def run(*flags: str, config: str = "sample.toml") -> int:
    return train.main(["--config", config, "max_steps=4", *flags])


def only_run(output_dir: str = "runs") -> Path:
    (run_dir,) = Path(output_dir).iterdir()
    return run_dir


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    """A run without previews."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("output_dir=runs", config="lora.toml") == 0
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def list_videos(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*.mp4"))


@pytest.mark.usefixtures("here")
def test_a_run_with_previews_trains_what_one_without_does(plain, capsys):
    assert run("output_dir=whole") == 0
    said = capsys.readouterr().out
    whole = only_run("whole")
    assert digest_state(whole) == digest_state(plain)
    assert list_videos(whole) == [
        f"samples/step{step:08}/{number:02}.mp4" for step in (0, 2, 4) for number in (0, 1)
    ]
    print(said)
    print(json.loads((whole / "samples/step00000002/prompts.json").read_text()))
