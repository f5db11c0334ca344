"""What does a Wan2.2 TI2V-5B download look like, a thousand times smaller and untrained?

Files and names are those of the official release, except that the VAE and the text encoder are
safetensors instead of .pth, so that nothing here needs PyTorch. The weights are random.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.model.umt5 import UMT5, UMT5Config
from wan22_jax.model.vae import WAN22_VAE, VAEConfig, WanVAE
from wan22_jax.weights import parameter_shapes

TINY_TRANSFORMER = TransformerConfig(
    dim=96, ffn_dim=192, num_heads=4, num_layers=3, text_dim=64, freq_dim=32
)
TINY_VAE = VAEConfig(
    encoder_dim=8,
    decoder_dim=8,
    z_dim=WAN22_VAE.z_dim,
    dim_mult=WAN22_VAE.dim_mult,
    num_res_blocks=WAN22_VAE.num_res_blocks,
    latents_mean=WAN22_VAE.latents_mean,
    latents_std=WAN22_VAE.latents_std,
)
TINY_TEXT_ENCODER = UMT5Config(vocab_size=256, dim=64, ffn_dim=128, num_heads=4, num_layers=2)
_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def write_checkpoint(
    folder: Path,
    *,
    captions: Iterable[str],
    transformer: TransformerConfig = TINY_TRANSFORMER,
    vae: VAEConfig = TINY_VAE,
    text_encoder: UMT5Config = TINY_TEXT_ENCODER,
    seed: int = 0,
) -> None:
    """Writes a random model in the official layout.

    Args:
        folder: made if it does not exist.
        captions: the text that its tokenizer learns from.
        transformer: sizes; ``text_dim`` must be the text encoder's ``dim``.
        vae: sizes; its latent statistics are not written, they belong to the code.
        text_encoder: sizes; the tokenizer has at most ``vocab_size`` pieces.
        seed: of the weights; each depends on its name too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = draw_weights(
        nnx.eval_shape(lambda: WanTransformer(transformer, rngs=nnx.Rngs(0))), seed=seed
    )
    _write_shards(folder, weights, num_shards=3)  # the release has three
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "model_type": "ti2v",
        "dim": transformer.dim,
        "ffn_dim": transformer.ffn_dim,
        "freq_dim": transformer.freq_dim,
        "in_dim": transformer.in_channels,
        "out_dim": transformer.out_channels,
        "num_heads": transformer.num_heads,
        "num_layers": transformer.num_layers,
        "text_dim": transformer.text_dim,
        "text_len": transformer.text_len,
        "eps": transformer.eps,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = draw_weights(nnx.eval_shape(lambda: WanVAE(vae, rngs=nnx.Rngs(0))), seed=seed)
    save_file(weights, folder / "Wan2.2_VAE.safetensors")
    weights = draw_weights(nnx.eval_shape(lambda: UMT5(text_encoder, rngs=nnx.Rngs(0))), seed=seed)
    save_file(
        {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()},
        folder / "models_t5_umt5-xxl-enc-bf16.safetensors",
    )
    write_tokenizer(folder / "google" / "umt5-xxl", captions, vocab_size=text_encoder.vocab_size)


def draw_weights(module: nnx.Module, *, seed: int) -> dict[str, np.ndarray]:
    """Draws every parameter, by official name, float32, such that activations keep their size.

    Each is a function of seed and name alone. Norms are near 1 and biases near 0, but none is
    constant, so that a weight that is lost or swapped changes the result.
    """
    shapes = parameter_shapes(module)
    with ThreadPoolExecutor() as pool:  # the full-size benchmark draws eleven billion numbers
        draws = pool.map(lambda name: _draw_weight(name, shapes[name], seed), shapes)
        return dict(zip(shapes, draws, strict=True))


def _draw_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    draw = rng.standard_normal(shape, np.float32)
    if name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
        return 1 + np.float32(0.1) * draw
    if len(shape) == 1:
        return np.float32(0.1) * draw
    if name == "token_embedding.weight":
        return draw
    return draw / np.float32(np.sqrt(np.prod(shape[1:])))


def write_tokenizer(folder: Path, corpus: Iterable[str], *, vocab_size: int) -> None:
    """Writes a SentencePiece-like tokenizer with umT5's conventions, as a function of the corpus.

    <pad> = 0, </s> = 1 after every text, <unk> = 2, then the corpus's characters and its most
    frequent words, at most ``vocab_size`` pieces in all.
    """
    words = Counter("▁" + word for text in corpus for word in text.split())
    characters = sorted(set("".join(words)))
    pieces = [(token, 0.0) for token in _SPECIAL_TOKENS]
    pieces += [(character, -10.0) for character in characters]  # a word beats its characters
    pieces += [(word, -1.0) for word, _ in words.most_common()]
    tokenizer = Tokenizer(
        models.Unigram(pieces[:vocab_size], unk_id=_SPECIAL_TOKENS.index("<unk>"))
    )
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _write_shards(folder: Path, weights: Mapping[str, np.ndarray], *, num_shards: int) -> None:
    names = sorted(weights)
    weight_map = {}
    for shard in range(num_shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        own = names[shard::num_shards]
        save_file({name: weights[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
        "weight_map": weight_map,
    }
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n")
