"""How long does a LoRA train step take at real size, and how much memory?

Random weights of the 5B shapes, batch 1, rank 32 on all ten linears of each block, AdamW; steps as
wan22-train runs them, but for reading clips. Prints one line of JSON.

    python benchmarks/train_step.py --bucket 1280x704x121
"""

import argparse
import json
import statistics
import time

from wan22_jax.sharding import claim_gpu, make_mesh, replicated

claim_gpu()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from wan22_jax.batch import Batch  # noqa: E402
from wan22_jax.geometry import Bucket  # noqa: E402
from wan22_jax.model.flow import sigma_grid  # noqa: E402
from wan22_jax.model.transformer import TI2V_5B, WanTransformer  # noqa: E402
from wan22_jax.training.optimizer import make_optimizer  # noqa: E402
from wan22_jax.training.step import (  # noqa: E402
    compile_train_step,
    init_state,
    split_model,
)
from wan22_jax.weights import set_parameters, stacked_shapes, stored_dtype  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bucket", default="1280x704x121", help="width x height x frames")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    bucket = Bucket(*map(int, args.bucket.split("x")))

    sharding = replicated(make_mesh())
    graphdef, trainable, frozen = split_model(make_model())
    optimizer = make_optimizer(
        1e-4, warmup_steps=0, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8, max_grad_norm=1.0
    )
    state, frozen, grid, key = jax.device_put(
        (init_state(trainable, optimizer), frozen, sigma_grid(), jax.random.key(0)), sharding
    )
    del trainable
    step = compile_train_step(graphdef, optimizer, i2v_fraction=0.2, remat=True, sharding=sharding)
    rng = np.random.default_rng(0)
    lead = (1, args.batch)
    batch = Batch(
        rng.standard_normal((*lead, *bucket.latent_TYX, 48), np.float32).astype(jnp.bfloat16),
        rng.standard_normal((*lead, 512, 4096), np.float32).astype(jnp.bfloat16),
    )
    batch = jax.device_put(batch, sharding)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch, key, grid)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    stats = jax.local_devices()[0].memory_stats() or {}
    result = {
        "ours": args.bucket,
        "tokens": bucket.num_tokens * args.batch,
        "step_s": round(statistics.median(seconds[1:]), 4),
        "first_s": round(seconds[0], 1),
        "peak_gb": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
        "loss": round(loss, 4),
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print("RESULT " + json.dumps(result), flush=True)


def make_model() -> WanTransformer:
    """Draws bfloat16 weights on the device, each entry by itself."""
    model = nnx.eval_shape(lambda: WanTransformer(TI2V_5B, rngs=nnx.Rngs(0)))
    arrays = {}
    for number, (name, shape) in enumerate(stacked_shapes(model).items()):
        key = jax.random.fold_in(jax.random.key(1), number)
        draw = jax.random.normal(key, shape, stored_dtype(name, jnp.bfloat16))
        is_norm = "norm" in name and name.endswith("weight")
        arrays[name] = 1 + 0 * draw if is_norm else draw * float(0.5 / np.sqrt(shape[-1]))
        assert arrays[name].dtype == draw.dtype, name  # a float32 model would take another path
    set_parameters(model, arrays)
    model.add_lora(jax.random.key(2), rank=32, alpha=32.0)
    return model


if __name__ == "__main__":
    main()
