"""How are frames written into an mp4 file?"""

from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np

from wan22_jax.geometry import FPS


def write_mp4(
    path: Path, chunks: Iterable[np.ndarray], *, width_px: int, height_px: int, fps: int = FPS
) -> int:
    """Encodes frames as H.264 while they arrive and returns how many there were.

    The file appears under its name when it is complete, and not at all when anything fails.

    Args:
        path: of the file, in a folder that exists; an existing file is replaced.
        chunks: pieces of the clip, uint8 [T, Y, X, 3].
        width_px: of every frame, even.
        height_px: of every frame, even.
        fps: frames a second.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with av.open(
            str(partial), "w", format="mp4", options={"movflags": "faststart"}
        ) as container:
            # Quality 8 of the original's imageio writer is libx264's CRF 10.
            stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
            num_frames = 0
            for frame_YX3 in chain.from_iterable(chunks):
                frame = av.VideoFrame.from_ndarray(frame_YX3, format="rgb24")
                frame.pts, frame.time_base = num_frames, Fraction(1, fps)
                container.mux(stream.encode(frame))
                num_frames += 1
            container.mux(stream.encode(None))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return num_frames
