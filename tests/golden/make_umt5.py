"""Makes umt5.npz: a tiny random umT5 and its embeddings, computed by Hugging Face transformers.

    python tests/golden/make_umt5.py [--check]

The arrays: ``weight/<official name>``; ``tokens``, ``mask`` (rows of uneven length, long enough for
the furthest position bucket); ``text``, the reference's embeddings at the unmasked positions;
``buckets``, its bucket for every offset key - query from -OFFSET to OFFSET.
"""

import re
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("umt5.npz")
SIZES = {"vocab_size": 40, "dim": 24, "ffn_dim": 40, "num_heads": 3, "num_layers": 3}
LENGTHS = (160, 45, 1)
OFFSET = 600


def make_arrays() -> dict[str, np.ndarray]:
    """Draws weights and tokens from a fixed seed and runs the reference on them."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=SIZES["vocab_size"],
        d_model=SIZES["dim"],
        d_kv=SIZES["dim"] // SIZES["num_heads"],
        d_ff=SIZES["ffn_dim"],
        num_heads=SIZES["num_heads"],
        num_layers=SIZES["num_layers"],
        attn_implementation="eager",
    )
    # float64, so that the arrays are the same on every machine.
    model = UMT5EncoderModel(config).eval().double()
    rng = np.random.default_rng(20)
    weights = {
        name: draw_weight(name, tuple(tensor.shape), rng)
        for name, tensor in sorted(model.state_dict().items())
        if name != "encoder.embed_tokens.weight"  # tied to shared.weight
    }
    tied = {"encoder.embed_tokens.weight": weights["shared.weight"]}
    model.load_state_dict({k: torch.from_numpy(v).double() for k, v in (weights | tied).items()})

    mask = np.arange(max(LENGTHS))[None, :] < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, rng.integers(1, SIZES["vocab_size"], mask.shape), 0)
    with torch.no_grad():
        text = model(torch.from_numpy(tokens), torch.from_numpy(mask)).last_hidden_state.numpy()
    attention = model.encoder.block[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(torch.arange(-OFFSET, OFFSET + 1)).numpy()
    return {
        "tokens": tokens.astype(np.int32),
        "mask": mask,
        "text": text[mask].astype(np.float32),
        "buckets": buckets.astype(np.int32),
        **{f"weight/{official_name(name)}": weight for name, weight in weights.items()},
    }


def draw_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws weights that make every part of the network count: biases, norms and attention."""
    weight = rng.standard_normal(shape, np.float32)
    if name.endswith("layer_norm.weight"):
        return 1 + np.float32(0.3) * weight
    if "relative_attention_bias" in name or name == "shared.weight":
        return weight
    return weight / np.float32(shape[1] ** 0.5)


def official_name(name: str) -> str:
    """Turns a name of transformers into the one of the official checkpoint."""
    name = re.sub(r"^encoder\.block\.(\d+)\.", r"blocks.\1.", name)
    for theirs, official in (
        ("shared.", "token_embedding."),
        ("encoder.final_layer_norm.", "norm."),
        ("layer.0.layer_norm.", "norm1."),
        ("layer.0.SelfAttention.relative_attention_bias.", "pos_embedding.embedding."),
        ("layer.0.SelfAttention.", "attn."),
        ("layer.1.layer_norm.", "norm2."),
        ("layer.1.DenseReluDense.wi_0.", "ffn.gate.0."),
        ("layer.1.DenseReluDense.wi_1.", "ffn.fc1."),
        ("layer.1.DenseReluDense.wo.", "ffn.fc2."),
    ):
        name = name.replace(theirs, official)
    return name


if __name__ == "__main__":
    from golden_file import write_or_check

    raise SystemExit(write_or_check(GOLDEN, make_arrays(), about=__doc__))
