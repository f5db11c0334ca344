"""What is due after a step?"""

from wan22_jax.config import TrainConfig


def is_due(
    config: TrainConfig, step: int, epoch: int, ends_epoch: bool, minutes_since_save: float
) -> bool:
    """Whether the config asks for a checkpoint after this step."""
    every = (config.save_every_n_steps, config.checkpoint_every_n_steps)
    if any(n is not None and step % n == 0 for n in every):
        return True
    every = (config.save_every_n_epochs, config.checkpoint_every_n_epochs)
    if ends_epoch and any(n is not None and epoch % n == 0 for n in every):
        return True
    minutes = config.checkpoint_every_n_minutes
    return minutes is not None and minutes_since_save >= minutes


def eval_is_due(config: TrainConfig, step: int, epoch: int, ends_epoch: bool) -> bool:
    """Whether the config asks for an evaluation after this step."""
    every = [config.eval_every_n_steps]
    if (examples := config.eval_every_n_examples) is not None:
        per_step = config.micro_batch * config.gradient_accumulation_steps
        every.append(max(examples // per_step, 1))  # 0 would never come in diffusion-pipe
    if any(n is not None and step % n == 0 for n in every):
        return True
    epochs = config.eval_every_n_epochs
    return ends_epoch and epochs is not None and epoch % epochs == 0
