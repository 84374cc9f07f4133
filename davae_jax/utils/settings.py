"""Comparing two sets of settings, as the files of two runs hold them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def changed_settings(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    ignored: Collection[str] = (),
    prefix: str = "",
) -> list[str]:
    """Returns the settings in which two nested mappings differ, each as "beta.max (0.1, now 0.2)", sorted.

    Args:
      defaults: the value of a setting that one of the two lacks because another version wrote it.
      ignored: dotted names, of settings or of whole sections, that are not compared.
    """
    defaults = defaults or {}
    changed = []
    for name in old.keys() | new.keys():
        if prefix + name in ignored:
            continue
        default = defaults.get(name)
        a, b = old.get(name, default), new.get(name, default)
        if isinstance(a, dict) and isinstance(b, dict):
            section = default if isinstance(default, dict) else {}
            changed += changed_settings(a, b, defaults=section, ignored=ignored, prefix=f"{prefix}{name}.")
        elif a != b:
            changed.append(f"{prefix}{name} ({a}, now {b})")
    return sorted(changed)
