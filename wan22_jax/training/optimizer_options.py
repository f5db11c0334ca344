"""Which optimizers are there, with which options, and what is each of them made of?

The ``[optimizer]`` table is one of the classes here, chosen by its ``type``. Trees of parameters
are dicts from path to array; a path that begins with "blocks." has a leading axis of layers, and
what an optimizer does per matrix or per vector it does per layer of those.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from pydantic import BaseModel, ConfigDict, Field

from wan22_jax.training.prodigy import ProdigyState, prodigy

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Beta], Field(min_length=2, max_length=2)]
Named = dict[str, Any]  # arrays, or what belongs to them, by path


class Options(BaseModel):
    """What every ``[optimizer]`` table has; ``lr`` unset leaves it to the top-level one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    default_lr: ClassVar[float] = 2e-5  # diffusion-pipe's example value
    scales_with_lr: ClassVar[bool] = True  # whether lr is a factor on the update and nothing else

    type: str = "adamw"
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """Makes the optimizer for a dict of parameters.

        Args:
            schedule: the learning rate after so many steps.
            global_batch: clips of one step.
        """
        raise NotImplementedError


class WithBetas(Options):
    """``beta2_half_life``, in clips, takes the place of the second beta: 0.5^(batch / it)."""

    betas: Betas = [0.9, 0.99]
    beta2_half_life: float | None = Field(default=None, gt=0)

    def beta_pair(self, global_batch: int) -> tuple[float, float]:
        """The betas of a step of so many clips."""
        beta1, beta2 = self.betas
        if self.beta2_half_life is not None:
            beta2 = 0.5 ** (global_batch / self.beta2_half_life)
        return beta1, beta2


class AdamW(WithBetas):
    """AdamW; ``stabilize`` divides the update of a matrix by its RMS where that is over 1.

    The RMS is of the gradient over the root of its own average square, as in StableAdamW
    (Wortsman et al. 2023, arXiv 2304.13013).
    """

    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    stabilize: bool = False

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """See ``Options.make``."""
        beta1, beta2 = self.beta_pair(global_batch)
        adam = optax.scale_by_adam(beta1, beta2, self.eps)
        if self.stabilize:
            adam = per_layer(_scale_by_stable_adam(beta1, beta2, self.eps))
        return _decay_and_scale(adam, self.weight_decay, schedule)


class StableAdamW(AdamW):
    """AdamW with ``stabilize`` on."""

    stabilize: bool = True


class SGD(Options):
    """Torch's: weight decay is part of the gradient, momentum is not damped."""

    momentum: Beta = 0.0
    nesterov: bool = False

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """See ``Options.make``."""
        del global_batch
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay, decays),
            optax.sgd(schedule, momentum=self.momentum or None, nesterov=self.nesterov),
        )


class Lion(WithBetas):
    """The sign of a momentum (Chen et al. 2023); wants about a tenth of AdamW's lr."""

    default_lr: ClassVar[float] = 2e-6

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """See ``Options.make``."""
        lion = optax.scale_by_lion(*self.beta_pair(global_batch))
        return _decay_and_scale(lion, self.weight_decay, schedule)


class Adopt(WithBetas):
    """ADOPT (Taniguchi et al. 2024): Adam whose average square lags a step; clips by count^1/4."""

    betas: Betas = [0.9, 0.9999]
    eps: float = Field(default=1e-6, gt=0)

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """See ``Options.make``."""
        beta1, beta2 = self.beta_pair(global_batch)
        adopt = contrib.scale_by_adopt(beta1, beta2, self.eps)
        return _decay_and_scale(adopt, self.weight_decay, schedule)


class Adafactor(Options):
    """Adafactor (Shazeer and Stern 2018): average squares of rows and columns alone.

    With ``scale_parameter`` lr is relative to the RMS of each matrix, 1e-3 at least.
    """

    default_lr: ClassVar[float] = 1e-3

    beta2_decay: float = Field(default=-0.8, lt=0)
    clip_threshold: float = Field(default=1.0, gt=0)
    scale_parameter: bool = True

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """See ``Options.make``."""
        del global_batch
        steps = [
            optax.scale_by_factored_rms(decay_rate=-self.beta2_decay, min_dim_size_to_factor=1),
            optax.clip_by_block_rms(self.clip_threshold),
        ]
        if self.scale_parameter:
            steps.append(optax.scale_by_param_block_rms())
        return _decay_and_scale(per_layer(optax.chain(*steps)), self.weight_decay, schedule)


class Muon(Options):
    """Momentum made orthogonal, for the matrices of the blocks and of adapters (Jordan 2024).

    What is no matrix of a block (biases, norms, modulation, embeddings, the head) gets AdamW with
    ``adam_lr``. Updates have the RMS ``consistent_rms`` whatever their shape, so that learning
    rates of AdamW fit (Liu et al. 2025, arXiv 2502.16982).
    """

    momentum: Beta = 0.95
    nesterov: bool = True
    ns_steps: int = Field(default=5, ge=1, le=20)
    consistent_rms: float = Field(default=0.2, gt=0)
    adam_lr: float | None = Field(default=None, gt=0)
    adam_betas: Betas = [0.9, 0.99]
    adam_eps: float = Field(default=1e-8, gt=0)

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """See ``Options.make``."""
        del global_batch
        (beta1, beta2), ratio = self.adam_betas, 1.0
        if self.adam_lr is not None:
            ratio = self.adam_lr / (self.lr or self.default_lr)
        adam = optax.chain(optax.scale_by_adam(beta1, beta2, self.adam_eps), optax.scale(ratio))
        muon = optax.chain(
            contrib.scale_by_muon(
                beta=self.momentum,
                nesterov=self.nesterov,
                ns_steps=self.ns_steps,
                weight_dimension_numbers=lambda tree: jax.tree.map(
                    lambda _: contrib.MuonDimensionNumbers(), tree
                ),
            ),
            optax.stateless_with_tree_map(self._scale_to_rms),
        )
        label = {True: "muon", False: "adam"}
        in_blocks = optax.partition(
            {"muon": muon, "adam": adam},
            lambda tree: jax.tree.map(lambda leaf: label[leaf.ndim == 2], tree),
        )
        return _decay_and_scale(per_layer(in_blocks, outside=adam), self.weight_decay, schedule)

    def _scale_to_rms(self, update: Any, _: Any) -> jax.Array:
        return self.consistent_rms * max(update.shape) ** 0.5 * update


class Prodigy(WithBetas):
    """Prodigy, see ``prodigy.py``; lr is a factor on the step size that it finds, usually 1."""

    default_lr: ClassVar[float] = 1.0
    scales_with_lr: ClassVar[bool] = False

    betas: Betas = [0.9, 0.999]
    beta3: Beta | None = None
    eps: float = Field(default=1e-8, gt=0)
    d0: float = Field(default=1e-6, gt=0)
    d_coef: float = Field(default=1.0, gt=0)
    growth_rate: float | None = Field(default=None, gt=1)
    bias_correction: bool = False
    safeguard_warmup: bool = False

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """See ``Options.make``."""
        names = ("beta3", "eps", "d0", "d_coef", "growth_rate", "weight_decay")
        names = (*names, "bias_correction", "safeguard_warmup")
        options = {name: getattr(self, name) for name in names}
        return prodigy(schedule, betas=self.beta_pair(global_batch), decays=decays, **options)


class ScheduleFreeAdamW(WithBetas):
    """AdamW that averages instead of decaying its lr (Defazio et al. 2024, arXiv 2405.15682).

    It trains at y, between the average x and the sequence z; x is what is evaluated and exported
    (``averages.evaluation_weights``).
    """

    scales_with_lr: ClassVar[bool] = False

    betas: Betas = [0.9, 0.999]
    eps: float = Field(default=1e-8, gt=0)
    weight_lr_power: float = Field(default=2.0, ge=0)

    def make(self, schedule: optax.Schedule, *, global_batch: int) -> optax.GradientTransformation:
        """See ``Options.make``."""
        beta1, beta2 = self.beta_pair(global_batch)
        rms = optax.scale_by_rms(beta2, self.eps, eps_in_sqrt=False, bias_correction=True)
        return contrib.schedule_free(
            _decay_and_scale(rms, self.weight_decay, schedule),
            lambda count: schedule(count - 1),  # counts from 1
            b1=beta1,
            weight_lr_power=self.weight_lr_power,
            state_dtype=jnp.float32,
        )


class Known(NamedTuple):
    """An optimizer by one of its names; ``remark`` says what is meant where the name does not."""

    options: type[Options]
    remark: str = ""


_MASTERS = "AdamW on float32 masters here, which needs neither compensation nor a quantised state"

# By name in lower case, without "_" and "-".
_KNOWN = {
    "adamw": Known(AdamW),
    "adamwoptimi": Known(AdamW, _MASTERS),
    "adamw8bit": Known(AdamW, _MASTERS),
    "adamw8bitkahan": Known(AdamW, _MASTERS),
    "stableadamw": Known(StableAdamW),
    "sgd": Known(SGD),
    "lion": Known(Lion),
    "adopt": Known(Adopt),
    "adafactor": Known(Adafactor),
    "muon": Known(Muon),
    "prodigy": Known(Prodigy),
    "schedulefreeadamw": Known(ScheduleFreeAdamW),
}
_NAMES = ("adamw", "stableadamw", "sgd", "lion", "adopt", "adafactor", "muon", "prodigy")
NAMES = (*_NAMES, "schedule_free_adamw")
_REFUSED = {
    "automagic": "adapts a learning rate per element by its own unpublished rule; use 'prodigy'",
    "genericoptim": "is a construction kit of diffusion-pipe; use 'muon' or 'stableadamw'",
    "offload": "is torchao's way to keep an optimizer's state in host memory; use 'adamw'",
    "sophia": "needs second derivatives, which the train step does not compute; use 'lion'",
}
_GRADIENT_RELEASE = (
    "gradient_release steps inside the backward pass, without clipping or true accumulation; "
    "leave it out"
)


def find_optimizer(name: str) -> Known:
    """Returns what a ``type`` means, whatever its case; ValueError says why it means nothing."""
    plain = name.lower().replace("_", "").replace("-", "")
    if plain in _KNOWN:
        return _KNOWN[plain]
    reason = _REFUSED.get(plain, "is unknown")
    raise ValueError(f"{name!r} {reason} (known: {', '.join(NAMES)})")


def refuse_keys(table: dict[str, Any]) -> str | None:
    """Says why a key of diffusion-pipe's table has no place here, None if there is none."""
    return _GRADIENT_RELEASE if table.get("gradient_release") else None


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves by their dotted paths, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def optimizer_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """What an optimizer has to report beside loss and gradient norm; scalars by name."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ProdigyState))
    found = [node for node in nodes if isinstance(node, ProdigyState)]
    return {"prodigy_d": found[0].d} if found else {}


def decays(params: Any) -> dict[str, bool]:
    """Which parameters decay: all but vectors, as in diffusion-pipe; per layer in the blocks."""
    return {name: leaf.ndim - _is_stacked(name) > 1 for name, leaf in params.items()}


def per_layer(
    inside: optax.GradientTransformation, *, outside: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """Runs a transformation on each layer of the blocks alone, and one on all other parameters."""
    parts = {
        "blocks": (_is_stacked, jax.vmap(inside.init), jax.vmap(inside.update)),
        "rest": (lambda name: not _is_stacked(name), *(outside or inside)),
    }

    def select(tree: Named, belongs: Callable[[str], bool]) -> Named:
        return {name: leaf for name, leaf in tree.items() if belongs(name)}

    def init(params: Any) -> Named:
        chosen = {part: select(params, belongs) for part, (belongs, _, _) in parts.items()}
        return {part: parts[part][1](own) for part, own in chosen.items() if own}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Named, Named]:
        out, new_state = {}, {}
        for part, old in state.items():
            belongs, _, run = parts[part]
            own, new_state[part] = run(select(updates, belongs), old, select(params, belongs))
            out |= own
        return out, new_state

    return optax.GradientTransformation(init, update)


def _is_stacked(name: str) -> bool:
    return name.startswith("blocks.")


def _decay_and_scale(
    inner: optax.GradientTransformation, weight_decay: float, schedule: optax.Schedule
) -> optax.GradientTransformation:
    return optax.chain(
        inner,
        optax.add_decayed_weights(weight_decay, decays),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_by_stable_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam, each array of whose update is divided by max(1, RMS of g / sqrt(v))."""
    adam = optax.scale_by_adam(beta1, beta2, eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Named, Any]:
        grads = updates
        updates, new_state = cast(tuple[Named, Any], adam.update(grads, state, params))
        correction = 1 - beta2**new_state.count

        def limit(update: jax.Array, grad: jax.Array, second: jax.Array) -> jax.Array:
            square = jnp.square(grad) / jnp.maximum(second / correction, eps**2)
            return update / jnp.maximum(1.0, jnp.sqrt(jnp.mean(square)))

        return jax.tree.map(limit, updates, grads, new_state.nu), new_state

    return optax.GradientTransformation(adam.init, update)
