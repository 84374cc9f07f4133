"""Fills the templates of the HTML pages. A page is one file that needs no other, and no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("davae_jax.reports"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


class Figure(NamedTuple):
    """A chart with its caption and, where its colours have names, its legend."""

    svg: str
    caption: str
    legend: Sequence[tuple[str, str]] = ()  # (name, colour)


def render(template: str, **values: Any) -> str:
    """Fills a template, which extends page.html and so needs `title` and `kind`. Values are escaped, but for a figure's
    SVG."""
    return TEMPLATES.get_template(template).render(values)
