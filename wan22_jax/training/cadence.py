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
