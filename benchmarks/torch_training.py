"""Trains the model in PyTorch, as a user who writes for speed would: the peer of `train_step`.

It has the twin's weights and names (`davae_jax.parity.twin`) and computes the loss that `davae_jax.training.objective`
computes for rows of one text. Attention is `scaled_dot_product_attention`, to which the decoder passes the position
scores as a mask, shifted by a reshape instead of a gather. AdamW and clipping are PyTorch's fused ones.

Letters in shapes: as in `davae_jax.parity.twin`.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae_jax.data.batches import Batch
from davae_jax.parity.twin import MASKED, Twin, build_twin, kl_per_dim
from davae_jax.training.config import TrainConfig


class TorchTraining:
    """A model, its optimizers and its schedules. `step` is what `davae_jax.training.step.train_step` computes."""

    def __init__(self, config: TrainConfig, weights: Mapping[str, np.ndarray]):
        """weights: arrays with published names; they are copied."""
        self.config, self.steps_taken = config, 0
        self.twin = build_twin(config.model.to_dict(), {name: np.array(array) for name, array in weights.items()})
        vae = self.twin.vae_model
        main = [vae.encoder, vae.decoder]
        matrices = [p for module in main for n, p in module.named_parameters() if p.ndim > 1 and "bias" not in n]
        others = [p for module in main for n, p in module.named_parameters() if p.ndim < 2 or "bias" in n]
        optimizer = config.optimizer
        kw = dict(lr=optimizer.learning_rate, betas=(optimizer.b1, optimizer.b2), eps=optimizer.eps, fused=True)
        groups = [dict(params=matrices, weight_decay=optimizer.weight_decay), dict(params=others, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, **kw)
        self.discriminator_optimizer = torch.optim.AdamW(
            vae.Disc.parameters(), weight_decay=0.0, **kw | {"lr": config.adversarial.learning_rate}
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.main = [*matrices, *others]

    def _rate(self, step: int) -> float:
        """Returns the learning rate of a step as a fraction of the peak (`davae_jax.training.schedules`)."""
        config, steps = self.config.optimizer, self.config.steps
        warmup = max(round(config.warmup * steps), 1)
        if step < warmup:
            return step / warmup
        progress = min((step - warmup) / max(steps - warmup, 1), 1)
        return config.end + (1 - config.end) * (1 + math.cos(math.pi * progress)) / 2

    def _beta(self) -> float:
        """Returns the weight of the KL for one linear rise (`davae_jax.training.schedules`)."""
        config = self.config.beta
        progress = (self.steps_taken / self.config.steps - config.ratio_zero) / config.ratio_increase
        return config.start + (config.max - config.start) * min(max(progress, 0), 1)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Takes a training step. Returns the values to log, which are not waited for."""
        losses = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        (losses["loss"] + losses["loss_d"]).backward()
        clip = self.config.optimizer.clip or math.inf
        losses["grad_norm"] = nn.utils.clip_grad_norm_(self.main, clip, foreach=True)
        nn.utils.clip_grad_norm_(self.twin.vae_model.Disc.parameters(), clip, foreach=True)
        self.optimizer.step()
        self.discriminator_optimizer.step()
        self.schedule.step()
        self.steps_taken += 1
        return {name: value.detach() for name, value in losses.items()}

    def loss(self, batch: Batch, eps: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the loss of encoder and decoder, the discriminator's, and their parts.

        Args:
          eps: noise of the latents [B, L]; sampled by default.
        """
        config = self.config
        encoder_ids, decoder_ids, targets, lengths = map(torch.as_tensor, batch[:4])
        mean_BL, logvar_BL = encode(self.twin, encoder_ids, config)
        eps = torch.randn_like(mean_BL) if eps is None else eps
        latent_BL = mean_BL + eps * (logvar_BL / 2).exp()
        logits_BTV = decode(self.twin, decoder_ids, latent_BL, config)
        is_target_BT = torch.arange(targets.shape[1]) < lengths - 1
        targets = targets.long().masked_fill(~is_target_BT, -100)
        nll = F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        rec_B = nll.view(targets.shape).sum(-1) / is_target_BT.sum(-1).clamp(min=1)
        kl_BL = kl_per_dim(mean_BL, logvar_BL)
        kl = (kl_BL * (kl_BL > config.free_bits.target)).sum(-1).mean()
        loss_d, loss_g = self.twin.adversarial_losses(latent_BL, torch.randn_like(latent_BL))
        if not config.adversarial.weight:
            loss_g = loss_g.detach()
        loss = rec_B.mean() + self._beta() * kl + config.adversarial.weight * loss_g
        return {"loss": loss, "loss_d": loss_d, "loss_g": loss_g, "rec": rec_B.mean(), "kl": kl}


def encode(twin: Twin, ids_BS: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Returns mean and log-variance [B, L] of each text."""
    encoder, sizes = twin.vae_model.encoder, config.model.encoder
    p = sizes.hidden_dropout_prob
    emb = encoder.embeddings
    x_BSD = emb.word_embeddings(ids_BS) + emb.position_embeddings.weight[: ids_BS.shape[1]]
    x_BSD = F.dropout(emb.LayerNorm(x_BSD + emb.token_type_embeddings.weight[0]), p)
    if config.noise.embedding:
        x_BSD = x_BSD + config.noise.embedding * torch.randn_like(x_BSD)
    bias_B11S = torch.where(ids_BS > 0, 0.0, MASKED)[:, None, None, :]
    for layer in encoder.encoder.layer:
        q_BNSH, k_BNSH, v_BNSH = (
            linear(x_BSD).unflatten(-1, (encoder.heads, -1)).transpose(1, 2)
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
        )
        p_attention = sizes.attention_probs_dropout_prob
        context = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, bias_B11S, p_attention)
        attended_BSD = layer.attention.output.dense(context.transpose(1, 2).flatten(2))
        x_BSD = layer.attention.output.LayerNorm(x_BSD + F.dropout(attended_BSD, p))
        mlp_BSD = layer.output.dense(F.gelu(layer.intermediate.dense(x_BSD)))
        x_BSD = layer.output.LayerNorm(x_BSD + F.dropout(mlp_BSD, p))
    return encoder.linear(torch.tanh(encoder.pooler.dense(x_BSD[:, 0]))).chunk(2, dim=-1)


def decode(twin: Twin, ids_BT: Tensor, latent_BL: Tensor, config: TrainConfig) -> Tensor:
    """Returns the logits [B, T, V] of texts without memory."""
    decoder, sizes = twin.vae_model.decoder, config.model.decoder
    body, T = decoder.transformer, ids_BT.shape[1]
    p, p_input = sizes.output_dropout_prob, sizes.embedding_dropout_prob
    latent_B1D = body.linear_emb(latent_BL)[:, None]
    x_BTD = F.dropout(decoder.word_embeddings(ids_BT) + latent_B1D, p_input)
    features_KD = body.position_embeddings(T, x_BTD.dtype).flip(0)  # of the distances T − 1, …, 0
    features_KD = F.dropout(features_KD, p_input)
    future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer in body.layers:
        attention = layer.attention
        q_BNTH, k_BNTH, v_BNTH = (
            block.unflatten(-1, (decoder.heads, -1)).transpose(1, 2)
            for block in attention.query_key_value(layer.input_layernorm(x_BTD)).chunk(3, dim=-1)
        )
        r_NTH = attention.relative(features_KD).unflatten(-1, (decoder.heads, -1)).transpose(0, 1)
        position_BNTT = relative_shift((q_BNTH + body.r_r_bias[:, None]) @ r_NTH.transpose(-1, -2))
        score_BNTT = (position_BNTT / math.sqrt(q_BNTH.shape[-1])).masked_fill(future_TT, MASKED)
        context = F.scaled_dot_product_attention(q_BNTH + body.r_w_bias[:, None], k_BNTH, v_BNTH, score_BNTT)
        x_BTD = x_BTD + F.dropout(attention.dense(context.transpose(1, 2).flatten(2)), p)
        up_BTF = F.gelu(layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(x_BTD)), approximate="tanh")
        x_BTD = x_BTD + F.dropout(layer.mlp.dense_4h_to_h(up_BTF), p) + latent_B1D
    return body.final_layernorm(x_BTD) @ decoder.word_embeddings.weight.T


def relative_shift(scores_BNTT: Tensor) -> Tensor:
    """Moves row i left by T − 1 − i (Dai et al. 2019, appendix B). What wraps around is in the future."""
    B, N, T, K = scores_BNTT.shape
    padded = F.pad(scores_BNTT, (1, 0))
    return padded.view(B, N, K + 1, T)[:, :, 1:].reshape(B, N, T, K)
