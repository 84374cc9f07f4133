"""Implements the text VAE in PyTorch: the reference that converted checkpoints are compared with.

`Twin` computes what the published Randeng-DAVAE program computes, and its `state_dict` has exactly the published names,
so it loads the published file unchanged. It is meant to be read side by side with the JAX model: nothing is fused or
cached, and there is no dropout (evaluation only).

Letters in shapes: B batch, S encoder length, T decoder length, D width, N heads, H = D/N head width, L latent size,
V vocabulary, M memory length, K = M + T keys. `x_BTD` has shape [B, T, D].
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae_jax.checkpoints.published import torch_file
from davae_jax.checkpoints.run_folder import CONFIG_FILE
from davae_jax.model.config import DAVAEConfig

MASKED = -10000.0  # replaces a masked score (decoder) or is added to it (encoder); finite as published, not −inf
END = 50000  # <|endoftext|>, which is also the padding of the published loss, so that it is never trained


class Encoded(NamedTuple):
    mean: Tensor  # [B, L]
    logvar: Tensor  # [B, L]
    pooled: Tensor  # [B, D]
    hidden: list[Tensor]  # 1 + layers times [B, S, D]: the first layer's input, then each layer's output


class Decoded(NamedTuple):
    logits: Tensor  # [B, T, V]
    memory: list[Tensor]  # 1 + layers times [B, min(max_memory_length, K), D], without gradient
    hidden: list[Tensor]  # 1 + layers times [B, T, D]: the first layer's input, then each layer's output plus latent
    final: Tensor  # [B, T, D]: the last hidden state after the final LayerNorm


def tree(**children: nn.Module) -> nn.ModuleDict:
    """Makes a module for one level of the published names; it has no parameters except those of its children."""
    return nn.ModuleDict(children)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


class Encoder(nn.Module):
    """BERT (Devlin et al. 2018), post-norm, with the posterior's head on the pooled first token."""

    def __init__(self, config: dict, latent_size: int):
        super().__init__()
        D, ffn, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.embeddings = tree(
            word_embeddings=nn.Embedding(config["vocab_size"], D),
            position_embeddings=nn.Embedding(config["max_position_embeddings"], D),
            token_type_embeddings=nn.Embedding(config["type_vocab_size"], D),
            LayerNorm=nn.LayerNorm(D, eps),
        )
        # Part of the published file, but not used: positions are always 0, 1, 2, …
        self.embeddings.register_buffer("position_ids", torch.arange(config["max_position_embeddings"])[None])
        self.encoder = tree(
            layer=nn.ModuleList(
                tree(
                    attention=tree(
                        self=tree(query=nn.Linear(D, D), key=nn.Linear(D, D), value=nn.Linear(D, D)),
                        output=tree(dense=nn.Linear(D, D), LayerNorm=nn.LayerNorm(D, eps)),
                    ),
                    intermediate=tree(dense=nn.Linear(D, ffn)),
                    output=tree(dense=nn.Linear(ffn, D), LayerNorm=nn.LayerNorm(D, eps)),
                )
                for _ in range(config["num_hidden_layers"])
            )
        )
        self.pooler = tree(dense=nn.Linear(D, D))
        self.linear = nn.Linear(D, 2 * latent_size, bias=False)

    def forward(self, ids_BS: Tensor, noise_BSD: Tensor | None) -> Encoded:
        emb = self.embeddings
        x_BSD = (
            emb.word_embeddings(ids_BS)
            + emb.position_embeddings(torch.arange(ids_BS.shape[1], device=ids_BS.device))
            + emb.token_type_embeddings.weight[0]
        )
        x_BSD = emb.LayerNorm(x_BSD)
        if noise_BSD is not None:
            x_BSD = x_BSD + noise_BSD.to(x_BSD.dtype)
        bias_B11S = torch.where(ids_BS > 0, 0.0, MASKED).to(x_BSD.dtype)[:, None, None, :]
        hidden = [x_BSD]
        for layer in self.encoder.layer:
            attended_BSD = layer.attention.output.dense(self.attend(layer.attention.self, x_BSD, bias_B11S))
            x_BSD = layer.attention.output.LayerNorm(x_BSD + attended_BSD)
            mlp_BSD = layer.output.dense(F.gelu(layer.intermediate.dense(x_BSD)))  # the exact (erf) GELU
            x_BSD = layer.output.LayerNorm(x_BSD + mlp_BSD)
            hidden.append(x_BSD)
        pooled_BD = torch.tanh(self.pooler.dense(x_BSD[:, 0]))
        mean_BL, logvar_BL = self.linear(pooled_BD).chunk(2, dim=-1)
        return Encoded(mean_BL, logvar_BL, pooled_BD, hidden)

    def attend(self, attention: nn.ModuleDict, x_BSD: Tensor, bias_B11S: Tensor) -> Tensor:
        q_BNSH, k_BNSH, v_BNSH = (
            linear(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        score_BNSS = q_BNSH @ k_BNSH.transpose(-1, -2) / math.sqrt(q_BNSH.shape[-1]) + bias_B11S
        weight_BNSS = score_BNSS.softmax(-1, dtype=at_least_float32(x_BSD.dtype)).to(x_BSD.dtype)
        return (weight_BNSS @ v_BNSH).transpose(1, 2).flatten(2)


def frequencies(D: int) -> Tensor:
    """Returns 10000^(−2i/D), i = 0..D/2−1 (Vaswani et al. 2017), for files that lack the frequencies."""
    return 1 / 10000 ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)


class PositionFeatures(nn.Module):
    """Computes the sinusoids of a distance: all sines, then all cosines.

    The published file contains the frequencies rounded to float16, and the published program uses the rounded values;
    the phase error grows with distance. The file's values are kept in float32 for every dtype of the model.
    """

    def __init__(self, D: int):
        super().__init__()
        self.register_buffer("inv_freq", frequencies(D))

    def _apply(self, fn, recurse=True):
        # .to(dtype), .half() etc. cast floating point tensors only: viewed as int32, the bits are moved but not cast.
        return super()._apply(lambda t: fn(t.view(torch.int32)).view(torch.float32), recurse)

    def forward(self, K: int, dtype: torch.dtype) -> Tensor:
        """Returns the features [K, D] of the distances 0..K−1."""
        inv_freq = self.inv_freq.to(at_least_float32(dtype))
        phase = torch.arange(K, device=inv_freq.device, dtype=inv_freq.dtype)[:, None] * inv_freq
        return torch.cat([phase.sin(), phase.cos()], dim=-1).to(dtype)


class Decoder(nn.Module):
    """Transformer-XL (Dai et al. 2019), pre-norm, the latent added to the input and after every layer."""

    def __init__(self, config: dict, latent_size: int):
        super().__init__()
        D, heads = config["hidden_size"], config["num_attention_heads"]
        self.heads, self.max_memory_length = heads, config["max_memory_length"]
        eps = config.get("layer_norm_eps", 1e-5)  # absent from published configs
        self.word_embeddings = nn.Embedding(config["vocab_size"], D)
        self.transformer = tree(
            linear_emb=nn.Linear(latent_size, D, bias=False),
            position_embeddings=PositionFeatures(D),
            layers=nn.ModuleList(
                tree(
                    input_layernorm=nn.LayerNorm(D, eps),
                    attention=tree(
                        query_key_value=nn.Linear(D, 3 * D), relative=nn.Linear(D, D), dense=nn.Linear(D, D)
                    ),
                    post_attention_layernorm=nn.LayerNorm(D, eps),
                    mlp=tree(dense_h_to_4h=nn.Linear(D, 4 * D), dense_4h_to_h=nn.Linear(4 * D, D)),
                )
                for _ in range(config["num_layers"])
            ),
            final_layernorm=nn.LayerNorm(D, eps),
        )
        # Transformer-XL's u and v, shared by all layers
        self.transformer.register_parameter("r_w_bias", nn.Parameter(torch.zeros(heads, D // heads)))
        self.transformer.register_parameter("r_r_bias", nn.Parameter(torch.zeros(heads, D // heads)))

    def forward(
        self, ids_BT: Tensor, latent_BL: Tensor | None, memory: list[Tensor] | None, window: str | None
    ) -> Decoded:
        if window not in (None, "published"):
            raise ValueError(f"window must be None or 'published', not {window!r}")
        body, T, device = self.transformer, ids_BT.shape[1], ids_BT.device
        x_BTD = self.word_embeddings(ids_BT)
        latent_B1D = 0
        if latent_BL is not None:
            latent_B1D = body.linear_emb(latent_BL.to(x_BTD.dtype))[:, None]
        x_BTD = x_BTD + latent_B1D
        if memory is None:
            memory = [x_BTD[:, :0]] * (1 + len(body.layers))
        M = memory[0].shape[1]
        K = M + T

        distance_TK = torch.arange(M, K, device=device)[:, None] - torch.arange(K, device=device)
        visible_TK = distance_TK >= 0
        if window == "published":  # only the T most recent keys, where T is the length of this segment
            visible_TK = visible_TK & (distance_TK < T)
        features_KD = body.position_embeddings(K, x_BTD.dtype)

        hidden = [x_BTD]
        for layer, memory_BMD in zip(body.layers, memory[:-1], strict=True):  # the last entry is carried, never read
            x_BTD = x_BTD + self.attend(layer, x_BTD, memory_BMD, features_KD, distance_TK, visible_TK)
            up_BTF = F.gelu(layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(x_BTD)), approximate="tanh")
            x_BTD = x_BTD + layer.mlp.dense_4h_to_h(up_BTF) + latent_B1D
            hidden.append(x_BTD)
        final_BTD = body.final_layernorm(x_BTD)
        logits_BTV = final_BTD @ self.word_embeddings.weight.T

        first = max(0, K - self.max_memory_length)
        memory = [torch.cat(rows, dim=1)[:, first:].detach() for rows in zip(memory, hidden, strict=True)]
        return Decoded(logits_BTV, memory, hidden, final_BTD)

    def attend(self, layer, x_BTD, memory_BMD, features_KD, distance_TK, visible_TK) -> Tensor:
        """Returns the output of attention with relative positions (Dai et al. 2019, section 3.3).

        score(i, j) = ((q_i + u)·k_j + (q_i + v)·r_dist(i,j)) / √H
        """
        attention, body = layer.attention, self.transformer
        T = x_BTD.shape[1]
        # Memory passes through the same LayerNorm as the new tokens; queries come from the new tokens alone.
        h_BKD = layer.input_layernorm(torch.cat([memory_BMD, x_BTD], dim=1))
        q_BNKH, k_BNKH, v_BNKH = (
            block_BKD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for block_BKD in attention.query_key_value(h_BKD).chunk(3, dim=-1)
        )
        q_BNTH = q_BNKH[:, :, -T:]
        r_NKH = attention.relative(features_KD).unflatten(-1, (self.heads, -1)).transpose(0, 1)

        content_BNTK = (q_BNTH + body.r_w_bias[:, None]) @ k_BNKH.transpose(-1, -2)
        by_distance_BNTK = (q_BNTH + body.r_r_bias[:, None]) @ r_NKH.transpose(-1, -2)  # last axis: distance, not key
        # Distances below 0 are in the future; their scores are masked below, so their values are arbitrary.
        position_BNTK = by_distance_BNTK.gather(-1, distance_TK.clamp(min=0).expand_as(content_BNTK))
        score_BNTK = (content_BNTK + position_BNTK) / math.sqrt(q_BNTH.shape[-1])
        score_BNTK = score_BNTK.masked_fill(~visible_TK, MASKED)
        weight_BNTK = score_BNTK.softmax(-1, dtype=at_least_float32(x_BTD.dtype)).to(x_BTD.dtype)
        return attention.dense((weight_BNTK @ v_BNKH).transpose(1, 2).flatten(2))


def kl_per_dim(mean: Tensor, logvar: Tensor) -> Tensor:
    """Returns KL(N(mean, exp(logvar)) ‖ N(0, 1)) per dimension, in nats (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (mean**2 + logvar.exp() - logvar - 1)


class Twin(nn.Module):
    """The complete published model. `config` is the published config.json as a dict."""

    def __init__(self, config: dict):
        super().__init__()
        L = config["latent_size"]
        self.config = config
        self.loss_pad = config.get("end_token_id", END)
        self.vae_model = tree(
            encoder=Encoder(config["encoder"], L),
            decoder=Decoder(config["decoder"], L),
            Disc=nn.Sequential(nn.Linear(L, 4 * L), nn.ReLU(), nn.Linear(4 * L, 1)),
        )

    def encode(self, ids: Tensor, embedding_noise: Tensor | None = None) -> Encoded:
        """Encodes ids [B, S], padded with 0. embedding_noise [B, S, D] is added after the embeddings' LayerNorm."""
        return self.vae_model.encoder(ids, embedding_noise)

    def decode(
        self,
        ids: Tensor,
        latent: Tensor | None = None,
        memory: list[Tensor] | None = None,
        window: str | None = None,
    ) -> Decoded:
        """Decodes ids [B, T] with a latent [B, L] or None, after the memory that the previous call returned.

        window None: queries see all earlier keys. "published": the T most recent ones; the same without memory.
        """
        return self.vae_model.decoder(ids, latent, memory, window)

    def discriminate(self, latent: Tensor) -> Tensor:
        """Returns logits [B], high for samples from the prior."""
        return self.vae_model.Disc(latent.to(self.vae_model.Disc[0].weight.dtype))[:, 0]

    def kl(self, mean: Tensor, logvar: Tensor, fb_mode: int) -> Tensor:
        """Returns the loss's KL [B]. fb_mode 0: all dimensions; 1: those above `dim_target_kl`; 2: with logvar 0."""
        if fb_mode not in (0, 1, 2):
            raise ValueError(f"fb_mode must be 0, 1 or 2, not {fb_mode!r}")
        kl_BL = kl_per_dim(mean, torch.zeros_like(logvar) if fb_mode == 2 else logvar)
        if fb_mode == 1:  # free bits as in Optimus (Li et al. 2020): a hard mask, not a maximum
            kl_BL = kl_BL * (kl_BL > self.config["dim_target_kl"])
        return kl_BL.sum(-1)

    def reconstruction(self, ids: Tensor, latent: Tensor | None) -> Tensor:
        """Returns −log p(ids | latent) [B] in nats, summed over the targets that are not the loss's padding."""
        logits_BTV, targets_BT = self.decode(ids, latent).logits[:, :-1], ids[:, 1:]
        logits_BTV = logits_BTV.to(at_least_float32(logits_BTV.dtype))
        # Classes stay on the last axis: over a strided axis torch's float32 sum of V terms is ten times less accurate.
        nll = F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=self.loss_pad, reduction="none"
        )
        return nll.view(targets_BT.shape).sum(-1)

    def published_loss(
        self, encoder_ids: Tensor, decoder_ids: Tensor, eps: Tensor, beta: float, fb_mode: int, length_weighted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (mean reconstruction per token, mean KL, total); the total is a sum over the batch.

        eps [B, L] is standard normal noise. A row's length counts all ids except padding, including the first one.
        """
        posterior = self.encode(encoder_ids)
        mean_BL, logvar_BL = posterior.mean, posterior.logvar
        spread_BL = torch.ones_like(logvar_BL) if fb_mode == 2 else (logvar_BL / 2).exp()
        kl_B = self.kl(mean_BL, logvar_BL, fb_mode)
        rec_B = self.reconstruction(decoder_ids, mean_BL + eps.to(mean_BL.dtype) * spread_BL)
        per_token_B = rec_B / (decoder_ids != self.loss_pad).sum(-1)
        total = ((per_token_B if length_weighted else rec_B) + beta * kl_B).sum()
        return per_token_B.mean(), kl_B.mean(), total

    def adversarial_losses(self, latent: Tensor, prior_sample: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (L_d, L_g) of latents [B, L] and samples from the prior [B, L] (Goodfellow et al. 2014)."""

        def bce(logits_B: Tensor, label: float) -> Tensor:
            return F.binary_cross_entropy_with_logits(logits_B, torch.full_like(logits_B, label))

        loss_d = bce(self.discriminate(latent.detach()), 0.0) + bce(self.discriminate(prior_sample), 1.0)
        return loss_d, bce(self.discriminate(latent), 1.0)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Loads tensors by their published names; the two buffers may be absent.

        Sibling models (PPVAE, GAVAE) contain the same tensors under one more `vae_model.`; further tensors are ignored.
        """
        if any(name.startswith("vae_model.vae_model.") for name in state_dict):
            state_dict = {
                n[len("vae_model.") :]: t for n, t in state_dict.items() if n.startswith("vae_model.vae_model.")
            }
        position_ids = "vae_model.encoder.embeddings.position_ids"
        inv_freq = "vae_model.decoder.transformer.position_embeddings.inv_freq"
        encoder, decoder = self.config["encoder"], self.config["decoder"]
        state_dict = {
            **state_dict,  # a copy: the caller's dict is not modified
            position_ids: torch.arange(encoder["max_position_embeddings"], device="cpu")[None],
            inv_freq: state_dict.get(inv_freq, frequencies(decoder["hidden_size"])).float(),
        }
        return super().load_state_dict(state_dict, strict, assign)


def load_twin(folder: str | Path, dtype: torch.dtype = torch.float32) -> Twin:
    """Loads the twin of a published folder, ready for evaluation.

    Raises:
      InputError: a file is missing or damaged, or would execute code.
      RuntimeError: the tensors do not fit config.json.
    """
    folder = Path(folder)
    config = DAVAEConfig.from_json(folder / CONFIG_FILE)  # adds the fields that a config.json may lack
    return build_twin(config.to_dict(), torch_file.read_tensors(torch_file.find_weights_file(folder)), dtype)


def build_twin(config: dict, state: Mapping[str, np.ndarray], dtype: torch.dtype = torch.float32) -> Twin:
    """Makes a twin from arrays with published names, ready for evaluation.

    It is built without storage and then receives the tensors, so that the model is never in memory twice; an array that
    already has the dtype is not copied.
    """
    with torch.device("meta"):
        twin = Twin(config)
    with warnings.catch_warnings():  # the arrays are memory-mapped, and never written
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch_file.as_torch(array) for name, array in state.items()}
    tensors = {name: t if name.endswith("inv_freq") else t.to(dtype) for name, t in tensors.items()}
    twin.load_state_dict(tensors, assign=True)
    return twin.eval()
