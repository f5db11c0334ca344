"""How well do the weights predict clips that they were not trained on, at each noise level?

As diffusion-pipe (its behaviour, section 4.5): the loss of every clip at the nine deciles of the
noise levels that training draws. Beside it: each clip counts exactly once, the noise of a clip is
a function of the clip and the decile alone, so that values compare between evaluations and runs,
and nothing is drawn from what training draws from, nor is any of its state touched.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, UInt

from wan22_jax.batch import Batch
from wan22_jax.data.eval_clips import EvalBatch, EvalSet
from wan22_jax.geometry import Bucket
from wan22_jax.model.flow import Penalty
from wan22_jax.model.shards import ONE_DEVICE, Shards
from wan22_jax.sharding import of_examples, put, put_examples, shards_of, specs_of
from wan22_jax.training.draws import Draws
from wan22_jax.training.frozen import gather_frozen
from wan22_jax.training.step import Frozen, StepSettings, Trainable, loss_fn

NUM_QUANTILES = 9
QUANTILES = tuple((number + 1) / (NUM_QUANTILES + 1) for number in range(NUM_QUANTILES))
_SEED = 0  # not the run's: runs with other seeds are to compare
_T2V, _I2V = 0, 1  # how many latent frames are given


class Evaluator:
    """Evaluates weights on data sets.

    Args:
        sets: by the name of their curves.
        graphdef: structure of the model, from ``split_model``.
        frozen: the base weights, as the train step reads them.
        penalty: what an error costs, as in training.
        make_grid: the noise levels that training draws from in a bucket, ascending.
        evaluates_i2v: also gives the loss with the first latent frame given.
        gathers_blocks: copies blocks that wait in host memory to the device for the time of an
            evaluation, instead of streaming them for each forward pass.
        sharding: of what is put on the device.
    """

    def __init__(
        self,
        sets: Mapping[str, EvalSet],
        *,
        graphdef: nnx.GraphDef,
        frozen: Frozen,
        penalty: Penalty,
        make_grid: Callable[[Bucket], np.ndarray | Array],
        evaluates_i2v: bool = False,
        gathers_blocks: bool = False,
        sharding: NamedSharding,
    ):
        self._sets = dict(sets)
        self._frozen = frozen
        self._make_grid = make_grid
        self._given = (_T2V, _I2V) if evaluates_i2v else (_T2V,)
        self._gathers_blocks = gathers_blocks
        self._sharding, self._mesh = sharding, cast(Mesh, sharding.mesh)
        # Nothing is kept for a backward pass; with True, streamed blocks do not even make it.
        settings = StepSettings(penalty=penalty, activation_checkpointing=True)
        self._compute = partial(eval_losses, graphdef=graphdef, settings=settings)
        self._losses: Callable[..., Array] | None = None

    def __call__(self, trainable: Trainable, ema: Trainable | None = None) -> dict[str, float]:
        """Evaluates the weights; returns values by the names of their curves.

        ``<set>/loss_quantile_0.10`` to ``_0.90``, ``<set>/loss``, their mean, ``<set>/loss_i2v``
        if it was asked for and the set has videos, the same of averaged weights under
        ``<set>_ema/`` if there are any, and ``eval/eval_time_sec``.

        Args:
            trainable: the weights; they are only read.
            ema: averages of them, if the run keeps any.
        """
        start = time.monotonic()
        frozen = gather_frozen(self._frozen) if self._gathers_blocks else self._frozen
        versions = {"": trainable} | ({} if ema is None else {"_ema": ema})
        values: dict[str, float] = {}
        for name, examples in self._sets.items():
            found = self._measure(examples, versions, frozen)
            for suffix in versions:
                values |= {
                    f"{name}{suffix}/{curve}": value
                    for curve, value in _name_curves(found, suffix).items()
                }
        values["eval/eval_time_sec"] = time.monotonic() - start
        return values

    def score(self, values: Mapping[str, float]) -> float:
        """The figure by which the best checkpoint is known: lower is better.

        The mean of ``<set>/loss`` over the sets; of the averaged weights if there are any.
        """
        found = [values.get(f"{name}_ema/loss", values[f"{name}/loss"]) for name in self._sets]
        return sum(found) / len(found)

    def _measure(
        self, examples: EvalSet, versions: Mapping[str, Trainable], frozen: Frozen
    ) -> dict[tuple[str, int, int], float]:
        """Returns mean losses by version, number of given frames and number of the quantile."""
        sums: defaultdict[tuple[str, int, int], float] = defaultdict(float)
        counts: defaultdict[int, float] = defaultdict(float)

        def add(losses: dict[tuple[str, int, int], Array], weight_AB: np.ndarray) -> None:
            for key, loss_AB in losses.items():
                sums[key] += float(np.sum(np.asarray(loss_AB, np.float64) * weight_AB))

        waiting = None  # the device computes one batch while the next is read
        for bucket, batch in examples:
            given = [frames for frames in self._given if frames < bucket.latent_TYX[0]]
            for frames in given:
                counts[frames] += float(batch.weight_AB.sum())
            losses = dict(self._dispatch(bucket, batch, versions, frozen, given))
            if waiting is not None:
                add(*waiting)
            waiting = losses, batch.weight_AB
        if waiting is not None:
            add(*waiting)
        return {key: total / counts[key[1]] for key, total in sums.items()}

    def _dispatch(
        self,
        bucket: Bucket,
        examples: EvalBatch,
        versions: Mapping[str, Trainable],
        frozen: Frozen,
        given: list[int],
    ) -> Iterator[tuple[tuple[str, int, int], Array]]:
        grid = np.asarray(self._make_grid(bucket))
        batch, name_AB = put_examples(
            (examples.batch, examples.name_AB), self._mesh, total=examples.name_AB.shape[1]
        )
        losses = self._losses or self._compile(versions[""], frozen)
        self._losses = losses
        for number in range(NUM_QUANTILES):
            sigma = grid[(number + 1) * len(grid) // (NUM_QUANTILES + 1)]
            for suffix, trainable in versions.items():
                for frames in given:
                    scalars = (np.float32(sigma), np.int32(number), np.int32(frames))
                    where = put(scalars, self._sharding)
                    yield (
                        (suffix, frames, number),
                        losses(trainable, frozen, batch, name_AB, *where),
                    )

    def _compile(self, trainable: Trainable, frozen: Frozen) -> Callable[..., Array]:
        """Compiles ``eval_losses``; on several devices each computes those of its examples."""
        compute = self._compute
        if self._mesh.size > 1:
            everywhere, examples = self._sharding.spec, of_examples(self._mesh).spec
            weights = specs_of(trainable), specs_of(frozen)
            compute = jax.shard_map(
                partial(compute, shards=shards_of(self._mesh)),
                mesh=self._mesh,
                in_specs=(*weights, examples, examples, everywhere, everywhere, everywhere),
                out_specs=examples,
                check_vma=False,
            )
        return jax.jit(compute, out_shardings=self._sharding)


def eval_losses(
    trainable: Trainable,
    frozen: Frozen,
    batch: Batch,
    name_AB: UInt[Array, "A B"],
    sigma: Float[Array, ""],
    draw: Int[Array, ""],
    num_given: Int[Array, ""],
    *,
    graphdef: nnx.GraphDef,
    settings: StepSettings,
    shards: Shards = ONE_DEVICE,
) -> Float[Array, "A B"]:
    """Returns the loss of each example at one noise level, without dropout.

    Args:
        trainable: the weights to evaluate.
        frozen: the base weights.
        batch: see ``Batch``.
        name_AB: of each example; its noise is a function of this and ``draw``.
        sigma: noise level of the frames that are not given.
        draw: number of the noise.
        num_given: so many first latent frames stay clean and out of the loss.
        graphdef: structure of the model.
        settings: the loss.
        shards: see ``WanTransformer``.
    """
    shape_TYXC = batch.latents_ABTYXC.shape[2:]
    weight_T = jnp.where(jnp.arange(shape_TYXC[0]) < num_given, 0.0, 1.0)

    def draw_noise(name: Array) -> Draws:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(_SEED), name), draw)
        noise_TYXC = jax.random.normal(key, shape_TYXC, jnp.float32)
        return Draws(noise_TYXC, sigma * weight_T, weight_T)

    def measure(micro: tuple[Array, Array, Array | None, Array]) -> Array:
        latents_BTYXC, text_BSE, mask_BYX, name_B = micro
        _, loss_B = loss_fn(
            trainable,
            frozen,
            latents_BTYXC,
            text_BSE,
            jax.vmap(draw_noise)(name_B),
            mask_BYX,
            graphdef=graphdef,
            settings=settings,
            shards=shards,
        )
        return loss_B

    micros = (*jax.tree.map(jnp.asarray, batch), name_AB)
    if len(name_AB) == 1:
        return measure(jax.tree.map(lambda leaf: leaf[0], micros))[None]
    return jax.lax.map(measure, micros)


def _name_curves(found: Mapping[tuple[str, int, int], float], suffix: str) -> dict[str, float]:
    curves = {}
    for frames, curve in ((_T2V, "loss"), (_I2V, "loss_i2v")):
        losses = [found[key] for key in sorted(found) if key[:2] == (suffix, frames)]
        if losses and frames == _T2V:
            curves = {
                f"loss_quantile_{quantile:.2f}": loss
                for quantile, loss in zip(QUANTILES, losses, strict=True)
            }
        if losses:
            curves[curve] = sum(losses) / len(losses)
    return curves
