"""AdamW with clipping and warm-up, on float32 masters."""

import optax


def warmup_constant(lr: float, warmup_steps: int) -> optax.Schedule:
    """Ramps from lr / warmup_steps at the first step to lr, as diffusion-pipe does, then stays."""
    if warmup_steps == 0:
        return optax.constant_schedule(lr)
    return optax.linear_schedule(lr / warmup_steps, lr, warmup_steps)


def make_optimizer(
    lr: float,
    *,
    warmup_steps: int,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """Clips the global norm (0 turns that off), then AdamW; decays every adapter matrix."""
    adamw = optax.adamw(
        warmup_constant(lr, warmup_steps),
        b1=betas[0],
        b2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
    )
    if max_grad_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)
