"""Renders the templates of the HTML pages. Each page is one self-contained file that needs no network."""

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
    """Holds a chart with its caption and legend. The legend is empty if the chart has only one colour."""

    svg: str
    caption: str
    legend: Sequence[tuple[str, str]] = ()  # (name, colour)


def render(template: str, **values: Any) -> str:
    """Renders a template that extends page.html, which requires `title` and `kind`.

    All values are escaped, except the SVG of a `Figure`.
    """
    return TEMPLATES.get_template(template).render(values)
