"""The TOML schema: diffusion-pipe's key names, checked strictly.

``load_config`` reads the main file and ``load_dataset`` the dataset file. An unknown key is an
error that names the nearest known one; a known key whose machinery this version lacks is an error
that says so, unless it asks for what happens anyway.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wan22_jax.data.batching import Batching, make_batching
from wan22_jax.errors import BadInput
from wan22_jax.full_config import FullConfig, find_fault
from wan22_jax.model.flow import SQUARED, Penalty
from wan22_jax.model.remat import POLICIES
from wan22_jax.toml_file import apply_override, describe_problem, read_toml
from wan22_jax.training.draws import TaskMix

Number = int | float
Dtype = Literal["bfloat16", "float32"]
ClipMode = Literal["single_beginning", "single_middle", "uniform"]


class Table(BaseModel):
    """One TOML table: frozen, no unknown keys, no silent conversion of types, no inf or nan."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Table):
    """The ``[model]`` table: which weights, in which precision, and how noise levels are drawn.

    ``transformer_dtype`` is that of the frozen weights, ``dtype`` if it is not set. 'float8' keeps
    the linears of the blocks in eight bits; a model folder of another dtype is quantised while it
    loads. A folder that wan22-convert wrote as float8 is used as such, unless
    ``transformer_dtype``, or ``dtype`` = 'float32', asks for the bits that it has lost: an error.
    ``vae_dtype`` is what the VAE computes the latents of a cache in, whatever ``dtype`` says.
    """

    type: Literal["wan"] = "wan"
    ckpt_path: str
    dtype: Dtype = "bfloat16"
    transformer_dtype: Literal["bfloat16", "float32", "float8", "float8_e5m2"] | None = None
    vae_dtype: Dtype = "bfloat16"
    timestep_sample_method: Literal["logit_normal", "uniform"] = "logit_normal"
    sigmoid_scale: float = Field(1.0, gt=0)
    shift: float | None = Field(None, ge=0)
    flux_shift: bool = False
    min_t: float = Field(0.0, ge=0, lt=1)
    max_t: float = Field(1.0, gt=0, le=1)
    transformer_path: str | None = None
    llm_path: str | None = None
    cache_text_embeddings: bool = True
    text_encoder_fp8: bool = False


class AdapterConfig(Table):
    """The ``[adapter]`` table. ``dtype`` is the one that wan22-export writes.

    The trained copy is float32 whatever ``dtype`` says: bfloat16 loses small updates. Its matmuls
    run in the model's dtype.
    """

    type: Literal["lora", "lokr"] = "lora"
    rank: int = Field(32, ge=1)
    alpha: float | None = Field(None, gt=0)
    dtype: Dtype = "bfloat16"
    dropout: float = Field(0.0, ge=0, lt=1)
    exclude_modules: list[str] = []
    init_from_existing: str | None = None


class OptimizerConfig(Table):
    """The ``[optimizer]`` table; both names mean AdamW on float32 masters."""

    type: str = "adamw"
    lr: float | None = Field(default=None, gt=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.99], min_length=2, max_length=2
    )
    weight_decay: float = Field(default=0.01, ge=0)
    eps: float = Field(default=1e-8, gt=0)


class MonitoringConfig(Table):
    """The ``[monitoring]`` table: Weights & Biases, beside TensorBoard.

    The key is never written: neither into the run's copy of the config nor into a checkpoint.
    """

    enable_wandb: bool = False
    wandb_api_key: str | None = Field(default=None, exclude=True, repr=False)
    wandb_tracker_name: str | None = None
    wandb_run_name: str | None = None


class EvalDataset(Table):
    """One of ``eval_datasets``: the name of its curves and its dataset file."""

    name: str = Field(min_length=1)
    config: str


PositiveInt = Annotated[int, Field(ge=1)]
BatchSize = (
    PositiveInt
    | Annotated[
        list[Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]], Field(min_length=1)
    ]
)


class TrainConfig(Table):
    """The main file.

    A batch size is a number, or ``[[resolution, size], ...]``, of which each bucket takes the entry
    of the nearest resolution; those that are not set follow ``micro_batch_size_per_gpu``.
    ``i2v_first_frames`` latent frames are given in image-to-video examples, or one of a list of
    such numbers, drawn for each; ``i2v_last_frame_fraction`` of these examples have the last one
    given too. At most one of ``huber_delta``, ``smooth_l1_beta`` and ``pseudo_huber_c`` replaces
    the squared error, in training and evaluation. ``eval_i2v`` evaluates image-to-video beside
    text-to-video, in twice the time.

    ``activation_checkpointing`` is a key of ``remat.POLICIES``. ``blocks_to_swap`` of the blocks,
    all if there are fewer, keep their frozen weights in host memory.
    """

    output_dir: str
    dataset: str
    model: ModelConfig
    adapter: AdapterConfig | None = None
    full: FullConfig | None = None
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    epochs: int = Field(ge=1)
    max_steps: int | None = Field(None, ge=1)
    micro_batch_size_per_gpu: BatchSize = 1
    image_micro_batch_size_per_gpu: BatchSize | None = None
    eval_micro_batch_size_per_gpu: BatchSize | None = None
    eval_image_micro_batch_size_per_gpu: BatchSize | None = None
    eval_gradient_accumulation_steps: int = Field(1, ge=1)
    eval_datasets: list[str | EvalDataset] = []
    eval_every_n_epochs: int | None = Field(None, ge=1)
    eval_every_n_steps: int | None = Field(None, ge=1)
    eval_every_n_examples: int | None = Field(None, ge=1)
    eval_before_first_step: bool = True
    eval_i2v: bool = False
    disable_block_swap_for_eval: bool = False
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_clipping: float = Field(1.0, ge=0)
    lr: float | None = Field(None, gt=0)
    warmup_steps: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=2**31)
    i2v_fraction: float = Field(0.2, ge=0, le=1)
    i2v_first_frames: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] = 1
    i2v_last_frame_fraction: float = Field(0.0, ge=0, le=1)
    huber_delta: float | None = Field(None, gt=0)
    smooth_l1_beta: float | None = Field(None, gt=0)
    pseudo_huber_c: float | None = Field(None, gt=0)
    activation_checkpointing: bool | str = False
    blocks_to_swap: int = Field(0, ge=0)
    save_every_n_steps: int | None = Field(None, ge=1)
    save_every_n_epochs: int | None = Field(None, ge=1)
    checkpoint_every_n_steps: int | None = Field(None, ge=1)
    checkpoint_every_n_epochs: int | None = Field(None, ge=1)
    checkpoint_every_n_minutes: float | None = Field(None, gt=0)
    resume_from_checkpoint: bool | str = False
    logging_steps: int = Field(1, ge=1)
    steps_per_print: int | None = Field(None, ge=1)
    x_axis_examples: bool = False
    monitoring: MonitoringConfig = Field(default_factory=MonitoringConfig)
    uncond_fraction: float = Field(0.0, ge=0, le=1)
    video_clip_mode: ClipMode = "single_beginning"
    # Keys of diffusion-pipe that change nothing here (see _IGNORED).
    caching_batch_size: int | None = Field(None, ge=1)
    map_num_proc: int | None = Field(None, ge=1)
    compile: bool | None = None
    partition_method: str | None = None
    partition_split: list[int] | None = None
    reentrant_activation_checkpointing: bool | None = None
    # From here on: known keys of diffusion-pipe that this version refuses (see _LATER).
    save_every_n_examples: Any = None
    save_dtype: Any = None
    lr_scheduler: Any = None
    force_constant_lr: Any = None
    pipeline_stages: Any = None

    @property
    def learning_rate(self) -> float:
        """``[optimizer] lr``, or the top-level ``lr``, or diffusion-pipe's example value."""
        return self.optimizer.lr or self.lr or 2e-5

    @property
    def micro_batch(self) -> int:
        """Clips of a forward pass as examples are counted: the first size of a list."""
        size = self.micro_batch_size_per_gpu
        return size if isinstance(size, int) else size[0][1]

    @property
    def batching(self) -> Batching:
        """How many clips of a bucket train together."""
        size = self.micro_batch_size_per_gpu
        return make_batching(
            size,
            self.image_micro_batch_size_per_gpu or size,
            accumulation=self.gradient_accumulation_steps,
        )

    @property
    def eval_batching(self) -> Batching:
        """How many clips of a bucket are evaluated together."""
        size = self.eval_micro_batch_size_per_gpu or self.micro_batch_size_per_gpu
        return make_batching(
            size,
            self.eval_image_micro_batch_size_per_gpu or size,
            accumulation=self.eval_gradient_accumulation_steps,
        )

    @property
    def eval_sets(self) -> dict[str, Path]:
        """The dataset files of evaluation, by name; plain strings are 'eval0', 'eval1', ..."""
        return {
            f"eval{number}" if isinstance(one, str) else one.name: Path(
                one if isinstance(one, str) else one.config
            )
            for number, one in enumerate(self.eval_datasets)
        }

    @property
    def tasks(self) -> TaskMix:
        """Which frames of the examples are given."""
        first = self.i2v_first_frames
        return TaskMix(
            self.i2v_fraction,
            (first,) if isinstance(first, int) else tuple(first),
            self.i2v_last_frame_fraction,
        )

    @property
    def penalty(self) -> Penalty:
        """What an error costs."""
        (penalty,) = self.penalties or [SQUARED]
        return penalty

    @property
    def penalties(self) -> list[Penalty]:
        """Those that were asked for; ``load_config`` refuses more than one."""
        asked = {
            "huber": self.huber_delta,
            "smooth_l1": self.smooth_l1_beta,
            "pseudo_huber": self.pseudo_huber_c,
        }
        return [Penalty(kind, scale) for kind, scale in asked.items() if scale is not None]


class ClipKeys(Table):
    """What may stand at the top of the dataset file, and differently in one ``[[directory]]``.

    ``video_clip_mode`` wins over that of the main file; 'uniform' takes ``clips_per_video`` clips
    of each file. ``skip_empty_caption`` says what a clip without caption is: left out (true), or
    trained with '' (false); an error if it is not set.
    """

    num_repeats: Number = Field(1, gt=0, le=10**6)
    resolutions: list[Number | list[Number]] | None = None
    enable_ar_bucket: bool = False
    min_ar: Number | None = Field(None, gt=0)
    max_ar: Number | None = Field(None, gt=0)
    num_ar_buckets: int | None = Field(None, ge=1, le=1000)
    ar_buckets: list[Number | list[Number]] | None = None
    frame_buckets: list[int] = [1]
    size_buckets: list[list[int]] | None = None
    caption_prefix: str = ""
    shuffle_tags: bool = False
    cache_shuffle_num: int = Field(0, ge=0, le=1000)
    cache_shuffle_delimiter: str = Field(", ", min_length=1)
    skip_empty_caption: bool | None = None
    recursive: bool = False
    video_clip_mode: ClipMode | None = None
    clips_per_video: int | None = Field(None, ge=1, le=1000)
    shuffle_metadata: Any = None
    online_captions: Any = None


class DirectoryConfig(ClipKeys):
    """One ``[[directory]]`` of clips; a key that it does not set comes from the top of the file.

    ``fps`` is taken for the rate of its videos, whatever they say. ``mask_path`` and
    ``first_frame_path`` are folders of pictures named like the clips.
    """

    path: str
    fps: Number | None = Field(None, ge=0.1, le=1000)
    mask_path: str | None = None
    default_mask_file: str | None = None
    first_frame_path: str | None = None
    control_path: Any = None


class DatasetConfig(ClipKeys):
    """The dataset file; its ``uncond_fraction`` wins over that of the main file."""

    directory: list[DirectoryConfig] = Field(min_length=1)
    subsample_ratio: Number | None = Field(None, gt=0, le=1)
    uncond_fraction: Number | None = Field(None, ge=0, le=1)


_LATER_VERSION = "is not supported by this version yet"
_DEEPSPEED = "belongs to DeepSpeed's pipeline parallelism, which wan22_jax does not use"
_E5M2 = "e5m2 keeps two bits of a weight's mantissa, one less than 'float8' (e4m3); use 'float8'"

# key -> (values that change nothing, why any other value is refused)
_LATER: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.transformer_dtype": ((None, "bfloat16", "float32", "float8"), _E5M2),
    "model.transformer_path": ((None,), "put the transformer into the model folder instead"),
    "model.llm_path": ((None,), "put the text encoder into the model folder instead"),
    "model.cache_text_embeddings": ((True,), "text embeddings are always cached; leave it out"),
    "model.text_encoder_fp8": (
        (False,),
        "one that does not fit into GPU memory is streamed from host memory, to the same bits",
    ),
    "adapter.type": (("lora",), f"LoKr {_LATER_VERSION}; use 'lora'"),
    "adapter.dropout": ((0.0,), f"LoRA dropout {_LATER_VERSION}"),
    "adapter.exclude_modules": (([],), f"a choice of target modules {_LATER_VERSION}"),
    "adapter.init_from_existing": ((None,), f"starting from an existing LoRA {_LATER_VERSION}"),
    "save_every_n_examples": ((None,), f"saving by examples {_LATER_VERSION}; use steps"),
    "save_dtype": ((None,), "wan22-export --dtype sets the dtype of the saved file"),
    "lr_scheduler": ((None, "constant"), f"this schedule {_LATER_VERSION}; use 'constant'"),
    "force_constant_lr": ((None,), "the schedule is constant; set lr"),
    "pipeline_stages": ((None, 1), _DEEPSPEED),
    "control_path": ((None,), "belongs to edit models; TI2V-5B has no control input"),
    "shuffle_metadata": ((None, True), "the order is always shuffled, by seed and epoch"),
    "online_captions": ((None, False), f"captions read while training {_LATER_VERSION}"),
}

# key -> why leaving it out trains the same; such a key is accepted with whatever value
_IGNORED = {
    "caching_batch_size": "wan22-cache chooses its batches by the memory that there is",
    "map_num_proc": "wan22-cache chooses its own parallelism",
    "compile": "the train step is always compiled",
    "partition_method": "it splits layers among pipeline stages, of which there is one",
    "partition_split": "it splits layers among pipeline stages, of which there is one",
    "reentrant_activation_checkpointing": "it chooses between two ways of torch to recompute",
}

TableT = TypeVar("TableT", bound=Table)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads the main file.

    Args:
        path: a TOML file.
        overrides: ``key.path=value`` strings that win over the file; a value is TOML or bare text.

    Raises:
        BadInput: not TOML, an unknown, missing, wrong or unsupported key; it names file and key.
    """
    tree = read_toml(path)
    for override in overrides:
        apply_override(tree, override)
    config = _validate(TrainConfig, tree, path)
    _check_eval_sets(config, path)
    if len(config.penalties) > 1:
        raise BadInput(
            f"{path}: huber_delta, smooth_l1_beta and pseudo_huber_c each choose the loss; "
            "set one of them"
        )
    if config.lr is not None and config.optimizer.lr not in (None, config.lr):
        raise BadInput(
            f"{path}: lr = {config.lr} and [optimizer] lr = {config.optimizer.lr} differ"
        )
    if config.optimizer.type.lower() not in ("adamw", "adamw_optimi"):
        raise BadInput(
            f"{path}: [optimizer] type = {config.optimizer.type!r} {_LATER_VERSION}; use 'adamw' "
            "(float32 masters, so no Kahan or 8-bit variant is needed for a LoRA)"
        )
    if config.model.min_t >= config.model.max_t:
        raise BadInput(f"{path}: [model] min_t must be below max_t")
    if config.activation_checkpointing not in POLICIES:
        raise BadInput(f"{path}: {_describe_policy(config.activation_checkpointing)}")
    fault = find_fault(
        config.full,
        has_adapter=config.adapter is not None,
        model_dtype=config.model.dtype,
        transformer_dtype=config.model.transformer_dtype,
        blocks_to_swap=config.blocks_to_swap,
        activation_checkpointing=config.activation_checkpointing,
        optimizer=config.optimizer.type,
    )
    if fault is not None:
        raise BadInput(f"{path}: {fault}")
    return config


def list_ignored(config: TrainConfig) -> list[str]:
    """Says of each key that is set and changes nothing why it does not."""
    return [
        f"{key} has no effect: {reason}"
        for key, reason in _IGNORED.items()
        if getattr(config, key) is not None
    ]


def _check_eval_sets(config: TrainConfig, path: Path) -> None:
    if len(config.eval_sets) < len(config.eval_datasets):
        raise BadInput(f"{path}: eval_datasets: two have one name; give each its own")
    for name in config.eval_sets:
        if name == "train" or "/" in name or name.removesuffix("_ema") != name:
            raise BadInput(
                f"{path}: eval_datasets: the name {name!r} is taken; choose one that is not "
                "'train', has no '/' and does not end in '_ema', which name other curves"
            )


def load_dataset(path: Path) -> DatasetConfig:
    """Reads the dataset file; raises BadInput as ``load_config`` does."""
    dataset = _validate(DatasetConfig, read_toml(path), path)
    for number, own in enumerate(dataset.directory):
        for name in ("path", "mask_path", "default_mask_file", "first_frame_path"):
            if "\0" in (getattr(own, name) or ""):
                raise BadInput(f"{path}: directory[{number}].{name} holds a zero byte")
    return dataset


def dump_config(config: Table) -> str:
    """Writes a resolved config as TOML, defaults included, unset keys left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _validate(table: type[TableT], tree: dict[str, Any], path: Path) -> TableT:
    try:
        config = table.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(describe_problem(table, problem) for problem in error.errors())
        raise BadInput(f"{path}: {problems}") from None
    _refuse_unsupported(config, path)
    return config


def _describe_policy(value: bool | str) -> str:
    known = [repr(name) if isinstance(name, str) else str(name).lower() for name in POLICIES]
    near = difflib.get_close_matches(str(value).lower(), known, n=1)
    return (
        f"activation_checkpointing = {value!r} is unknown"
        + (f", did you mean {near[0]}?" if near else "")
        + f" (known: {', '.join(known)})"
    )


def _refuse_unsupported(config: Table, path: Path, prefix: str = "") -> None:
    for name in type(config).model_fields:
        value = getattr(config, name)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, Table):
                dot = f"{name}[{index}]." if isinstance(value, list) else f"{name}."
                _refuse_unsupported(item, path, prefix + dot)
        key = name if prefix.startswith("directory[") else prefix + name
        accepted, reason = _LATER.get(key, ((value,), ""))
        if not any(type(value) is type(other) and value == other for other in accepted):
            raise BadInput(f"{path}: {prefix}{name} = {value!r}: {reason}")
