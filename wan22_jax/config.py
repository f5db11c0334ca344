"""The TOML schema: diffusion-pipe's key names, checked strictly.

``load_config`` reads the main file and ``load_dataset`` the dataset file. An unknown key is an
error that names the nearest known one; a known key whose machinery this version lacks is an error
that says so, unless it asks for what happens anyway.
"""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wan22_jax.data.batching import Batching, make_batching
from wan22_jax.errors import BadInput
from wan22_jax.model.flow import SQUARED, Penalty
from wan22_jax.model.remat import POLICIES
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


class FullConfig(Table):
    """The ``[full]`` table: how all weights train where there is no ``[adapter]``.

    ``weights`` is what they are kept in between steps; the model computes in ``[model] dtype``.
    ``rounding`` is that of bfloat16 weights, see ``training/rounding.py``. ``offload_optimizer``
    keeps the optimizer's state in host memory.
    """

    weights: Dtype = "float32"
    rounding: Literal["stochastic", "kahan"] = "stochastic"
    offload_optimizer: bool = False


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
    uncond_fraction: float = Field(0.0, ge=0, le=1)
    video_clip_mode: ClipMode = "single_beginning"
    # From here on: known keys of diffusion-pipe that this version refuses (see _LATER).
    save_every_n_examples: Any = None
    save_dtype: Any = None
    lr_scheduler: Any = None
    force_constant_lr: Any = None
    x_axis_examples: Any = None
    steps_per_print: Any = None
    monitoring: Any = None
    caching_batch_size: Any = None
    map_num_proc: Any = None
    compile: Any = None
    pipeline_stages: Any = None
    partition_method: Any = None
    partition_split: Any = None
    reentrant_activation_checkpointing: Any = None

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
    "x_axis_examples": ((None, False), f"an x axis in examples {_LATER_VERSION}"),
    "steps_per_print": ((None, 1), "the progress line is always on; leave it out"),
    "monitoring": ((None, {}, {"enable_wandb": False}), f"Weights & Biases {_LATER_VERSION}"),
    "caching_batch_size": ((None, 1), f"caching in batches {_LATER_VERSION}; use 1"),
    "map_num_proc": ((None,), "wan22-cache chooses its own parallelism; leave it out"),
    "compile": ((None, True), "the train step is always compiled; leave it out"),
    "pipeline_stages": ((None, 1), _DEEPSPEED),
    "partition_method": ((None, "parameters"), _DEEPSPEED),
    "partition_split": ((None,), _DEEPSPEED),
    "reentrant_activation_checkpointing": ((None, False), "belongs to torch; leave it out"),
    "control_path": ((None,), "belongs to edit models; TI2V-5B has no control input"),
    "shuffle_metadata": ((None, True), "the order is always shuffled, by seed and epoch"),
    "online_captions": ((None, False), f"captions read while training {_LATER_VERSION}"),
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
    tree = _read_toml(path)
    for override in overrides:
        _apply_override(tree, override)
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
    _check_full(config, path)
    return config


def _check_full(config: TrainConfig, path: Path) -> None:
    if config.adapter is not None:
        if config.full is not None:
            raise BadInput(
                f"{path}: [full] trains all weights, [adapter] a few; remove one of them"
            )
        return
    full, model = config.full or FullConfig(), config.model
    policy = config.activation_checkpointing
    faults = {
        f"transformer_dtype = {model.transformer_dtype!r}": (
            model.transformer_dtype is not None,
            "is that of frozen weights, and all train; choose [full] weights",
        ),
        f"blocks_to_swap = {config.blocks_to_swap}": (
            config.blocks_to_swap > 0,
            "moves frozen weights, and all train; set [full] offload_optimizer = true",
        ),
        f"activation_checkpointing = {policy!r}": (
            POLICIES[policy].on_host > 0,
            "keeps activations in host memory, beside frozen weights alone; use true",
        ),
        "[full] weights = 'bfloat16'": (
            full.weights == "bfloat16" and model.dtype != "bfloat16",
            "needs [model] dtype = 'bfloat16'",
        ),
        "[full] rounding": (
            full.weights == "float32" and "rounding" in full.model_fields_set,
            "is that of bfloat16 weights; leave it out, or set [full] weights = 'bfloat16'",
        ),
        f"[optimizer] type = {config.optimizer.type!r}": (
            config.optimizer.type.lower().startswith("prodigy"),
            "measures all weights at once, and they train block by block; use another one, or "
            "add [adapter] type = 'lora'",
        ),
    }
    for key, (is_fault, reason) in faults.items():
        if is_fault:
            raise BadInput(f"{path}: without [adapter] all weights train: {key} {reason}")


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
    dataset = _validate(DatasetConfig, _read_toml(path), path)
    for number, own in enumerate(dataset.directory):
        for name in ("path", "mask_path", "default_mask_file", "first_frame_path"):
            if "\0" in (getattr(own, name) or ""):
                raise BadInput(f"{path}: directory[{number}].{name} holds a zero byte")
    return dataset


def dump_config(config: Table) -> str:
    """Writes a resolved config as TOML, defaults included, unset keys left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder, a TOML file was expected") from None
    except ValueError as error:  # of tomllib, of the encoding, of a number with too many digits
        raise BadInput(f"{path}: is not valid TOML ({error})") from None
    except RecursionError:
        raise BadInput(f"{path}: is not valid TOML (nested too deeply)") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise BadInput(f"override {override!r}: expected key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for name in tables:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise BadInput(f"override {override!r}: {name} is not a table")
    tree[last] = value


def _validate(table: type[TableT], tree: dict[str, Any], path: Path) -> TableT:
    try:
        config = table.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_describe(table, problem) for problem in error.errors())
        raise BadInput(f"{path}: {problems}") from None
    _refuse_unsupported(config, path)
    return config


def _describe(table: type[Table], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys(table)
        near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
            key.rpartition(".")[2], [name.rpartition(".")[2] for name in known], n=1
        )
        return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else "")
    if problem["type"] == "missing":
        return f"key {key} is missing"
    return f"key {key}: {problem['msg']}, got {json.dumps(problem['input'], default=str)}"


def _describe_policy(value: bool | str) -> str:
    known = [repr(name) if isinstance(name, str) else str(name).lower() for name in POLICIES]
    near = difflib.get_close_matches(str(value).lower(), known, n=1)
    return (
        f"activation_checkpointing = {value!r} is unknown"
        + (f", did you mean {near[0]}?" if near else "")
        + f" (known: {', '.join(known)})"
    )


def _keys(table: type[Table], prefix: str = "") -> list[str]:
    keys = []
    for name, field in table.model_fields.items():
        keys.append(prefix + name)
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, Table):
                keys += _keys(candidate, f"{prefix}{name}.")
    return keys


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
