"""How do videos of fixed prompts come out of a run while it trains?

Texts and pictures are encoded before the transformer is loaded, and wait on the host, as the
decoder does. A preview samples with the weights where they lie, then decodes; noise is a function
of the prompt's seed alone, nothing that training reads is written, and no failure ends the run.
"""

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from PIL import Image

from wan22_jax.config import TrainConfig
from wan22_jax.data.animation import encode_animation, shrink_frames
from wan22_jax.data.video_file import write_video
from wan22_jax.errors import BadInput, is_full_disk, one_line
from wan22_jax.geometry import FPS, LATENT_CHANNELS, Bucket, check_bucket
from wan22_jax.model_folder import load_vae
from wan22_jax.preview_files import SAMPLES, make_step_folder
from wan22_jax.processes import is_main
from wan22_jax.prompts import Request, choose_frame, read_prompt, read_prompt_file
from wan22_jax.stopping import Wishes
from wan22_jax.training.averages import evaluation_weights
from wan22_jax.training.cadence import is_preview_ahead
from wan22_jax.training.frozen import Frozen
from wan22_jax.training.metrics import Progress
from wan22_jax.training.step import TrainState
from wan22_jax.velocity import make_velocity
from wan22_jax.videos import (
    Video,
    denoise,
    describe_request,
    encode_frame,
    encode_texts,
    fetch_video,
)

log = logging.getLogger(__name__)
Check = Callable[[], None]  # raises if the user wants the run to stop
_ANIMATION_PX = 256  # of TensorBoard's pictures
_ANIMATION_EVERY = 3  # so manieth frame is in them


class Prepared(NamedTuple):
    """All that previews need but the weights; on the host."""

    videos: Sequence[Video]
    texts: dict[str, np.ndarray]  # see ``encode_texts``
    first_frames: list[np.ndarray | None]  # of each video
    decoder: nnx.GraphDef
    decoder_state: nnx.State
    vae_dtype: str
    before_first_step: bool


def read_previews(config: TrainConfig, config_file: Path) -> list[Video]:
    """Reads the prompts of ``[sample]`` and opens their pictures; none without the table.

    The paths of the videos are relative to a step's folder.

    Raises:
        BadInput: nothing says when, or a prompt, a switch, a size or a picture is no good.
    """
    sample = config.sample
    if sample is None:
        return []
    if sample.every_n_steps is None and sample.every_n_epochs is None:
        raise BadInput(f"{config_file}: [sample]: set every_n_steps or every_n_epochs")
    size = Bucket(sample.width, sample.height, sample.frames)
    check_bucket(size, source=f"{config_file}: [sample]")
    if isinstance(sample.prompts, str):
        source = sample.prompts
        requests = read_prompt_file(Path(source), sample.defaults)
    else:
        source = f"{config_file}: [sample] prompts"
        requests = [
            read_prompt(
                prompt,
                sample.defaults,
                source=f"{source}, prompt {number}",
                folder=config_file.parent,
            )
            for number, prompt in enumerate(sample.prompts, 1)
        ]
    return [_check(request, number, source=source) for number, request in enumerate(requests)]


def prepare_previews(
    config: TrainConfig,
    videos: Sequence[Video],
    *,
    first_step: int,
    total_steps: int,
    offset: int,
    steps_per_epoch: int,
    is_new: bool,
) -> Prepared | None:
    """Encodes texts and pictures, or does nothing if no preview is ahead.

    No network is on the device before or afterwards.

    Args:
        config: of the run.
        videos: from ``read_previews``.
        first_step: steps that are done.
        total_steps: steps after which the run ends.
        offset: see ``resuming.Start.data_offset``.
        steps_per_epoch: of the loader.
        is_new: the run does not go on from a checkpoint.

    Raises:
        BadInput: the model folder is damaged.
    """
    sample = config.sample
    if sample is None:
        return None
    before_first_step = is_new and sample.before_first_step
    if not before_first_step and not is_preview_ahead(
        sample, first_step, total_steps, offset=offset, steps_per_epoch=steps_per_epoch
    ):
        return None
    folder = Path(config.model.ckpt_path)
    texts = encode_texts(videos, folder, dtype=config.model.dtype)
    gc.collect()  # the text encoder's arrays go before the VAE's come
    vae = load_vae(folder, dtype=sample.vae_dtype, host=True)
    first_frames = [encode_frame(vae, video) for video in videos]
    del vae.encoder, vae.conv1
    decoder, state = nnx.split(vae)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    largest = max((video.bucket for video in videos), key=lambda bucket: bucket.num_tokens)
    log.info(
        "previews: %d prompts encoded; the largest, %s, needs beside the training state a forward "
        "pass of %s tokens, then a decoder of %.1f GB and its activations",
        *(len(videos), largest, f"{largest.num_tokens:,}", num_bytes / 1e9),
    )
    return Prepared(
        videos, texts, first_frames, decoder, state, sample.vae_dtype, before_first_step
    )


class Previewer:
    """Makes the videos of a run.

    Args:
        prepared: from ``prepare_previews``.
        run_dir: the run's folder.
        graphdef: structure of the model, from ``split_model`` or ``split_full``.
        frozen: the base weights, as the train step reads them.
        sharding: of what is put on the device.
    """

    def __init__(
        self,
        prepared: Prepared,
        run_dir: Path,
        *,
        graphdef: nnx.GraphDef,
        frozen: Frozen,
        sharding: NamedSharding,
    ):
        self._prepared, self._run_dir = prepared, run_dir
        self._graphdef, self._frozen, self._sharding = graphdef, frozen, sharding
        self._is_first = True
        self.before_first_step = prepared.before_first_step

    def __call__(self, state: TrainState, progress: Progress, step: int, wishes: Wishes) -> None:
        """Makes a video of each prompt: ``samples/step00000500/00.mp4`` and so on.

        What fails is a warning. A wish to stop ends it early.

        Args:
            state: that ``step`` steps made; it is only read. Its averaged weights are sampled from
                if there are any.
            progress: gets small animations for TensorBoard, and a line.
            step: steps done.
            wishes: that the user may have in the meantime.
        """
        progress.flush()
        start = time.monotonic()

        def check() -> None:
            if wishes.ends_at_once():
                raise _Stopped

        try:
            with _forgiving(progress, step, "previews"):
                folder = make_step_folder(self._run_dir, step)
                latents = self._sample(state, progress, step, check)
                num_made = self._decode(latents, folder, progress, step, check)
                seconds = time.monotonic() - start
                progress.say(f"step {step}: {num_made} previews in {seconds:.1f} s: {folder}")
        except _Stopped:
            progress.say(f"step {step}: the previews end early, as the run is to stop")
        finally:
            gc.collect()  # NNX modules are cyclic: the decoder would keep its device memory

    def _sample(
        self, state: TrainState, progress: Progress, step: int, check: Check
    ) -> dict[int, np.ndarray]:
        weights = evaluation_weights(state) if state.ema is None else state.ema
        velocity = make_velocity(self._graphdef, weights, self._frozen, sharding=self._sharding)
        latents = {}
        given = zip(self._prepared.videos, self._prepared.first_frames, strict=True)
        for number, (video, first_frame) in enumerate(given):
            if self._is_first:
                progress.add_text(_tag(video), video.request.prompt, step)
            with _forgiving(progress, step, _name(video)):
                latents[number] = denoise(
                    *(velocity, video, self._prepared.texts, first_frame),
                    channels=LATENT_CHANNELS,
                    on_step=check,
                )
        self._is_first = False
        return latents

    def _decode(
        self,
        latents: dict[int, np.ndarray],
        folder: Path,
        progress: Progress,
        step: int,
        check: Check,
    ) -> int:
        """Returns how many videos there are now."""
        num_made = 0
        state = jax.device_put(self._prepared.decoder_state, self._sharding)
        vae = nnx.merge(self._prepared.decoder, state)
        for number, latents_BTYXC in latents.items():
            video = self._prepared.videos[number]
            said = {"step": step, "vae_dtype": self._prepared.vae_dtype}
            with _forgiving(progress, step, _name(video)):
                chunks = _check_between(fetch_video(vae.decode_chunks(latents_BTYXC)), check)
                if not is_main():  # the devices of all processes decode together
                    deque(chunks, maxlen=0)
                    continue
                gif = _write(video, folder, chunks, metadata=describe_request(video) | said)
                progress.add_animation(_tag(video), gif, step)
                num_made += 1
        return num_made


class _Stopped(Exception):
    """The user wants the run to stop."""


@contextmanager
def _forgiving(progress: Progress, step: int, what: str) -> Iterator[None]:
    """Makes a warning of whatever goes wrong: a run is worth more than its previews."""
    try:
        yield
    except _Stopped:
        raise
    except Exception as error:
        reason = _explain(error)
        progress.say(f"warning: step {step}: {what} failed: {reason}; training goes on")


def _explain(error: Exception) -> str:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "out of memory; lower --w, --h or --f of the prompt, or [sample] width, height or "
            "frames, and leave vae_dtype at 'bfloat16'"
        )
    if is_full_disk(error):
        return "the disk is full; free some space"
    return one_line(" ".join(str(error).split())[:300]) or type(error).__name__


def _check(request: Request, number: int, *, source: str) -> Video:
    source = f"{source}, prompt {number + 1}"
    if request.seed < 0:
        raise BadInput(
            f"{source}: --d {request.seed} asks for a drawn seed; only videos of one noise can be "
            "compared: give 0 or more"
        )
    return Video(request, Path(f"{number:02}.mp4"), *choose_frame(request, source=source))


def _name(video: Video) -> str:
    return f"preview {video.path.stem} ({video.request.prompt:.40}, {video.bucket})"


def _tag(video: Video) -> str:
    return f"{SAMPLES}/{video.path.stem}"


def _check_between(chunks: Iterable[np.ndarray], check: Check) -> Iterator[np.ndarray]:
    for chunk_TYX3 in chunks:
        check()
        yield chunk_TYX3


def _write(
    video: Video, folder: Path, chunks: Iterable[np.ndarray], *, metadata: dict[str, Any]
) -> bytes:
    """Writes the file; returns a small animation of it."""
    small: list[Image.Image] = []

    def collect() -> Iterator[np.ndarray]:
        first = 0
        for chunk_TYX3 in chunks:
            few = chunk_TYX3[-first % _ANIMATION_EVERY :: _ANIMATION_EVERY]
            small.extend(shrink_frames(few, longest_px=_ANIMATION_PX))
            first += len(chunk_TYX3)
            yield chunk_TYX3

    width_px, height_px, _ = video.bucket
    path = folder / video.path
    write_video(path, collect(), width_px=width_px, height_px=height_px, metadata=metadata)
    return encode_animation(small, kind="GIF", fps=FPS / _ANIMATION_EVERY)
