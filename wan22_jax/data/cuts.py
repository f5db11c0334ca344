"""Which frames of a file become clips?

``single_beginning`` and ``single_middle`` are diffusion-pipe's (its models/base.py,
``extract_clips``); ``uniform`` spreads several clips evenly from the first frame to the last.
"""

from fractions import Fraction
from typing import Literal, NamedTuple

from wan22_jax.data.video import MediaInfo


class CutRule(NamedTuple):
    """How clips are taken out of videos; an image is its only frame under every rule."""

    mode: Literal["single_beginning", "single_middle", "uniform"] = "single_beginning"
    num_clips: int = 1  # of each file, by 'uniform'
    fps: Fraction | None = None  # taken for the rate of every video, whatever it says


def retime(info: MediaInfo, rule: CutRule) -> MediaInfo:
    """Gives a video the rate that the rule sets, if it sets one."""
    if info.is_image or rule.fps is None:
        return info
    return info._replace(fps=rule.fps, is_uneven=False)


def choose_starts(info: MediaInfo, length: int, rule: CutRule) -> tuple[int, ...]:
    """Lists where clips of ``length`` frames start, in frames at 24 fps of a file that has them.

    ``uniform`` gives fewer where a file has not as many different starts.
    """
    last = 0 if info.is_image else info.frames_24 - length
    if rule.mode == "single_middle":
        return (last // 2,)
    if rule.mode == "uniform" and rule.num_clips > 1:
        steps = rule.num_clips - 1
        return tuple(dict.fromkeys(last * step // steps for step in range(rule.num_clips)))
    return (0,)


def name_cut(start: int, info: MediaInfo, *, fps_in_file: Fraction) -> str:
    """Says which frames a clip has, for its key: the same text, the same frames of a file.

    Args:
        start: of ``choose_starts``.
        info: as retimed.
        fps_in_file: what the file says of itself.
    """
    words = ["single_beginning" if start == 0 else f"start {start}"]
    if info.is_uneven:
        words.append("by time")
    elif info.fps != fps_in_file:
        words.append(f"fps {info.fps}")
    return " ".join(words)
