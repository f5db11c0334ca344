"""What videos are asked for: prompts with switches, as users of kohya's trainers write them.

    A dog runs along the beach --w 832 --h 480 --f 81 --d 42 --s 20 --g 5 --n blurry --i dog.png

A switch says what is asked of this video alone; what it does not say is as for all.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from wan22_jax.data.picture import best_output_size, crop_to_cover, open_picture
from wan22_jax.errors import BadInput
from wan22_jax.geometry import Bucket, check_bucket
from wan22_jax.sampling import Solver


def _switch(letters: str, parse: Callable[[str], Any]) -> Any:
    return {"switch": letters, "parse": parse}


@dataclass(frozen=True)
class Request:
    """One video to make; the defaults are those of Wan2.2's generate.py for this model."""

    prompt: str = ""
    negative: str = field(default="", metadata=_switch("n", str))  # the model's own if empty
    image: Path | None = field(default=None, metadata=_switch("i", Path))  # the first frame
    width: int = field(default=1280, metadata=_switch("w", int))
    height: int = field(default=704, metadata=_switch("h", int))  # with an image the area counts
    frames: int = field(default=121, metadata=_switch("f", int))
    steps: int = field(default=50, metadata=_switch("s", int))
    guidance: float = field(default=5.0, metadata=_switch("g", float))  # 1 is off
    shift: float = field(default=5.0, metadata=_switch("fs", float))
    seed: int = field(default=-1, metadata=_switch("d", int))  # -1 is to be drawn
    solver: Solver = "unipc"

    def __str__(self) -> str:
        with_seed = "" if self.seed == -1 else f", seed {self.seed}"
        return f"{self.steps} steps of {self.solver}, guidance {self.guidance:g}{with_seed}"


_SWITCHES = {
    each.metadata["switch"]: (each.name, each.metadata["parse"])
    for each in fields(Request)
    if each.metadata
}
# A switch is a word after white space; what follows it belongs to it up to the next one.
_AT_SWITCH = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


def read_prompt(text: str, defaults: Request, *, source: str, folder: Path = Path()) -> Request:
    """Reads a prompt and the switches behind it.

    Args:
        text: as in the module's example.
        defaults: of what no switch says.
        source: where the text stands, for messages.
        folder: that the path of a picture is relative to.

    Raises:
        BadInput: an unknown switch, a value that is not a number, or no prompt.
    """
    prompt, *switches = _AT_SWITCH.split(text.strip())
    found: dict[str, Any] = {}
    for switch in switches:
        letters, _, value = switch.partition(" ")
        if letters not in _SWITCHES:
            known = " ".join(f"--{each}" for each in _SWITCHES)
            raise BadInput(f"{source}: --{letters} is no switch of a prompt; there are {known}")
        name, parse = _SWITCHES[letters]
        if name in found:
            raise BadInput(f"{source}: --{letters} is given twice; give it once")
        try:
            found[name] = parse(value.strip())
        except ValueError:
            kind = "a whole number" if parse is int else "a number"
            raise BadInput(
                f"{source}: --{letters}: {kind} expected, got {value.strip()!r}"
            ) from None
    if isinstance(found.get("image"), Path):
        found["image"] = folder / found["image"]
    if not prompt.strip():
        raise BadInput(f"{source}: a text was expected, it is empty; say what the video shows")
    request = replace(defaults, prompt=prompt.strip(), **found)
    return check_request(request, source=f"{source}: ")


def read_prompt_file(file: Path, defaults: Request) -> list[Request]:
    """Reads a text file with a prompt a line; empty lines and those that begin with # are left out.

    Pictures are looked for beside the file.

    Raises:
        BadInput: no such file, not UTF-8, no prompt in it, or as ``read_prompt``, with the line.
    """
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{file}: a text file with a prompt a line was expected ({error})"
        ) from error
    requests = [
        read_prompt(line, defaults, source=f"{file}, line {number}", folder=file.parent)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.strip().startswith("#")
    ]
    if not requests:
        raise BadInput(f"{file}: holds no prompt; write one a line")
    return requests


def check_request(request: Request, *, source: str) -> Request:
    """Returns the request; BadInput if a value is out of range (sizes: ``choose_frame``).

    Args:
        request: to be checked, but for its prompt.
        source: what stands before the name of a value in a message.
    """
    for name, is_good, what in (
        ("steps", request.steps >= 1, "1 or more expected, got {}; 50 is usual"),
        ("shift", 0 < request.shift < 1000, "a number over 0 expected, got {:g}; 5 is usual"),
        ("guidance", math.isfinite(request.guidance), "a number expected, got {}; 5 is usual"),
        ("seed", -1 <= request.seed < 2**63, "0 or more expected, or -1 to draw one, got {}"),
    ):
        if not is_good:
            raise BadInput(f"{source}{name}: " + what.format(getattr(request, name)))
    return request


def choose_frame(request: Request, *, source: str) -> tuple[Bucket, np.ndarray | None]:
    """Returns the size of the video and, with a picture, its first frame [1, 1, Y, X, 3], -1 to 1.

    Raises:
        BadInput: a size that the model has not, or a picture that cannot be read.
    """
    if request.image is None:
        bucket = Bucket(request.width, request.height, request.frames)
        return check_bucket(bucket, source=source), None
    picture = open_picture(request.image)
    width_px, height_px = best_output_size(
        picture.width,
        picture.height,
        area_px=request.width * request.height,
        source=str(request.image),
    )
    bucket = check_bucket(Bucket(width_px, height_px, request.frames), source=source)
    return bucket, crop_to_cover(picture, width_px=width_px, height_px=height_px)
