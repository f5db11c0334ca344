"""What callers may hand to the networks: lists in configs, arrays of numpy, any channels."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan22_jax.model.transformer import TransformerConfig, WanTransformer
from wan22_jax.model.vae import VAEConfig, WanVAE

TRANSFORMER = {
    "dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "in_channels": 6,
    "out_channels": 5, "text_dim": 8, "text_len": 6, "freq_dim": 8, "eps": 1e-6,
}  # fmt: skip
VAE = {"encoder_dim": 4, "decoder_dim": 4, "z_dim": 3, "num_res_blocks": 1}


def test_lists_in_configs_become_tuples():
    listed = TransformerConfig(**TRANSFORMER, patch_size=[1, 2, 2])
    assert listed == TransformerConfig(**TRANSFORMER, patch_size=(1, 2, 2))
    assert hash(listed) == hash(TransformerConfig(**TRANSFORMER, patch_size=(1, 2, 2)))
    listed = VAEConfig(**VAE, dim_mult=[1, 2, 2, 2], latents_mean=[0, 1, 2], latents_std=[1] * 3)
    tupled = VAEConfig(
        **VAE, dim_mult=(1, 2, 2, 2), latents_mean=(0.0, 1.0, 2.0), latents_std=(1.0,) * 3
    )
    assert listed == tupled
    assert hash(listed) == hash(tupled)


def test_transformer_takes_numpy_and_other_channels_out_than_in():
    model = WanTransformer(TransformerConfig(**TRANSFORMER, patch_size=[1, 2, 2]), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    shapes = (2, 3, 4, 2, 6), (2, 3), (2, 4, 8)
    velocity = model(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    assert velocity.shape == (2, 3, 4, 2, 5)
    assert velocity.dtype == jnp.float32


def test_chunked_vae_takes_numpy_and_a_config_of_lists():
    config = VAEConfig(**VAE, dim_mult=[1, 1, 1, 1], latents_mean=[0, 1, 2], latents_std=[1] * 3)
    vae = WanVAE(config, rngs=nnx.Rngs(0))
    latents = list(vae.encode_chunks([np.zeros((1, 1, 16, 16, 3), np.float32)]))
    video = list(vae.decode_chunks(np.asarray(latents[0])))
    assert [chunk.shape for chunk in (*latents, *video)] == [(1, 1, 1, 1, 3), (1, 1, 16, 16, 3)]
