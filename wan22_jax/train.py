"""wan22-train: trains a LoRA, or all weights, on cached clips. The story of a run, read downwards.

Step k trains on ``loader[k]`` with draws made from (seed, k), so a run that stopped goes on from
its checkpoint as if it had not: the step number is all that has to be known.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from wan22_jax.checkpoint import open_checkpoints
from wan22_jax.config import list_ignored, load_config
from wan22_jax.errors import run_command
from wan22_jax.evaluation import evaluate, make_evaluator, open_eval_sets
from wan22_jax.examples import count_tokens, make_grid, open_loader, open_training_caches
from wan22_jax.geometry import Bucket
from wan22_jax.model_folder import choose_transformer_dtype, read_model_card
from wan22_jax.monitoring import open_progress
from wan22_jax.previews import Previewer, prepare_previews, read_previews
from wan22_jax.processes import add_process_arguments, run_together
from wan22_jax.resuming import NOTHING, Reset, resume_state
from wan22_jax.run_folder import describe_run, open_run
from wan22_jax.saving import Saver, name_checkpoint
from wan22_jax.sharding import (
    claim_gpu,
    describe_peak_memory,
    keep_compiled,
    own_examples,
    put,
    put_examples,
    replicated,
)
from wan22_jax.start import (
    check_deterministic,
    choose_optimizer,
    divide_work,
    plan_memory,
    start_training,
)
from wan22_jax.stopping import listen
from wan22_jax.training.cadence import Cadence
from wan22_jax.training.memory import explain_exhaustion
from wan22_jax.training.metrics import StepReport
from wan22_jax.training.optimizer import describe_optimizer, make_optimizer, make_schedule
from wan22_jax.training.retention import make_retention
from wan22_jax.training.step import StepSettings, compile_train_step, split_seed
from wan22_jax.watch import add_watch_arguments, watch

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="wan22-train", description=__doc__)
    parser.add_argument("--config", type=Path, help="the training TOML file")
    add_watch_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        default=None,
        metavar="RUN",
        help="go on with a run: its folder's name, or the newest run if left out",
    )
    for flag, what in (
        ("optimizer", "go on with fresh moments and a fresh schedule of the learning rate"),
        ("optimizer_params", "go on with the moments, but restart the schedule"),
        ("dataloader", "go on from the start of the epoch"),
    ):
        parser.add_argument(f"--reset_{flag}", action="store_true", help=what)
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
    reset = Reset(args.reset_optimizer, args.reset_optimizer_params, args.reset_dataloader)
    return run_together(args, lambda: train(args.config, overrides, resume=resume, reset=reset))


def train(
    config_file: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool | str | None = None,
    reset: Reset = NOTHING,
) -> Path:
    """Trains as the config says; returns the run folder.

    Args:
        config_file: the main TOML.
        overrides: ``key.path=value`` strings.
        resume: a run's name, True for the newest; None leaves it to the config.
        reset: what starts anew where a run goes on.

    Raises:
        BadInput: config, model, cache and checkpoint do not fit together, memory runs out, or
            what was trained cannot be saved.
    """
    config = load_config(config_file, overrides)
    previews = read_previews(config, config_file)
    claim_gpu(  # before anything starts JAX's backend
        deterministic=config.deterministic, counts_host=config.adapter is None
    )
    check_deterministic(config)
    keep_compiled()
    resume = config.resume_from_checkpoint if resume is None else resume
    model_folder = Path(config.model.ckpt_path)
    card = read_model_card(model_folder)
    dtype = choose_transformer_dtype(
        model_folder,
        card,
        dtype=config.model.dtype,
        transformer_dtype=config.model.transformer_dtype,
    )
    caches = open_training_caches(config, card)
    tokens = count_tokens(config, caches)
    config, mesh = divide_work(config, card, dtype=dtype, num_tokens=tokens)
    sharding, own = replicated(mesh), own_examples(mesh)
    loader = open_loader(config, caches, own=(own, config.parallel.split.batch_shards))
    for line in [*list_ignored(config), *loader.report]:
        log.info("%s", line)
    log.info("%d steps an epoch", loader.steps_per_epoch)
    eval_sets = open_eval_sets(config, card)
    for name, examples in eval_sets.items():
        log.info("evaluation set %s: %d examples", name, len(examples))
    cadence = Cadence(config, examples_per_step=config.global_batch)
    retention = make_retention(config)
    meta = describe_run(config, card, loader)
    run = open_run(config, config_file, resume=resume, meta=meta, reset=reset)
    first_step, offset = run.start.step, run.start.data_offset
    epochs_end = config.epochs * loader.steps_per_epoch - offset
    total_steps = min(epochs_end, config.max_steps or sys.maxsize)

    lora_key, draw_key = split_seed(config.seed)
    log.info("optimizer: %s", describe_optimizer(config))
    schedule = make_schedule(config, total_steps=total_steps - run.start.schedule_start)
    inner = make_optimizer(
        config.optimizer,
        schedule=schedule,
        gradient_clipping=config.gradient_clipping if config.adapter else 0.0,
        global_batch=config.global_batch,
        lr_ratios=config.lr_ratios,
    )
    optimizer = choose_optimizer(config, inner)
    plan = plan_memory(config, card, optimizer, dtype=dtype)
    what = f"frozen weights: {dtype}" if config.adapter else "all weights train"
    log.info("%s, from %s of %s", what, model_folder, card.dtype)
    log.info("memory: %s", plan)
    prepared = prepare_previews(
        config,
        previews,
        first_step=first_step,
        total_steps=total_steps,
        offset=offset,
        steps_per_epoch=loader.steps_per_epoch,
        is_new=not resume,
    )
    with explain_exhaustion(plan):
        graphdef, optimizer, state, frozen = start_training(
            config,
            model_folder,
            optimizer,
            dtype=dtype,
            key=lora_key,
            is_new=not resume,
            sharding=sharding,
        )
        draw_key = put(draw_key, sharding)
    train_step = compile_train_step(
        graphdef,
        optimizer,
        StepSettings(
            config.tasks,
            config.penalty,
            activation_checkpointing=config.activation_checkpointing,
            skip_nonfinite=config.skip_nonfinite_steps,
            lora_dropout=0.0 if config.adapter is None else config.adapter.dropout,
            ema_decay=config.ema_decay,
        ),
        state=state,
        frozen=frozen,
    )
    evaluator = make_evaluator(
        config, eval_sets, graphdef=graphdef, frozen=frozen, sharding=sharding
    )
    previewer = prepared and Previewer(
        prepared, run.folder, graphdef=graphdef, frozen=frozen, sharding=sharding
    )

    with open_checkpoints(run.folder) as checkpoints:
        if resume:
            state = resume_state(checkpoints, state, step=first_step, reset=reset)
        log.info("run %s: %d steps done, of %d", run.folder, first_step, total_steps)
        if first_step >= total_steps:
            log.info("nothing is left to do; raise epochs or max_steps to train on")
        progress = open_progress(
            config,
            run.folder,
            run.start,
            steps_per_epoch=loader.steps_per_epoch,
            model=card.transformer,
            schedule=schedule,
            total_steps=total_steps,
        )
        saver = Saver(checkpoints, config, config_file.name, run.meta, retention, say=progress.say)
        done = first_step
        grids: dict[Bucket, jax.Array] = {}
        with (
            progress,
            name_checkpoint(checkpoints),
            listen(run.folder) as wishes,
        ):
            if evaluator and config.eval_before_first_step and not resume:
                evaluate(evaluator, state, progress, first_step)
            if previewer and previewer.before_first_step:
                previewer(state, progress, first_step, wishes)
            for step, item in zip(
                range(first_step, total_steps), loader.iterate(first_step + offset), strict=False
            ):
                is_new = item.bucket not in grids
                if is_new:
                    grids[item.bucket] = put(make_grid(config, item.bucket), sharding)
                size = config.batching.micro_batch(item.bucket)
                batch = put_examples(item.batch, mesh, own=own, total=size)
                with explain_exhaustion(plan, item.bucket):
                    state, metrics = train_step(state, frozen, batch, draw_key, grids[item.bucket])
                    done, epoch = step + 1, (step + offset) // loader.steps_per_epoch + 1
                    ends_epoch = (done + offset) % loader.steps_per_epoch == 0
                    progress.push(
                        StepReport(done, epoch, ends_epoch, item.bucket, metrics, item.clips),
                        new_program=is_new,
                    )
                wish, eval_loss = wishes.read(), None
                due = cadence.after(
                    done, epoch, ends_epoch=ends_epoch, ends_run=done == total_steps, late=wish.late
                )
                if due.exports or due.checkpoint or wish.checkpoint:
                    progress.flush()  # the state is saved only if its step was sound
                if evaluator and due.evaluate:
                    eval_loss = evaluate(evaluator, state, progress, done)
                saver.save(state, due, wish, eval_loss=eval_loss)
                wishes.fulfil(wish, late=cadence.is_late())
                if wish.stop:
                    break
                if previewer and due.preview:  # what they do to the run, they do to a saved one
                    previewer(state, progress, done, wishes)
            saver.finish()
    log.info("%s", describe_peak_memory())
    log.info("done: %d steps, %s", done, checkpoints.describe_last())
    if done < total_steps:
        log.info("stopped on request; go on with --resume_from_checkpoint")
    return run.folder


if __name__ == "__main__":
    sys.exit(main())
