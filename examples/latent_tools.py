"""A walk through the latent space of the demo: `python examples/latent_tools.py [runs/demo]`, after `python train.py`.

Each part stands by itself and can be pasted into a notebook after the first.
"""

# %% The model, and texts it has not seen, whose factors are known.
import sys

import numpy as np

from davae_jax import TextVAE
from davae_jax.data.demo_corpus import Factors, make_corpus, sentence

vae = TextVAE.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
corpus = make_corpus()
texts = corpus.held_out[:400]
factors = [corpus.factors[text] for text in texts]


def show(title: str, lines: list[str]) -> None:
    print(f"\n{title}")
    for line in lines:
        print(f"  {'✓' if line in corpus.factors else '✗'} {line}")


# %% From one text to another, straight and along the great arc.
a, b = texts[0], texts[1]
show("straight", vae.interpolate(a, b, 7))
show("along the great arc", vae.interpolate(a, b, 7, spherical=True))
lengths = np.linalg.norm(vae.encode(texts, std_scale=0.0), axis=1)
print(f"  means lie {lengths.mean():.2f} from the origin, draws of the prior about {vae.config.latent_size**0.5:.2f}")

# %% An attribute from examples: what good reviews have that bad ones have not. Other texts are shifted by it.
good = [text for text, f in zip(texts[:300], factors[:300], strict=True) if f.good]
bad = [text for text, f in zip(texts[:300], factors[:300], strict=True) if not f.good]
praise = vae.attribute_vector(having=good, lacking=bad)
complaints = [text for text, f in zip(texts[300:], factors[300:], strict=True) if not f.good]
show("a complaint", complaints[:1])
for strength in (0.5, 1.0, 1.5):
    show(f"with {strength:g} times the praise", vae.shift(complaints[:1], praise, strength))
praised = vae.shift(complaints, praise)
turned = [corpus.factors[new].good for new in praised if new in corpus.factors]
print(f"  {len(complaints)} complaints: {len(turned)} stay sentences of the language, {sum(turned)} of them praise")

# %% Around a text, nearer and further away.
for radius in (0.5, 2.0, 4.0):
    show(f"at a distance of {radius:g}", vae.neighbours(a, 3, radius))

# %% Sums and differences. Topic and time of two texts, halfway; and an analogy, as a sum with weights −1, 1, 1.
show("halfway", [vae.combine([a, b], [0.5, 0.5])])
one = Factors("餐厅", "服务", True, "非常", "昨天", "家人", "chat")
show("analogy", [vae.combine([sentence(one), sentence(one._replace(good=False)), a], [-1, 1, 1])])
