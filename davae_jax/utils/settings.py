"""Compares two sets of settings, such as those in the files of two training runs."""

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
      defaults: the values of settings that are missing from one of the two, because another version wrote it.
      ignored: dotted names, of settings or of whole sections, that are not compared.
      prefix: the dotted name of the section that is compared, with a dot at its end.
    """
    defaults = defaults or {}
    changed = []
    for name in old.keys() | new.keys():
        if prefix + name in ignored:
            continue
        default = defaults.get(name)
        old_value, new_value = old.get(name, default), new.get(name, default)
        if isinstance(old_value, dict) and isinstance(new_value, dict):
            section = default if isinstance(default, dict) else {}
            changed += changed_settings(
                old_value, new_value, defaults=section, ignored=ignored, prefix=f"{prefix}{name}."
            )
        elif old_value != new_value:
            changed.append(f"{prefix}{name} ({old_value}, now {new_value})")
    return sorted(changed)
