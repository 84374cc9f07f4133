"""Defines the presets of train.py: the demo, and the published model."""

from __future__ import annotations

from davae_jax.data.config import DataConfig
from davae_jax.model.config import DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.training.config import BetaConfig, FreeBitsConfig, NoiseConfig, OptimizerConfig, TrainConfig

# Weights start larger than usual (initializer_range 0.08): at width 128 the usual 0.02 leaves token embeddings far
# smaller than the latent's noise, and 300 steps pass before the decoder sees its own tokens. β rises only once the
# latent carries the text (ratio_zero), or the decoder learns to ignore it. The factor learned last is usually the
# topic: with four heads of width 32 some seeds had not learned it when β rose, and never did (the loss stayed at ln 10
# per text, the topic's entropy); with eight heads of width 16 every seed tried had. A learning rate of 1.5e-3 gets
# there sooner than 2.2e-3, and batches of 64 more reliably than batches of 48.
DEMO = TrainConfig(
    steps=1400,
    model=DAVAEConfig(
        encoder=EncoderConfig(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=8,
            intermediate_size=256,
            max_position_embeddings=130,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.08,
        ),
        decoder=DecoderConfig(
            num_layers=2,
            hidden_size=128,
            num_attention_heads=8,
            embedding_dropout_prob=0.0,
            attention_dropout_prob=0.0,
            output_dropout_prob=0.0,
            max_sequence_length=128,
            max_memory_length=128,
            initializer_range=0.08,
        ),
        latent_size=32,
        top_k=1,
        max_out_length=128,
    ),
    beta=BetaConfig(start=0.0, max=0.03, ratio_zero=0.37, ratio_increase=0.26),
    free_bits=FreeBitsConfig(target=0.5),
    optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup=0.05, end=0.1, weight_decay=0.01, b2=0.99),
)


RANDENG_1B = TrainConfig(
    model=DAVAEConfig(top_k=0, top_p=0.9, repetition_penalty=2.0, std_scale=1.5),
    data=DataConfig(max_length=512),
    noise=NoiseConfig(embedding=0.0),
    dtype="bfloat16",
    remat="full",
)


# Name → (description for the help text, settings).
PRESETS = {
    "demo": ("A small model on a small synthetic corpus; trains in minutes on a laptop.", DEMO),
    "randeng-1b": ("The published sizes and settings, with 1.2 billion weights.", RANDENG_1B),
}
