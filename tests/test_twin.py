"""The PyTorch twin against known answers of the published program (tests/golden, float32, dropout off)."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from davae_jax.parity.twin import PositionFeatures, Twin, frequencies, kl_per_dim, load_twin
from davae_jax.utils.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
HIDDEN = 1e-4  # largest difference of a hidden state or logit
LOSS = 1e-5  # relative, of a loss
END = 50000
INV_FREQ = "vae_model.decoder.transformer.position_embeddings.inv_freq"
POSITION_IDS = "vae_model.encoder.embeddings.position_ids"

both = pytest.mark.parametrize("name", ["small", "memory"])


@functools.cache
def twin_of(name):
    return load_twin(GOLDEN / name)


@functools.cache
def io_of(name):
    with np.load(GOLDEN / name / "io.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def state_of(name):
    return torch.load(GOLDEN / name / "pytorch_model.bin", weights_only=True, mmap=True)


def config_of(name):
    return json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))


def assert_close(actual, expected, atol=HIDDEN):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=atol)


def assert_loss(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=LOSS, atol=0)


# Names, buffers, files


def test_state_dict_has_the_published_names_and_shapes():
    published = state_of("small")
    own = Twin(config_of("small")).state_dict()
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in published.items()}


@both
def test_plain_load_state_dict(name):
    """`small` holds the two buffers, `memory` holds neither."""
    twin = Twin(config_of(name))
    twin.load_state_dict(state_of(name))
    for key, value in twin_of(name).state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


@pytest.mark.parametrize("assign", [False, True])
def test_frequencies_are_the_files_where_it_has_them(assign):
    twin = Twin(config_of("small"))
    twin.load_state_dict(state_of("small"), assign=assign)
    stored = twin.state_dict()[INV_FREQ]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, state_of("small")[INV_FREQ].float())
    assert not torch.equal(stored, frequencies(24))
    assert INV_FREQ not in state_of("memory")
    assert torch.equal(twin_of("memory").state_dict()[INV_FREQ], frequencies(20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_frequencies_are_never_cast(dtype):
    exact = frequencies(24)
    assert torch.equal(PositionFeatures(24).to(dtype).inv_freq, exact)
    twin = load_twin(GOLDEN / "small", dtype)
    assert torch.equal(twin.state_dict()[INV_FREQ], twin_of("small").state_dict()[INV_FREQ])
    assert {p.dtype for p in twin.parameters()} == {dtype}
    io = io_of("small")
    posterior = twin.encode(io["encoder_input_ids"], io["embedding_noise"])
    decoded = twin.decode(io["decoder_input_ids"], io["latent_z"])
    assert {posterior.mean.dtype, decoded.logits.dtype, twin.discriminate(io["latent_z"]).dtype} == {dtype}
    assert_close(decoded.logits[..., io["logit_columns"]].float(), io["decoder_logits_cols"], atol=0.1)


def test_missing_and_unknown_tensors_are_errors():
    state = state_of("memory")
    del state["vae_model.Disc.0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing.*Disc.0.bias"):
        Twin(config_of("memory")).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected.*extra"):
        Twin(config_of("memory")).load_state_dict({**state_of("memory"), "vae_model.extra": torch.zeros(1)})


@pytest.mark.parametrize("layout", ["sibling", "safetensors"])
def test_other_layouts_load_alike(layout, tmp_path):
    state = {key: value.clone() for key, value in state_of("small").items()}
    if layout == "sibling":
        state = {"vae_model." + key: value for key, value in state.items()} | {"own_part.weight": torch.zeros(2)}
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of("small")))
    for key, value in load_twin(tmp_path).state_dict().items():
        assert torch.equal(twin_of("small").state_dict()[key], value), key


def test_a_folder_without_weights_is_named(tmp_path):
    shutil.copyfile(GOLDEN / "small" / "config.json", tmp_path / "config.json")
    with pytest.raises(InputError, match=f"{tmp_path}: contains no model.safetensors and no pytorch_model.bin"):
        load_twin(tmp_path)


# Encoder and latent


@both
def test_encoder(name):
    twin, io = twin_of(name), io_of(name)
    posterior = twin.encode(io["encoder_input_ids"])
    assert len(posterior.hidden) == 1 + twin.config["encoder"]["num_hidden_layers"]
    assert_close(posterior.hidden[-1], io["encoder_last_hidden_state"])
    assert_close(posterior.pooled, io["encoder_pooled"])
    assert_close(posterior.mean, io["posterior_mean"])
    assert_close(posterior.logvar, io["posterior_logvar"])
    noised = twin.encode(io["encoder_input_ids"], io["embedding_noise"])
    assert_close(noised.pooled, io["encoder_pooled_noised"])


@both
def test_latent_and_kl(name):
    twin, io = twin_of(name), io_of(name)
    mean, logvar = twin.encode(io["encoder_input_ids"])[:2]
    assert_close(mean + io["eps"] * (logvar / 2).exp(), io["latent_z"])
    assert_close(mean + io["eps"], io["latent_z_deterministic"])
    for fb_mode, key in enumerate(["kl", "kl_free_bits", "kl_deterministic"]):
        assert_loss(twin.kl(mean, logvar, fb_mode), io[key])
    assert_loss(kl_per_dim(mean, logvar).sum(-1), io["kl"])


# Decoder


@both
def test_decoder(name):
    twin, io = twin_of(name), io_of(name)
    columns, ids = io["logit_columns"], io["decoder_input_ids"]
    decoded = twin.decode(ids, io["latent_z"])
    assert_close(decoded.logits[..., columns], io["decoder_logits_cols"])
    assert_close(decoded.logits.logsumexp(-1), io["decoder_logsumexp"])
    assert torch.equal(decoded.logits.argmax(-1), io["decoder_argmax"])
    assert_loss(twin.reconstruction(ids, io["latent_z"]), io["reconstruction_nll"])
    assert_close(twin.decode(ids).logits[..., columns], io["decoder_logits_cols_no_latent"])
    assert len(decoded.hidden) == len(decoded.memory) == 1 + twin.config["decoder"]["num_layers"]
    assert_close(twin.vae_model.decoder.transformer.final_layernorm(decoded.hidden[-1]), decoded.final, atol=0)


@both
@pytest.mark.parametrize("window", [None, "published"])
def test_memory_over_segments(name, window):
    twin, io = twin_of(name), io_of(name)
    memory, limit = None, twin.config["decoder"]["max_memory_length"]
    for i, ids in enumerate(io["segment_input_ids"].chunk(3, dim=1)):
        logits, memory, hidden, _ = twin.decode(ids, io["latent_z"], memory, window)
        mask = "fullmask_" if window is None else ""
        assert_close(logits[..., io["logit_columns"]], io[f"segment{i}_{mask}logits_cols"])
        assert {rows.shape[1] for rows in memory} == {min(limit, 9 * (i + 1))} == {int(io[f"segment{i}_mem_length"])}
        assert not any(rows.requires_grad for rows in memory)
        assert_close(memory[-1][:, -9:], hidden[-1], atol=0)
        if window == "published":
            assert_close(memory[0], io[f"segment{i}_mem_first"])
            assert_close(memory[-1], io[f"segment{i}_mem_last"])


def test_memory_with_the_full_mask_is_exact():
    """In segments or at once: the same logits, as long as no row falls out."""
    twin, io = twin_of("small"), io_of("small")
    memory, parts = None, []
    for ids in io["segment_input_ids"].split([1, 11, 15], dim=1):
        logits, memory, *_ = twin.decode(ids, io["latent_z"], memory)
        parts.append(logits)
    assert_close(torch.cat(parts, dim=1), twin.decode(io["segment_input_ids"], io["latent_z"]).logits)


def test_without_memory_the_windows_agree():
    twin, io = twin_of("small"), io_of("small")
    full, published = (twin.decode(io["decoder_input_ids"], io["latent_z"], window=w) for w in (None, "published"))
    assert torch.equal(full.logits, published.logits)
    with pytest.raises(ValueError, match="window"):
        twin.decode(io["decoder_input_ids"], window="other")


# Losses and gradients


@both
@pytest.mark.parametrize("fb_mode", [0, 1, 2])
@pytest.mark.parametrize("length_weighted", [True, False])
def test_published_loss(name, fb_mode, length_weighted):
    twin, io = twin_of(name), io_of(name)
    batch = io["encoder_input_ids"], io["decoder_input_ids"], io["eps"]
    losses = twin.published_loss(*batch, beta=0.5, fb_mode=fb_mode, length_weighted=length_weighted)
    assert_loss(torch.stack(losses), io[f"loss_fb{fb_mode}_lw{int(length_weighted)}"])


@both
@pytest.mark.parametrize("fb_mode", [0, 1])
def test_gradient_of_every_tensor(name, fb_mode):
    """Norm and first element within 1e-4, sum within 1e-3 of the known norm.

    The biases of BERT's keys and of `relative` shift all scores of a query alike, which softmax ignores: only noise.
    The known norms are torch's float32 norms, as here; over the 1.2 million values of the decoder's embeddings those
    come out 8e-5 below the exact norm.
    """
    twin, io = twin_of(name), io_of(name)
    batch = io["encoder_input_ids"], io["decoder_input_ids"], io["eps"]
    total = twin.published_loss(*batch, beta=0.5, fb_mode=fb_mode, length_weighted=True)[2]
    parameters = {n: p for n, p in twin.named_parameters() if ".Disc." not in n}
    gradients = dict(zip(parameters, torch.autograd.grad(total, parameters.values()), strict=True))
    prefix = f"gradnorm_fb{fb_mode}/"
    known = {key.removeprefix(prefix): value.tolist() for key, value in io.items() if key.startswith(prefix)}
    assert known.keys() == gradients.keys()
    wrong = []
    for key, (norm, first, total) in known.items():
        gradient = gradients[key]
        if key.endswith(("self.key.bias", "relative.bias")):
            close = gradient.norm() < 1e-5
        else:
            close = abs(gradient.norm() - norm) <= 1e-4 * norm
            close = close and abs(gradient.flatten()[0] - first) <= 1e-4 * norm
            close = close and abs(gradient.double().sum() - total) <= 1e-3 * norm
        if not close:
            wrong.append(f"{key}: {gradient.norm():.7g} {gradient.flatten()[0]:.7g} {gradient.sum():.7g}, {known[key]}")
    assert not wrong, "\n".join(wrong)


@both
def test_adversarial_losses_and_gradients(name):
    twin, io = twin_of(name), io_of(name)
    latent = io["latent_z"].clone().requires_grad_()
    loss_d, loss_g = twin.adversarial_losses(latent, io["prior_sample"])
    assert_loss(torch.stack([loss_d, loss_g]), io["loss_adv"])
    weights = dict(twin.vae_model.Disc.named_parameters())
    gradients = torch.autograd.grad(loss_d, [*weights.values(), latent], allow_unused=True, materialize_grads=True)
    for key, gradient in zip(weights, gradients, strict=False):
        assert_close(gradient, io[f"adv_grad_d/{key}"], atol=1e-6)
    assert not gradients[-1].any()  # the discriminator's loss does not reach the encoder
    assert_close(torch.autograd.grad(loss_g, latent)[0], io["adv_grad_g_z"], atol=1e-6)


# Uses


def greedy(twin, latent, prompts, max_length):
    """The most probable continuation of each prompt, everything decoded anew for every token."""
    rows = []
    for z, prompt in zip(latent, prompts, strict=True):
        ids = list(prompt)
        while len(ids) < max_length:
            token = int(twin.decode(torch.tensor([ids]), z[None]).logits[0, -1].argmax())
            if token == END:
                break
            ids.append(token)
        rows.append(ids)
    return rows


@torch.no_grad()
def test_greedy_until_the_end_token():
    known = json.loads((GOLDEN / "ending" / "generation.json").read_text(encoding="utf-8"))
    twin = twin_of("ending")
    latent, limit = torch.tensor(known["latent"]), twin.config["max_out_length"]
    assert greedy(twin, latent, known["prompts"], limit) == known["greedy"]


@both
@torch.no_grad()
@pytest.mark.parametrize("prompts", ["plain", "unequal"])
def test_greedy_in_one_pass(name, prompts):
    """A causal decoder's greedy row is one in which every token after the prompt is the best at its place."""
    known = json.loads((GOLDEN / name / "generation.json").read_text(encoding="utf-8"))
    rows = torch.tensor(known[f"greedy_{prompts}"])
    best = twin_of(name).decode(rows[:, :-1], io_of(name)["latent_z"]).logits.argmax(-1)
    for row, choice, prompt in zip(rows, best, known[f"prompts_{prompts}"], strict=True):
        assert row[: len(prompt)].tolist() == prompt
        assert torch.equal(choice[len(prompt) - 1 :], row[len(prompt) :])


def test_simulated_latent():
    """From real encoder ids, rows padded with 0, with the published spread of 1.5."""
    known = json.loads((GOLDEN / "text" / "text.json").read_text(encoding="utf-8"))
    twin = twin_of("text")
    rows = [torch.tensor(known["encoder_ids"][known["texts"].index(text)]) for text in known["simulate_texts"]]
    mean, logvar = twin.encode(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))[:2]
    eps = torch.tensor(known["simulate_eps"])
    latent = mean + eps * (logvar / 2).exp() * twin.config["std_scale"]
    assert_close(latent, torch.tensor(known["simulate_latent"]))
