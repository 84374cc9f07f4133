"""A random model of the smallest useful size with tokenizers of its own, in the layout of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

from small_model import new_model
from tokenizer_fixtures import CLS_ID, SEP_ID, make_spiece, make_vocab

from davae_jax import DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.checkpoint import CONFIG_FILE, PARAMS_FOLDER, params_of, save_arrays

PIECES = 300
MAX_IDS = 30  # of a text, its own [CLS] and [SEP] counted
MAX_OUT_LENGTH = 12
SCALES = {"encoder.posterior.weight": 45, "decoder.latent_projection.weight": 45}


def make_checkpoint(folder: Path) -> Path:
    """Fills a folder; what it holds is always the same."""
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
    # Weights a good deal larger than a fresh model's, so that different texts give different latents and texts.
    params = params_of(new_model(config))
    params |= {path: x * SCALES.get(path, 15) for path, x in params.items() if x.ndim > 1}
    save_arrays(folder / PARAMS_FOLDER, [params], {"buffers": []})
    config.to_json(folder / CONFIG_FILE)
    return folder
