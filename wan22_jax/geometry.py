"""How pixels, latents and tokens relate; the only file that knows 4, 16, 16 and 1, 2, 2."""

from typing import NamedTuple

from wan22_jax.errors import BadInput

FPS = 24  # Wan2.2 TI2V-5B: every clip is resampled to this rate (official config, sample_fps)
TIME_STRIDE = 4  # pixel frames per latent frame after the first
SPACE_STRIDE = 16  # pixels per latent row or column
PATCH = (1, 2, 2)  # latent frames, rows, columns per token
SIZE_MULTIPLE = SPACE_STRIDE * PATCH[1]  # a token covers 32 x 32 pixels
LATENT_CHANNELS = 48


class Bucket(NamedTuple):
    """One training shape, in pixels and frames."""

    width_px: int
    height_px: int
    frames: int

    @property
    def latent_TYX(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return (
            (self.frames - 1) // TIME_STRIDE + 1,
            self.height_px // SPACE_STRIDE,
            self.width_px // SPACE_STRIDE,
        )

    @property
    def num_tokens(self) -> int:
        """Transformer tokens of one clip."""
        time, rows, columns = self.latent_TYX
        return time * (rows // PATCH[1]) * (columns // PATCH[2])

    @property
    def num_bytes(self) -> int:
        """Of one clip's latents as they are cached, in bfloat16."""
        time, rows, columns = self.latent_TYX
        return time * rows * columns * LATENT_CHANNELS * 2

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}x{self.frames}"


def check_bucket(bucket: Bucket, *, source: str) -> Bucket:
    """Returns the bucket, or raises BadInput if the model cannot take this size by rule.

    Args:
        bucket: the size, as somebody wrote it.
        source: where it was written (a file and key, or a flag), for the message.
    """
    for name, size in (("width", bucket.width_px), ("height", bucket.height_px)):
        if size < SIZE_MULTIPLE or size % SIZE_MULTIPLE:
            near = max(round(size / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
            raise BadInput(
                f"{source}: {name} {size} is not a multiple of {SIZE_MULTIPLE} pixels; use {near}"
            )
    if bucket.frames < 1 or (bucket.frames - 1) % TIME_STRIDE:
        near = max((bucket.frames - 1) // TIME_STRIDE, 0) * TIME_STRIDE + 1
        raise BadInput(
            f"{source}: {bucket.frames} frames is not 4n+1 (1, 5, 9, ... 121); "
            f"use {near} or {near + TIME_STRIDE}"
        )
    return bucket
