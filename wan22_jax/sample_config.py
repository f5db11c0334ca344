"""The ``[sample]`` table: which videos does a run make of its own weights, and when?"""

from typing import Any, Literal

from pydantic import Field, field_validator

from wan22_jax.prompts import Request
from wan22_jax.sampling import Solver
from wan22_jax.toml_file import Table


class SampleConfig(Table):
    """Prompts, when they are sampled, and what holds where their switches say nothing.

    ``prompts`` is a list of prompts with switches, or the path of a text file with one a line; see
    ``prompts.py``. ``vae_dtype`` is that of the decoder. A seed is never drawn: videos of two steps
    differ by their weights alone.
    """

    prompts: list[str] | str
    every_n_steps: int | None = Field(None, ge=1)
    every_n_epochs: int | None = Field(None, ge=1)
    before_first_step: bool = True
    steps: int = Field(20, ge=1)
    guidance: float = 5.0
    shift: float = Field(5.0, gt=0, lt=1000)
    solver: Solver = "unipc"
    width: int = 512
    height: int = 512
    frames: int = 33
    negative_prompt: str = ""
    seed: int = Field(0, ge=0, lt=2**63)
    vae_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @field_validator("prompts", mode="before")
    @classmethod
    def _check_prompts(cls, value: Any) -> Any:
        is_list = isinstance(value, list) and all(isinstance(prompt, str) for prompt in value)
        if not value or not (isinstance(value, str) or is_list):
            raise ValueError("a list of prompts, or the path of a text file, was expected")
        return value

    @property
    def defaults(self) -> Request:
        """What is asked of a video whose prompt has no switches."""
        return Request(
            negative=self.negative_prompt,
            width=self.width,
            height=self.height,
            frames=self.frames,
            steps=self.steps,
            guidance=self.guidance,
            shift=self.shift,
            seed=self.seed,
            solver=self.solver,
        )
