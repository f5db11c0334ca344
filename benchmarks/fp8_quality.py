"""Does training on float8 weights and matmuls go where training in bfloat16 goes?

``gradients`` compares the gradient of every adapter matrix at the 5B sizes, one by one: random
bfloat16 weights, the same weights quantised, adapters whose B is not zero, one clip, the same
draws. It fails if a layer's cosine is under 0.99. ``curve`` trains on a few synthetic clips with
several seeds (adapter and draws) in both, and fails if a float8 curve leaves the bfloat16 curve of
its seed by more than bfloat16 curves of different seeds differ. Both end in one line of JSON.

    python benchmarks/fp8_quality.py gradients --bucket 512x512x33 --seeds 0 1 2 --out gradients
    python benchmarks/fp8_quality.py curve --bucket 512x512x33 --out curve
    python benchmarks/fp8_quality.py curve --tiny --bucket 64x64x5 --out curve   # on a CPU
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw
from random_model import (
    I2V_FRACTION,
    TINY,
    add_lora,
    build_grad,
    build_step,
    make_model,
    place,
    read_policy,
)

from wan22_jax.batch import Batch
from wan22_jax.geometry import Bucket, check_bucket
from wan22_jax.model.flow import sigma_grid
from wan22_jax.model.transformer import TI2V_5B, TransformerConfig
from wan22_jax.sharding import claim_gpu, make_mesh, replicated
from wan22_jax.training.draws import TaskMix, draw_example
from wan22_jax.training.optimizer import make_optimizer
from wan22_jax.training.step import init_state, split_model

LEAST_COSINE = 0.99
STD_B = 0.03  # of the B matrices: adapters that add a tenth to what their linear puts out
BASE_SEED, CLIP_SEED = 1000, 2000
NUM_CLIPS = 8
NUM_WAVES = 6  # that a clip is made of
NUM_TEXT = 64  # rows of a caption; the rest is zero
WINDOW = 20  # steps in the running mean of a curve


class Agreement(NamedTuple):
    """How one adapter matrix of one layer fares."""

    seed: int
    layer: int
    name: str
    dot: float
    norm: float  # in float8
    reference_norm: float  # in bfloat16

    @property
    def cosine(self) -> float:
        """0 if a gradient is zero: it agrees with nothing."""
        return self.dot / (self.norm * self.reference_norm) if self.dot else 0.0

    @property
    def norm_ratio(self) -> float:
        """float8 / bfloat16."""
        return self.norm / self.reference_norm if self.reference_norm else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", choices=("gradients", "curve"))
    parser.add_argument("--bucket", default="512x512x33", help="width x height x frames")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--activation_checkpointing", type=read_policy, default=True)
    parser.add_argument("--sharpness", type=float, default=1.0, help="see random_model.make_model")
    parser.add_argument("--steps", type=int, default=200, help="of a curve")
    parser.add_argument("--lr", type=float, default=3e-4, help="of a curve")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and picture")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to check the program")
    args = parser.parse_args()
    claim_gpu()
    args.config = TINY if args.tiny else TI2V_5B
    args.bucket = check_bucket(Bucket(*map(int, args.bucket.split("x"))), source="--bucket")
    args.out.mkdir(parents=True, exist_ok=True)
    verdict = check_gradients(args) if args.check == "gradients" else check_curve(args)
    about = {
        "check": args.check,
        "bucket": str(args.bucket),
        "seeds": args.seeds,
        "sharpness": args.sharpness,
        "activation_checkpointing": args.activation_checkpointing,
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
    }
    text = json.dumps(about | verdict)
    (args.out / f"{args.check}.json").write_text(text + "\n")
    print("RESULT " + text, flush=True)
    sys.exit(0 if verdict["passed"] else 1)


# Gradients


def check_gradients(args: argparse.Namespace) -> dict[str, Any]:
    """Compares the gradients of all seeds; writes a line a matrix and prints each kind's worst."""
    # bfloat16 first, for all seeds, so that the device holds one model at a time.
    references = list(adapter_gradients("bfloat16", args))
    found: list[Agreement] = []
    for seed, reference, gradient in zip(
        args.seeds, references, adapter_gradients("float8", args), strict=True
    ):
        found += compare_gradients(reference, gradient, seed=seed)
    with (args.out / "gradients.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow([*Agreement._fields, "cosine"])
        writer.writerows([*one, one.cosine] for one in found)
    for name in sorted({one.name for one in found}):
        cosines = [one.cosine for one in found if one.name == name]
        print(f"{name:40} cosine min {min(cosines):.5f}, median {np.median(cosines):.5f}")
    return judge_gradients(found)


def adapter_gradients(dtype: str, args: argparse.Namespace) -> Iterator[dict[str, np.ndarray]]:
    """Yields a seed's gradients by name, with the layers as leading axis."""
    config, bucket, mesh = args.config, args.bucket, make_mesh()
    grad_fn = None
    for seed in args.seeds:
        model = make_model(config, dtype=dtype, seed=seed, sharpness=args.sharpness)
        add_lora(model, seed=seed, std_b=STD_B)
        graphdef, trainable, frozen = split_model(model)
        del model
        policy = args.activation_checkpointing
        frozen = place(frozen, activation_checkpointing=policy, mesh=mesh)
        grad_fn = grad_fn or build_grad(graphdef, activation_checkpointing=policy)
        latents_NTYXC, text_NSE = make_clips(config, bucket, num_clips=1, seed=seed)
        draws = draw_example(
            jax.random.key(seed),
            sigma_grid=jnp.asarray(sigma_grid()),
            shape_TYXC=latents_NTYXC.shape[1:],
            tasks=TaskMix(I2V_FRACTION),
        )
        draws = jax.tree.map(lambda leaf: leaf[None], draws)
        loss, gradient = grad_fn(trainable, frozen, latents_NTYXC, text_NSE, draws)
        print(f"{dtype}, seed {seed}: loss {float(loss):.5f}", flush=True)
        yield {
            ".".join(map(str, path)).removeprefix("blocks."): np.asarray(leaf[...])
            for path, leaf in nnx.to_flat_state(gradient)
        }
        del trainable, frozen, gradient


def compare_gradients(
    reference: dict[str, np.ndarray], gradient: dict[str, np.ndarray], *, seed: int
) -> list[Agreement]:
    """Compares each layer of each matrix."""
    assert reference.keys() == gradient.keys()
    found = []
    for name, layers in reference.items():
        for layer, (ours, theirs) in enumerate(zip(gradient[name], layers, strict=True)):
            a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
            norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
            found.append(Agreement(seed, layer, name, float(a @ b), *norms))
    return found


def judge_gradients(found: Sequence[Agreement]) -> dict[str, Any]:
    """Sums the comparison up; passed if every layer's adapters have a cosine of 0.99."""
    cosines = np.array([one.cosine for one in found])
    ratios = np.array([one.norm_ratio for one in found])
    worst = found[int(np.argmin(cosines))]
    layers = [join_layer(found, seed, layer) for seed, layer in {one[:2] for one in found}]
    return {
        "matrices": len(found) // len({one.seed for one in found}),
        "min_cosine": round(float(cosines.min()), 6),
        "median_cosine": round(float(np.median(cosines)), 6),
        "min_layer_cosine": round(min(layer.cosine for layer in layers), 6),
        "under": int(np.sum(cosines < LEAST_COSINE)),
        "worst": f"seed {worst.seed}, layer {worst.layer}, {worst.name}",
        "norm_ratio": [round(float(value), 5) for value in np.quantile(ratios, [0, 0.5, 1])],
        "passed": bool(
            np.isfinite(cosines).all() and min(layer.cosine for layer in layers) >= LEAST_COSINE
        ),
    }


def join_layer(found: Sequence[Agreement], seed: int, layer: int) -> Agreement:
    """Compares a layer's gradients taken as one vector."""
    parts = [one for one in found if one[:2] == (seed, layer)]
    norms = (math.hypot(*(getattr(one, n) for one in parts)) for n in ("norm", "reference_norm"))
    return Agreement(seed, layer, "all", math.fsum(one.dot for one in parts), *norms)


# Curves


def check_curve(args: argparse.Namespace) -> dict[str, Any]:
    """Trains in both; writes every loss and a picture of the running means."""
    if args.steps < 2 * WINDOW or len(args.seeds) < 2:
        sys.exit(f"a curve needs {2 * WINDOW} steps or more, and two seeds or more")
    losses = {dtype: train_curves(dtype, args) for dtype in ("bfloat16", "float8")}
    columns = [f"{dtype}_{seed}" for dtype in losses for seed in args.seeds]
    table = np.concatenate(list(losses.values())).T
    with (args.out / "curve.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        writer.writerows([step + 1, *map(float, row)] for step, row in enumerate(table))
    draw_curves({dtype: running_mean(curves) for dtype, curves in losses.items()}).save(
        args.out / "curve.png"
    )
    return judge_curves(losses["bfloat16"], losses["float8"])


def train_curves(dtype: str, args: argparse.Namespace) -> np.ndarray:
    """Trains an adapter from scratch for each seed; returns the losses [seeds, steps]."""
    config, mesh = args.config, make_mesh()
    sharding = replicated(mesh)
    model = make_model(config, dtype=dtype, seed=BASE_SEED, sharpness=args.sharpness)
    optimizer = make_optimizer(
        args.lr, warmup_steps=20, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8, max_grad_norm=1.0
    )
    latents_NTYXC, text_NSE = make_clips(config, args.bucket, num_clips=NUM_CLIPS, seed=CLIP_SEED)
    batches = [
        jax.device_put(Batch(latents_NTYXC[None, [clip]], text_NSE[None, [clip]]), sharding)
        for clip in range(NUM_CLIPS)
    ]
    grid = jax.device_put(sigma_grid(), sharding)
    step = frozen = None
    losses = []
    for seed in args.seeds:
        add_lora(model, seed=seed)
        graphdef, trainable, rest = split_model(model)
        if step is None:
            policy = args.activation_checkpointing
            step = build_step(graphdef, optimizer, activation_checkpointing=policy, mesh=mesh)
            frozen = place(rest, activation_checkpointing=policy, mesh=mesh)
        state, key = jax.device_put(
            (init_state(trainable, optimizer), jax.random.key(seed)), sharding
        )
        curve = []
        for number in range(args.steps):
            state, metrics = step(state, frozen, batches[number % NUM_CLIPS], key, grid)
            curve.append(metrics["loss"])
        losses.append(np.array(jax.device_get(curve)))
        ends = running_mean(losses[-1:])[0, [0, -1]]
        print(f"{dtype}, seed {seed}: loss {ends[0]:.4f} -> {ends[1]:.4f}", flush=True)
    return np.array(losses)


def judge_curves(bfloat16: np.ndarray, float8: np.ndarray) -> dict[str, Any]:
    """Sums the curves [seeds, steps] up.

    Passed if no running mean of float8 is further from the bfloat16 one of its seed, which has the
    same adapter, clips and draws, than bfloat16 curves of different seeds are apart on average;
    and if bfloat16 has learned something, without which agreement would mean nothing.
    """
    smooth16, smooth8 = running_mean(bfloat16), running_mean(float8)
    low, high = smooth16.min(axis=0), smooth16.max(axis=0)
    spread = float(np.mean(high - low))
    difference = np.abs(smooth8 - smooth16)
    mean8 = smooth8.mean(axis=0)
    learned = float(np.mean(smooth16[:, 0] - smooth16[:, -1]))
    return {
        "steps": bfloat16.shape[1],
        "window": WINDOW,
        "seed_to_seed_spread": round(spread, 6),
        "largest_difference": round(float(difference.max()), 6),
        "mean_difference": round(float(difference.mean()), 6),
        "mean_curve_inside": round(float(np.mean((low <= mean8) & (mean8 <= high))), 3),
        "bfloat16_loss": [round(float(smooth16[:, end].mean()), 5) for end in (0, -1)],
        "float8_loss": [round(float(smooth8[:, end].mean()), 5) for end in (0, -1)],
        "passed": bool(difference.max() <= spread < learned),
    }


def running_mean(curves: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Means over windows of 20 steps, [curves, steps - 19]."""
    window = np.ones(WINDOW) / WINDOW
    return np.array([np.convolve(curve, window, mode="valid") for curve in curves])


def make_clips(
    config: TransformerConfig, bucket: Bucket, *, num_clips: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws bfloat16 latents [N, T, Y, X, C] of a few smooth moving waves, and their texts.

    Each wave has one pattern of channels, so a clip is of low rank and can be learned; like real
    latents it has about unit variance.
    """
    rng = np.random.default_rng(seed)
    axes = [np.arange(size) / max(size, 8) for size in bucket.latent_TYX]
    T, Y, X = np.meshgrid(*axes, indexing="ij")
    clips, texts = [], []
    for _ in range(num_clips):
        frequency = rng.uniform(-3, 3, (NUM_WAVES, 3)) * 2 * np.pi
        phase = rng.uniform(0, 2 * np.pi, NUM_WAVES)
        angle = np.stack([T, Y, X], axis=-1) @ frequency.T + phase
        clip = np.cos(angle) @ rng.standard_normal((NUM_WAVES, config.in_channels))
        clips.append(clip / clip.std())
        text = np.zeros((config.text_len, config.text_dim))
        num_rows = min(NUM_TEXT, config.text_len)
        text[:num_rows] = rng.standard_normal((num_rows, config.text_dim))
        texts.append(text)
    return np.array(clips).astype(jnp.bfloat16), np.array(texts).astype(jnp.bfloat16)


def draw_curves(curves: dict[str, np.ndarray], *, width: int = 960, height: int = 540) -> Any:
    """Draws the running means: bfloat16 broad and light, float8 thin on top of it."""
    pens = {"bfloat16": ("#8fb8f0", 7), "float8": ("#b02010", 1)}
    every = np.concatenate(list(curves.values()))
    low, high = float(every.min()), float(every.max())
    left, right, top, bottom = 70, width - 20, 30, height - 40
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    def place_point(step: int, loss: float) -> tuple[float, float]:
        x = left + (right - left) * step / (every.shape[1] - 1)
        return x, bottom - (bottom - top) * (loss - low) / max(high - low, 1e-12)

    for part in np.linspace(0, 1, 6):
        loss = low + part * (high - low)
        step = round(part * (every.shape[1] - 1))
        draw.line([place_point(0, loss), (right, place_point(0, loss)[1])], fill="#dddddd")
        draw.text((8, place_point(0, loss)[1] - 6), f"{loss:.4f}", fill="black")
        draw.text((place_point(step, low)[0] - 8, bottom + 8), str(step + WINDOW), fill="black")
    draw.text((left, height - 18), f"step; loss is the mean of {WINDOW} steps", fill="black")
    for number, (dtype, group) in enumerate(curves.items()):
        draw.text((left + 120 * number, 8), f"{dtype} ({len(group)})", fill=pens[dtype][0])
        for curve in group:
            points = [place_point(step, float(loss)) for step, loss in enumerate(curve)]
            draw.line(points, fill=pens[dtype][0], width=pens[dtype][1], joint="curve")
    return picture


if __name__ == "__main__":
    main()
