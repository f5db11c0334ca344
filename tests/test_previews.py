"""[sample]: videos of fixed prompts while a run trains, which change nothing of what it trains."""

import base64
import errno
import gc
import io
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from PIL import Image
from tiny_run import CONFIG, digest_state, keep_programs, prepare

from wan22_jax import previews, sample, train, videos
from wan22_jax.config import load_config
from wan22_jax.data.video import probe, read_clip
from wan22_jax.geometry import Bucket
from wan22_jax.preview_files import list_preview_files
from wan22_jax.stopping import SAVE_QUIT
from wan22_jax.training.events import PATTERN, iterate_events
from wan22_jax.training.metrics import Progress
from wan22_jax.training.step import TrainState

SMALL = "--w 32 --h 32 --f 5 --s 2"
PROMPTS = f"""# of the previews
a cat {SMALL} --d 1

a <dog> looks up {SMALL} --i dog.png --g 1
"""
SAMPLE = """
[sample]
prompts = "prompts.txt"
every_n_steps = 1
"""
PLAIN = CONFIG.replace("checkpoint_every_n_steps = 1\n", "").replace(
    "accumulation_steps = 2", "accumulation_steps = 1"
)
LORA = PLAIN + SAMPLE
FULL = LORA.replace('"prompts.txt"', f'["a dog {SMALL} --i dog.png"]').replace(
    "[adapter]\nrank = 2\n", ""
)
STEPS = 2


def name_videos(*steps: int) -> list[str]:
    return [f"samples/step{step:08}/{number:02}.mp4" for step in steps for number in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Model, cache and configs; what is compiled is kept beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    prepare(folder)
    (folder / "lora.toml").write_text(PLAIN)
    (folder / "sample.toml").write_text(LORA)
    (folder / "full.toml").write_text(FULL)
    (folder / "prompts.txt").write_text(PROMPTS)
    pixels_YX3 = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels_YX3).save(folder / "dog.png")
    (folder / "no_picture.png").write_text("text")
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
    with keep_programs(tmp_path_factory.mktemp("compiled")):
        yield folder
    jax.config.update("jax_disable_most_optimizations", False)


def run(*flags: str, config: str = "sample.toml") -> int:
    return train.main(["--config", config, f"max_steps={STEPS}", *flags])


def only_run(output_dir: str = "runs") -> Path:
    (run_dir,) = Path(output_dir).iterdir()
    return run_dir


@pytest.fixture(scope="module")
def plain(folder) -> tuple[int, str]:
    """What a run without previews ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("output_dir=plain", config="lora.toml") == 0
        return digest_state(only_run("plain"))


def watch(patch: pytest.MonkeyPatch) -> list[int]:
    """Checks that previews leave the state, and what is on the device, as they were."""

    class Watched(previews.Previewer):
        def __call__(self, state, progress, step, wishes):
            progress.flush()
            gc.collect()
            num_arrays, bits = len(jax.live_arrays()), read_bits(state)
            super().__call__(state, progress, step, wishes)
            assert len(jax.live_arrays()) <= num_arrays
            assert read_bits(state) == bits
            steps.append(step)

    steps: list[int] = []
    patch.setattr(train, "Previewer", Watched)
    return steps


def read_bits(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run with previews."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        steps = watch(patch)
        assert run("output_dir=whole") == 0
        assert steps == [0, 1, 2]
        return only_run("whole").absolute()


def read_videos(run_dir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run_dir)): path.read_bytes() for path in sorted(run_dir.rglob("*.mp4"))
    }


def test_a_run_with_previews_trains_what_one_without_does(whole, plain):
    assert digest_state(whole) == plain
    videos = read_videos(whole)
    assert sorted(videos) == name_videos(0, 1, 2)
    assert len(set(videos.values())) == 6  # training changed what is seen
    made = list_preview_files(whole)
    names = [str(one.path.relative_to(whole)) for one in made]
    assert names == name_videos(0, 1, 2)
    assert [one.step for one in made] == [0, 0, 1, 1, 2, 2]
    cat, dog = made[0].asked, made[1].asked
    assert (cat["prompt"], cat["seed"], cat["guidance"], cat["image"]) == ("a cat", 1, 5.0, None)
    assert (dog["prompt"], dog["seed"], dog["image"]) == ("a <dog> looks up", 0, "dog.png")
    info = probe(made[1].path)
    assert (info.width_px, info.height_px, info.frames, info.fps) == (32, 32, 5, 24)
    assert (whole / "prompts.txt").read_text() == PROMPTS
    assert "every_n_steps = 1" in (whole / "sample.toml").read_text()


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_stop_or_a_failure_leaves_the_run_as_it_was(whole, plain, monkeypatch, capsys):
    """It stops in its first preview; when it goes on, memory runs out for one prompt."""

    def stop(*args, **options):
        (only_run() / SAVE_QUIT).touch()
        return sample_latents(*args, **options)

    def fail(*args, **options):
        if options["guidance"] == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")
        return sample_latents(*args, **options)

    sample_latents = videos.sample_latents
    monkeypatch.setattr(videos, "sample_latents", stop)
    assert run() == 0
    said = capsys.readouterr().out
    assert "step 0: the previews end early, as the run is to stop" in said
    assert "stopped on request" in said
    assert digest_state(only_run())[0] == 1
    assert read_videos(only_run()) == {}
    monkeypatch.setattr(videos, "sample_latents", fail)
    assert run("--resume_from_checkpoint") == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warning == (
        "warning: step 2: preview 01 (a <dog> looks up, 32x32x5) failed: out of memory; lower --w, "
        "--h or --f of the prompt, or [sample] width, height or frames, and leave vae_dtype at "
        "'bfloat16'; training goes on"
    )
    assert digest_state(only_run()) == plain
    (name,) = name_videos(2)[:1]
    assert read_videos(only_run()) == {name: read_videos(whole)[name]}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full; free some space"),
        (av.error.InvalidDataError(1, "no\nframe"), "[Errno 1] no frame"),
        (MemoryError(), "out of memory; lower --w"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_whatever_fails_is_one_line(error, expected):
    lines: list[str] = []
    progress = object.__new__(Progress)
    progress.say = lines.append
    with previews._forgiving(progress, 3, "this"):
        raise error
    (line,) = lines
    assert line.startswith(f"warning: step 3: this failed: {expected}")
    assert line.endswith("; training goes on")
    assert "\n" not in line
    with pytest.raises(KeyboardInterrupt), previews._forgiving(progress, 3, "this"):
        raise KeyboardInterrupt


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_averages_are_sampled_and_blocks_may_wait_in_host_memory(whole):
    assert run("ema_decay=0.99", "blocks_to_swap=1", "max_steps=1") == 0
    videos, others = read_videos(only_run()), read_videos(whole)
    assert sorted(videos) == name_videos(0, 1)
    for name, video in videos.items():
        assert (video == others[name]) == ("step00000000" in name)


@pytest.mark.long
@pytest.mark.usefixtures("here")
def test_a_full_fine_tuning_has_previews_too(monkeypatch):
    steps = watch(monkeypatch)
    assert run("max_steps=1", config="full.toml") == 0
    assert steps == [0, 1]
    videos = read_videos(only_run())
    assert list(videos) == [name_videos(step)[0] for step in (0, 1)]
    assert len(set(videos.values())) == 2


@pytest.mark.usefixtures("here")
def test_a_preview_is_the_video_that_wan22_sample_makes(whole):
    flags = ["--seed", "0", "--model", "model", "--lora", str(whole), "--prompts", "prompts.txt"]
    assert sample.main([*flags, "--dtype", "float32", "--out", "out.mp4"]) == 0
    for number, path in enumerate(sorted(Path().glob("out*.mp4"))):
        preview = whole / name_videos(2)[number]
        frames = [read_clip(file, probe(file), Bucket(32, 32, 5)) for file in (path, preview)]
        np.testing.assert_array_equal(*frames)


def test_tensorboard_gets_animations_and_each_prompt_once(whole):
    (path,) = whole.glob(PATTERN)
    pictures, texts = {}, {}
    for event in iterate_events(path):
        for value in event.summary.value:
            if value.HasField("image"):
                pictures[value.tag, event.step] = value.image.encoded_image_string
            elif value.tag.startswith("samples/"):
                texts[value.tag, event.step] = value.tensor.string_val[0].decode()
    assert texts == {
        ("samples/00/text_summary", 0): "a cat",
        ("samples/01/text_summary", 0): "a <dog> looks up",
    }
    assert sorted(pictures) == [(f"samples/{n:02}", step) for n in (0, 1) for step in (0, 1, 2)]
    with Image.open(io.BytesIO(pictures["samples/00", 2])) as gif:
        assert (gif.format, gif.n_frames, gif.size) == ("GIF", 2, (32, 32))  # frames 0 and 3
        gif.seek(1)
        shown_YX3 = np.asarray(gif.convert("RGB"), float)
    path = whole / "samples/step00000002/00.mp4"
    frames_TYX3 = read_clip(path, probe(path), Bucket(32, 32, 5)).astype(float)
    errors = [np.abs(shown_YX3 - frame_YX3).mean() for frame_YX3 in frames_TYX3]
    assert np.argmin(errors) == 3


def test_the_report_shows_them_side_by_side(whole):
    (whole / "samples/step00000009").mkdir()
    (whole / "samples/step00000009/00.mp4").write_text("damaged")
    assert train.main(["--report", str(whole)]) == 0
    page = (whole / "report.html").read_text()
    assert re.findall("<h3>(.*?)</h3>", page) == ["a cat", "a &lt;dog&gt; looks up"]
    rows = page.split("<h3>")[1:]
    for number, row in enumerate(rows):
        assert re.findall("<figcaption>(step .*?)<", row) == ["step 0", "step 1", "step 2"]
        assert f'href="samples/step00000002/{number:02}.mp4"' in row
    assert "image dog.png" in rows[1]
    for picture in re.findall(r'src="data:image/webp;base64,(.*?)"', page):
        with Image.open(io.BytesIO(base64.b64decode(picture))) as webp:
            assert webp.n_frames == 3


@pytest.mark.usefixtures("here")
def test_nothing_is_loaded_for_previews_that_never_come(monkeypatch):
    class Loaded(Exception):
        pass

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(videos, "load_fitting_text_encoder", load)
    file = Path("sample.toml")
    for flags, first_step, is_new, comes in (
        (["sample.every_n_steps=3"], 0, True, True),  # before the first step
        (["sample.every_n_steps=3", "sample.before_first_step=false"], 0, True, False),
        (["sample.every_n_steps=2"], 0, False, True),
        (["sample.every_n_steps=2"], 2, False, False),  # nothing is left to do
    ):
        config = load_config(file, flags)
        asked = previews.read_previews(config, file)
        with pytest.raises(Loaded) if comes else nullcontext():
            prepared = previews.prepare_previews(
                config,
                asked,
                first_step=first_step,
                total_steps=2,
                offset=0,
                steps_per_epoch=4,
                is_new=is_new,
            )
            assert prepared is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("prompts=[]", "key sample.prompts: Value error, a list of prompts, or the path of a"),
        ("prompts=[1]", "key sample.prompts: Value error, a list of prompts, or the path of a"),
        ("prompts='none.txt'", "none.txt: a text file with a prompt a line was expected"),
        ("prompts=['a', 'b --x 1']", "sample.toml: [sample] prompts, prompt 2: --x is no switch"),
        ("prompts=['a --s much']", "prompt 1: --s: a whole number expected, got 'much'"),
        ("prompts=['a --w 33']", "[sample] prompts, prompt 1: width 33 is not a multiple of 32"),
        ("prompts=['a --d -1']", "prompt 1: --d -1 asks for a drawn seed"),
        ("prompts=['a --i none.png']", "none.png: no such picture"),
        ("prompts=['a --i no_picture.png']", "no_picture.png: expected a picture"),
        ("every_n_stepz=1", "unknown key sample.every_n_stepz, did you mean sample.every_n_steps"),
        ("every_n_steps=0", "key sample.every_n_steps"),
        ("every_n_epochs=0", "key sample.every_n_epochs"),
        ("before_first_step=1", "key sample.before_first_step"),
        ("steps=0", "key sample.steps"),
        ("guidance=inf", "key sample.guidance"),
        ("shift=0", "key sample.shift"),
        ("solver='euler'", "key sample.solver"),
        ("width=500", "sample.toml: [sample]: width 500 is not a multiple of 32 pixels; use 512"),
        ("height=0", "sample.toml: [sample]: height 0 is not a multiple of 32"),
        ("frames=32", "sample.toml: [sample]: 32 frames is not 4n+1"),
        ("negative_prompt=1", "key sample.negative_prompt"),
        ("seed=-1", "key sample.seed"),
        ("vae_dtype='float16'", "key sample.vae_dtype"),
    ],
)
def test_what_is_wrong_is_refused_at_the_start(here, flag, expected, capsys):
    assert run(f"sample.{flag}") == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (here / "runs").exists()


@pytest.mark.usefixtures("here")
def test_a_table_that_never_says_when_is_refused(capsys):
    Path("never.toml").write_text(LORA.removesuffix("every_n_steps = 1\n"))
    Path("line.txt").write_text("fine\n\nbad --q 1\n")
    assert run(config="never.toml") == 2
    assert "never.toml: [sample]: set every_n_steps or every_n_epochs" in capsys.readouterr().err
    assert run("sample.prompts='line.txt'") == 2
    assert "line.txt, line 3: --q is no switch of a prompt" in capsys.readouterr().err
