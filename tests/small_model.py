"""A tiny random model, and a counter of compilations, for tests that need no golden file."""

import contextlib

import jax
import jax.numpy as jnp
from flax import nnx

from davae_jax import DAVAE, DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.model.davae import merge, split

CONFIG = DAVAEConfig(
    encoder=EncoderConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ),
    decoder=DecoderConfig(vocab_size=64, num_layers=2, hidden_size=16, num_attention_heads=2),
    latent_size=4,
    end_token_id=60,
    pad_token_id=61,
    bos_token_id=62,
    top_k=0,
    top_p=0.9,
    max_out_length=24,
)


def new_model(config: DAVAEConfig = CONFIG, *, dtype=jnp.float32, scale: float = 1.0) -> DAVAE:
    """Returns a new model. A scale above 1 multiplies its matrices, so that different latents give different texts."""

    def make():
        return DAVAE(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)

    # The weights are drawn in one compiled program, which is faster than thousands of small ones.
    params = jax.jit(lambda: jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, split(make())[1]))()
    return merge(split(nnx.eval_shape(make))[0], params)


@contextlib.contextmanager
def counted_compilations():
    """Yields a list that gets an entry for each program that XLA compiles, including those of one operation."""
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
