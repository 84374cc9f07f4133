"""Demonstrates the latent-space operations of `TextVAE` on the demo model. Train it first with `python train.py`.

    python examples/latent_tools.py [runs/demo]

Each cell after the first can be pasted into a notebook on its own. A ✓ marks texts that the demo's grammar accepts.
"""

# %% Load the model and some held-out texts whose generating factors are known.
import sys

import numpy as np

from davae_jax import TextVAE
from davae_jax.data.demo_corpus import Factors, make_corpus, sentence

vae = TextVAE.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
corpus = make_corpus()
texts = corpus.held_out[:400]
factors = [corpus.factors[text] for text in texts]


def show(title: str, lines: list[str]) -> None:
    """Prints texts under a title, each with a mark for whether the grammar accepts it."""
    print(f"\n{title}")
    for line in lines:
        print(f"  {'✓' if line in corpus.factors else '✗'} {line}")


# %% Interpolate between two texts: on a straight line, and on a great circle, which preserves the norm of the latent.
a, b = texts[0], texts[1]
show("linear interpolation", vae.interpolate(a, b, 7))
show("spherical interpolation", vae.interpolate(a, b, 7, spherical=True))
norms = np.linalg.norm(vae.encode(texts, std_scale=0.0), axis=1)
print(f"  mean norm: posterior means {norms.mean():.2f}, prior samples about {vae.config.latent_size**0.5:.2f}")

# %% Learn an attribute vector from positive and negative reviews, and shift other texts along it.
positive = [text for text, f in zip(texts[:300], factors[:300], strict=True) if f.good]
negative = [text for text, f in zip(texts[:300], factors[:300], strict=True) if not f.good]
sentiment = vae.attribute_vector(having=positive, lacking=negative)
complaints = [text for text, f in zip(texts[300:], factors[300:], strict=True) if not f.good]
show("a negative review", complaints[:1])
for strength in (0.5, 1.0, 1.5):
    show(f"shifted by {strength:g} times the sentiment vector", vae.shift(complaints[:1], sentiment, strength))
shifted = vae.shift(complaints, sentiment)
is_positive = [corpus.factors[text].good for text in shifted if text in corpus.factors]
print(f"  of {len(complaints)} shifted reviews, {len(is_positive)} are grammatical and {sum(is_positive)} positive")

# %% Sample the neighbourhood of a text at increasing distances in the latent space.
for radius in (0.5, 2.0, 4.0):
    show(f"neighbours at distance {radius:g}", vae.neighbours(a, 3, radius))

# %% Add and subtract latents: the midpoint of two texts, and an analogy, which has the weights −1, 1, 1.
show("midpoint", [vae.combine([a, b], [0.5, 0.5])])
review = Factors("餐厅", "服务", True, "非常", "昨天", "家人", "chat")
show("analogy", [vae.combine([sentence(review), sentence(review._replace(good=False)), a], [-1, 1, 1])])
