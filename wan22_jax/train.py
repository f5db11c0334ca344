"""wan22-train: trains a LoRA, or all weights, on cached clips. The story of a run, read downwards.

Step k trains on ``loader[k]`` with draws made from (seed, k), so a run that stopped goes on from
its checkpoint as if it had not: the step number is all that has to be known.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from wan22_jax.checkpoint import open_checkpoints, restore_state, save_state
from wan22_jax.config import list_ignored, load_config
from wan22_jax.errors import run_command
from wan22_jax.evaluation import evaluate, make_evaluator, open_eval_sets
from wan22_jax.examples import make_grid, open_loader
from wan22_jax.geometry import Bucket
from wan22_jax.model_folder import (
    choose_transformer_dtype,
    read_model_card,
)
from wan22_jax.monitoring import open_progress
from wan22_jax.run_folder import describe_run, open_run
from wan22_jax.sharding import (
    claim_gpu,
    describe_peak_memory,
    keep_compiled,
    make_mesh,
    replicated,
)
from wan22_jax.start import choose_optimizer, plan_memory, start_training
from wan22_jax.training.cadence import eval_is_due, is_due
from wan22_jax.training.memory import explain_exhaustion
from wan22_jax.training.metrics import StepReport
from wan22_jax.training.optimizer import make_optimizer, warmup_constant
from wan22_jax.training.step import (
    StepSettings,
    compile_train_step,
    split_seed,
)
from wan22_jax.watch import add_watch_arguments, watch

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-train", description=__doc__)
    parser.add_argument("--config", type=Path, help="the training TOML file")
    add_watch_arguments(parser)
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        default=None,
        metavar="RUN",
        help="go on with a run: its folder's name, or the newest run if left out",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override config keys")
    args = parser.parse_intermixed_args(argv)
    logger = logging.getLogger("wan22_jax")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    logger.propagate = False  # a library may have set up the root logger in its own format
    for name in ("absl", "asyncio"):  # Orbax logs, page by page, what it raises anyway
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if args.status or args.report:
        return run_command(lambda: watch(args))
    if args.config is None:
        parser.error("--config is needed to train")
    overrides, resume = args.overrides, args.resume_from_checkpoint
    if isinstance(resume, str) and "=" in resume:  # the flag without a value, then an override
        overrides, resume = [resume, *overrides], True
    return run_command(lambda: train(args.config, overrides, resume=resume))


def train(
    config_file: Path, overrides: Sequence[str] = (), *, resume: bool | str | None = None
) -> Path:
    """Trains as the config says; returns the run folder.

    Args:
        config_file: the main TOML.
        overrides: ``key.path=value`` strings.
        resume: a run's name, True for the newest; None leaves it to the config.

    Raises:
        BadInput: config, model, cache and checkpoint do not fit together, or memory runs out.
    """
    claim_gpu()  # before Orbax reads a checkpoint's meta, which may start JAX's backend
    keep_compiled()
    config = load_config(config_file, overrides)
    resume = config.resume_from_checkpoint if resume is None else resume
    model_folder = Path(config.model.ckpt_path)
    card = read_model_card(model_folder)
    dtype = choose_transformer_dtype(
        model_folder,
        card,
        dtype=config.model.dtype,
        transformer_dtype=config.model.transformer_dtype,
    )
    loader = open_loader(config, card)
    for line in [*list_ignored(config), *loader.report]:
        log.info("%s", line)
    log.info("%d steps an epoch", loader.steps_per_epoch)
    eval_sets = open_eval_sets(config, card)
    for name, examples in eval_sets.items():
        log.info("evaluation set %s: %d examples", name, len(examples))
    total_steps = min(config.epochs * loader.steps_per_epoch, config.max_steps or sys.maxsize)
    meta = describe_run(config, card, loader)
    run_dir = open_run(config, config_file, resume=resume, meta=meta)

    sharding = replicated(make_mesh())
    log.info("devices: %s (the first one trains)", ", ".join(map(str, jax.local_devices())))
    lora_key, draw_key = split_seed(config.seed)
    inner = make_optimizer(
        config.learning_rate,
        warmup_steps=config.warmup_steps,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        weight_decay=config.optimizer.weight_decay,
        eps=config.optimizer.eps,
        max_grad_norm=config.gradient_clipping if config.adapter else 0.0,
    )
    optimizer = choose_optimizer(config, inner)
    plan = plan_memory(config, card, optimizer, dtype=dtype)
    what = f"frozen weights: {dtype}" if config.adapter else "all weights train"
    log.info("%s, from %s of %s", what, model_folder, card.dtype)
    log.info("memory: %s", plan)
    with explain_exhaustion(plan):
        graphdef, optimizer, state, frozen = start_training(
            config,
            model_folder,
            optimizer,
            dtype=dtype,
            lora=meta,
            key=lora_key,
            sharding=sharding,
        )
        draw_key = jax.device_put(draw_key, sharding)
    train_step = compile_train_step(
        graphdef,
        optimizer,
        StepSettings(
            config.tasks,
            config.penalty,
            activation_checkpointing=config.activation_checkpointing,
        ),
        sharding=sharding,
        opt_shardings=jax.tree.map(lambda leaf: leaf.sharding, state.opt_state),
    )
    evaluator = make_evaluator(
        config, eval_sets, graphdef=graphdef, frozen=frozen, sharding=sharding
    )
    schedule = warmup_constant(config.learning_rate, config.warmup_steps)

    with open_checkpoints(run_dir) as checkpoints:
        if resume:
            state, _ = restore_state(checkpoints, state)
        first_step = int(state.step)
        log.info("run %s: %d steps done, of %d", run_dir, first_step, total_steps)
        if first_step >= total_steps:
            log.info("nothing is left to do; raise epochs or max_steps to train on")
        progress = open_progress(
            config,
            run_dir,
            steps_per_epoch=loader.steps_per_epoch,
            model=card.transformer,
            schedule=schedule,
            first_step=first_step,
            total_steps=total_steps,
        )
        saved_at, saved_step = time.monotonic(), first_step
        grids: dict[Bucket, jax.Array] = {}
        with progress:
            if evaluator and config.eval_before_first_step and not resume:
                evaluate(evaluator, state, progress, first_step)
            for step, item in zip(
                range(first_step, total_steps), loader.iterate(first_step), strict=False
            ):
                is_new = item.bucket not in grids
                if is_new:
                    grids[item.bucket] = jax.device_put(make_grid(config, item.bucket), sharding)
                batch = jax.device_put(item.batch, sharding)
                with explain_exhaustion(plan, item.bucket):
                    state, metrics = train_step(state, frozen, batch, draw_key, grids[item.bucket])
                    done, epoch = step + 1, step // loader.steps_per_epoch + 1
                    ends_epoch = done % loader.steps_per_epoch == 0
                    progress.push(
                        StepReport(done, epoch, ends_epoch, item.bucket, metrics, item.clips),
                        new_program=is_new,
                    )
                if evaluator and eval_is_due(config, done, epoch, ends_epoch):
                    evaluate(evaluator, state, progress, done)
                minutes = (time.monotonic() - saved_at) / 60
                if done == total_steps or is_due(config, done, epoch, ends_epoch, minutes):
                    progress.flush()
                    save_state(checkpoints, state, meta)
                    progress.say(f"step {done}: saving {checkpoints.directory / str(done)}")
                    saved_at, saved_step = time.monotonic(), done
    log.info("%s", describe_peak_memory())
    log.info("done: %d steps, last checkpoint %s/checkpoints/%d", saved_step, run_dir, saved_step)
    return run_dir


if __name__ == "__main__":
    sys.exit(main())
