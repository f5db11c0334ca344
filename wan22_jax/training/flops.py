"""How many operations does the result of a train step need?"""

from wan22_jax.model.transformer import TransformerConfig


def count_flops(
    config: TransformerConfig, num_tokens: int, *, trains_weights: bool = False
) -> float:
    """Operations of one clip's train step that the result needs; recompute is not counted.

    Linears of the blocks forward, to their input and, where they train, to their weights (text k
    and v and the adapters are left out), attention forward and 2.5 times that backward.

    Args:
        config: sizes of the model.
        num_tokens: of the clip.
        trains_weights: the linears' own weights have a gradient, as in full fine-tuning.
    """
    D, F, S = config.dim, config.ffn_dim, config.text_len
    linears = 2 * num_tokens * (6 * D * D + 2 * D * F)
    attention = 4 * num_tokens * (num_tokens + S) * D
    passes = 3 if trains_weights else 2
    return (passes * linears + 3.5 * attention) * config.num_layers
