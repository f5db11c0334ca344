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
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError

from wan22_jax.adapter_targets import AdapterConfig, LoRATarget, choose_targets, lr_ratios
from wan22_jax.data.batching import Batching, make_batching
from wan22_jax.dataset_config import ClipMode, DatasetConfig
from wan22_jax.errors import BadInput
from wan22_jax.full_config import FullConfig, find_fault
from wan22_jax.model.flow import SQUARED, Penalty, PenaltyKind
from wan22_jax.model.remat import POLICIES
from wan22_jax.parallel import ParallelConfig
from wan22_jax.refused_keys import IGNORED, REFUSED
from wan22_jax.sample_config import SampleConfig
from wan22_jax.toml_file import Table, apply_override, describe_problem, read_toml
from wan22_jax.training.draws import TaskMix
from wan22_jax.training.optimizer_options import (
    AdamW,
    Options,
    ScheduleFreeAdamW,
    find_optimizer,
    refuse_keys,
)

Dtype = Literal["bfloat16", "float32"]
SaveDtype = Literal["float32", "float16", "bfloat16", "float8", "float8_e4m3fn", "float8_e5m2"]


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
    of the nearest resolution; those that are not set follow ``micro_batch_size_per_gpu``. A step
    takes that times ``gradient_accumulation_steps`` times the GPUs that have examples of their own
    (``[parallel]`` data and fsdp), or ``global_batch_size`` clips on any number of GPUs: then it
    accumulates as often as that takes.
    ``i2v_first_frames`` latent frames are given in image-to-video examples, or one of a list of
    such numbers, drawn for each; ``i2v_last_frame_fraction`` of these examples have the last one
    given too. At most one of ``huber_delta``, ``smooth_l1_beta`` and ``pseudo_huber_c`` replaces
    the squared error, in training and evaluation. ``eval_i2v`` evaluates image-to-video beside
    text-to-video, in twice the time.

    ``activation_checkpointing`` is a key of ``remat.POLICIES``. ``blocks_to_swap`` of the blocks,
    all if there are fewer, keep their frozen weights in host memory. ``optimizer`` is one of the
    tables of ``optimizer_options``. ``lr_scheduler`` begins after the warm-up and ends with the
    run, 'linear' at 0 and 'cosine' at ``lr_min``. ``ema_decay`` is what an average of the weights
    keeps of itself at each step, 0 for no average.

    ``save_every_*`` writes the adapter as ``save_dtype``, ``checkpoint_every_*`` the training
    state; of those all stay, or the last ``keep_last_n_checkpoints``, those of multiples of
    ``keep_every_n_steps`` and, with ``keep_best_checkpoint``, the one of lowest evaluation loss. A
    step whose loss or gradient is not finite ends the run, or changes nothing with
    ``skip_nonfinite_steps``. ``deterministic`` has a GPU compute the same bits every time, at some
    cost.
    """

    output_dir: str
    dataset: str
    model: ModelConfig
    adapter: AdapterConfig | None = None
    full: FullConfig | None = None
    sample: SampleConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    optimizer: SerializeAsAny[Options] = AdamW()
    epochs: int = Field(ge=1)
    max_steps: int | None = Field(None, ge=1)
    micro_batch_size_per_gpu: BatchSize = 1
    image_micro_batch_size_per_gpu: BatchSize | None = None
    eval_micro_batch_size_per_gpu: BatchSize | None = None
    eval_image_micro_batch_size_per_gpu: BatchSize | None = None
    image_eval_micro_batch_size_per_gpu: BatchSize | None = None  # diffusion-pipe's example's name
    eval_gradient_accumulation_steps: int = Field(1, ge=1)
    eval_datasets: list[str | EvalDataset] = Field(default=[])
    eval_every_n_epochs: int | None = Field(None, ge=1)
    eval_every_n_steps: int | None = Field(None, ge=1)
    eval_every_n_examples: int | None = Field(None, ge=1)
    eval_before_first_step: bool = True
    eval_i2v: bool = False
    disable_block_swap_for_eval: bool = False
    gradient_accumulation_steps: int = Field(1, ge=1)
    global_batch_size: int | None = Field(None, ge=1)
    gradient_clipping: float = Field(1.0, ge=0)
    lr: float | None = Field(None, gt=0)
    warmup_steps: int = Field(0, ge=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_min: float = Field(1e-6, ge=0)
    force_constant_lr: float | None = Field(None, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
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
    save_every_n_examples: int | None = Field(None, ge=1)
    save_dtype: SaveDtype | None = None
    keep_last_n_checkpoints: int | None = Field(None, ge=1)
    keep_every_n_steps: int | None = Field(None, ge=1)
    keep_best_checkpoint: bool = False
    skip_nonfinite_steps: bool = False
    deterministic: bool = False
    resume_from_checkpoint: bool | str = False
    logging_steps: int = Field(1, ge=1)
    steps_per_print: int | None = Field(None, ge=1)
    x_axis_examples: bool = False
    monitoring: MonitoringConfig = Field(default_factory=MonitoringConfig)
    uncond_fraction: float = Field(0.0, ge=0, le=1)
    video_clip_mode: ClipMode = "single_beginning"
    # Keys of diffusion-pipe that change nothing here (see IGNORED).
    caching_batch_size: int | None = Field(None, ge=1)
    map_num_proc: int | None = Field(None, ge=1)
    compile: bool | None = None
    partition_method: str | None = None
    partition_split: list[int] | None = None
    reentrant_activation_checkpointing: bool | None = None
    # From here on: known keys of diffusion-pipe that this version refuses (see REFUSED).
    pipeline_stages: Any = None

    @property
    def learning_rate(self) -> float:
        """``[optimizer] lr``, or the top-level ``lr``, or the optimizer's own default."""
        return self.optimizer.lr or self.lr or self.optimizer.default_lr

    @property
    def lora_targets(self) -> dict[str, LoRATarget]:
        """The adapter of each linear; empty without one."""
        return {} if self.adapter is None else choose_targets(self.adapter)

    @property
    def lr_ratios(self) -> dict[str, float]:
        """Of targets with an lr of their own, what that is in proportion to ``learning_rate``."""
        return lr_ratios(self.lora_targets, self.learning_rate)

    @property
    def global_batch(self) -> int:
        """Clips of one step."""
        shards = self.parallel.split.batch_shards
        per_step = self.micro_batch * shards * self.gradient_accumulation_steps
        return self.global_batch_size or per_step

    @property
    def micro_batch(self) -> int:
        """Clips of a GPU's forward pass as examples are counted: the first size of a list."""
        size = self.micro_batch_size_per_gpu
        return size if isinstance(size, int) else size[0][1]

    @property
    def accumulates(self) -> bool:
        """Whether a step sums the gradients of several micro-batches, in some bucket at least."""
        batching = self.batching
        if batching.clips_per_step is None:
            return batching.accumulation > 1
        smallest = min(clips for _, clips in (*batching.sizes, *batching.image_sizes))
        return batching.clips_per_step > smallest * batching.num_shards

    @property
    def batching(self) -> Batching:
        """How many clips of a bucket train together."""
        size = self.micro_batch_size_per_gpu
        return make_batching(
            size,
            self.image_micro_batch_size_per_gpu or size,
            accumulation=self.gradient_accumulation_steps,
            num_shards=self.parallel.split.batch_shards,
            per_step=self.global_batch_size,
        )

    @property
    def eval_batching(self) -> Batching:
        """How many clips of a bucket are evaluated together."""
        size = self.eval_micro_batch_size_per_gpu or self.micro_batch_size_per_gpu
        images = self.eval_image_micro_batch_size_per_gpu
        return make_batching(
            size,
            images or self.image_eval_micro_batch_size_per_gpu or size,
            accumulation=self.eval_gradient_accumulation_steps,
            num_shards=self.parallel.split.batch_shards,
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
        asked: list[tuple[PenaltyKind, float | None]] = [
            ("huber", self.huber_delta),
            ("smooth_l1", self.smooth_l1_beta),
            ("pseudo_huber", self.pseudo_huber_c),
        ]
        return [Penalty(kind, scale) for kind, scale in asked if scale is not None]


TableT = TypeVar("TableT", bound=BaseModel)


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
    tree["optimizer"] = _read_optimizer(tree, path)
    config = _validate(TrainConfig, tree, path)
    _check_eval_sets(config, path)
    both = (config.eval_image_micro_batch_size_per_gpu, config.image_eval_micro_batch_size_per_gpu)
    if None not in both and both[0] != both[1]:
        raise BadInput(
            f"{path}: eval_image_micro_batch_size_per_gpu and image_eval_micro_batch_size_per_gpu "
            "are one key and differ; leave out the second"
        )
    if len(config.penalties) > 1:
        raise BadInput(
            f"{path}: huber_delta, smooth_l1_beta and pseudo_huber_c each choose the loss; "
            "set one of them"
        )
    if config.lr is not None and config.optimizer.lr not in (None, config.lr):
        raise BadInput(
            f"{path}: lr = {config.lr} and [optimizer] lr = {config.optimizer.lr} differ"
        )
    _check_adapter(config, path)
    if config.global_batch_size is not None and config.gradient_accumulation_steps > 1:
        raise BadInput(
            f"{path}: global_batch_size says how many micro-batches a step takes; leave out "
            "gradient_accumulation_steps"
        )
    if isinstance(config.optimizer, ScheduleFreeAdamW) and config.lr_scheduler != "constant":
        raise BadInput(
            f"{path}: lr_scheduler = {config.lr_scheduler!r}: {config.optimizer.type} averages "
            "instead of lowering its learning rate; leave it out"
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
        skip_nonfinite_steps=config.skip_nonfinite_steps,
    )
    if fault is not None:
        raise BadInput(f"{path}: {fault}")
    return config


def list_ignored(config: TrainConfig) -> list[str]:
    """Says of each key that is set and changes nothing why it does not."""
    return [
        f"{key} has no effect: {reason}"
        for key, reason in IGNORED.items()
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


def _check_adapter(config: TrainConfig, path: Path) -> None:
    if config.adapter is None:
        return
    try:
        targets = config.lora_targets
    except ValueError as error:
        raise BadInput(f"{path}: [adapter] {error}") from None
    if not any(target.lr for target in targets.values()):
        return
    if not config.optimizer.scales_with_lr:
        raise BadInput(
            f"{path}: [[adapter.targets]] lr: {config.optimizer.type} has one learning rate for "
            "all; leave it out, or choose another optimizer"
        )
    if config.force_constant_lr is not None:
        raise BadInput(
            f"{path}: force_constant_lr is that of all targets; remove lr of [[adapter.targets]]"
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


def _read_optimizer(tree: dict[str, Any], path: Path) -> Options:
    table = tree.get("optimizer", {})
    if not isinstance(table, dict) or not isinstance(table.get("type", ""), str):
        raise BadInput(f"{path}: [optimizer] must be a table whose type is a name")
    if refusal := refuse_keys(table):
        raise BadInput(f"{path}: [optimizer] {refusal}")
    try:
        options = find_optimizer(table.get("type", "adamw")).options
    except ValueError as error:
        raise BadInput(f"{path}: [optimizer] type = {error}") from None
    table = {name: value for name, value in table.items() if name != "gradient_release"}
    if "lr" in tree:
        table.setdefault("lr", tree["lr"])
    return _validate(options, table, path, prefix="optimizer.")


def _validate(table: type[TableT], tree: dict[str, Any], path: Path, *, prefix: str = "") -> TableT:
    try:
        config = table.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_describe(table, problem, prefix) for problem in error.errors())
        raise BadInput(f"{path}: {problems}") from None
    if isinstance(config, Table):
        _refuse_unsupported(config, path)
    return config


def _describe(table: type[BaseModel], problem: Any, prefix: str) -> str:
    problem = problem | {"loc": (*filter(None, [prefix.rstrip(".")]), *problem["loc"])}
    if problem["type"] == "extra_forbidden" and issubclass(table, Options):
        key = problem["loc"][-1]
        own = [name for name in table.model_fields if name != "type"]
        near = difflib.get_close_matches(str(key), own, n=1)
        meant = f", did you mean {prefix}{near[0]}?" if near else ""
        return f"unknown key {prefix}{key}{meant} ({table.__name__} takes {', '.join(own)})"
    return describe_problem(table, problem)


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
        accepted, reason = REFUSED.get(key, ((value,), ""))
        if not any(type(value) is type(other) and value == other for other in accepted):
            raise BadInput(f"{path}: {prefix}{name} = {value!r}: {reason}")
