"""A random model of the smallest useful size with its own tokenizers, in the layout of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizer_fixtures import CLS_ID, SEP_ID, make_spiece, make_vocab

from davae_jax import DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.checkpoints.run_folder import CONFIG_FILE, PARAMS_FOLDER
from davae_jax.checkpoints.weights import flat_params, save_weights
from davae_jax.model.davae import abstract_model
from davae_jax.model.decoder import inverse_frequencies

PIECES = 300
MAX_IDS = 30  # encoder ids of a text, its inner [CLS] and [SEP] included
MAX_OUT_LENGTH = 12
SCALES = {"decoder.latent_projection.weight": 1.5}


def make_checkpoint(folder: Path) -> Path:
    """Writes the checkpoint, always the same one, to a folder and returns the folder."""
    make_spiece(folder, PIECES)
    config = DAVAEConfig(
        encoder=EncoderConfig(
            vocab_size=len(make_vocab(folder)),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=MAX_IDS + 2,
        ),
        decoder=DecoderConfig(vocab_size=PIECES + 4, num_layers=1, hidden_size=16, num_attention_heads=2),
        latent_size=4,
        top_k=0,
        top_p=0.9,
        std_scale=1.5,
        max_out_length=MAX_OUT_LENGTH,
        cls_token_id=CLS_ID,
        sep_token_id=SEP_ID,
        end_token_id=PIECES,
        pad_token_id=PIECES + 1,
        bos_token_id=PIECES + 2,
    )
    save_weights(folder / PARAMS_FOLDER, [random_weights(config)], {"buffers": []})
    config.to_json(folder / CONFIG_FILE)
    return folder


def random_weights(config: DAVAEConfig) -> dict[str, np.ndarray]:
    """Returns weights larger than a new model's, so that different texts give different latents and texts."""
    rng = np.random.default_rng(2)
    weights = {}
    for path, leaf in flat_params(abstract_model(config)).items():
        if path == "decoder.inv_freq":
            weights[path] = inverse_frequencies(config.decoder.hidden_size)
            continue
        scale = 0.1 if len(leaf.shape) == 1 else SCALES.get(path, 0.3)
        weight = scale * rng.standard_normal(leaf.shape) + path.endswith("norm.weight")
        weights[path] = weight.astype(np.float32)
    return weights
