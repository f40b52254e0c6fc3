"""Label declarations in the forms that layouts use, as `[(class name, label values)]` and an ignore value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.sources.raw import ClassValues
from hermes_dist.errors import SourceError

BACKGROUND = frozenset({"background", "bg"})


def parse_labels(labels: Any, path: Path) -> tuple[list[ClassValues], int | None]:
    """Classes in ascending order as declared, and the ignore value.

    Accepts name → value or list of values (nnU-Net v2, regions included), value → name (MSD, `labels.json`). A name `background`
    or a sole value 0 is no class; `ignore` is no class either, its value is returned.

    Raises:
        SourceError: neither of these forms; names the file.
    """
    if not isinstance(labels, Mapping) or not labels:
        raise SourceError(f"{path}: `labels` is {labels!r}; expected an object such as {{'background': 0, 'liver': 1}}")
    classes: list[ClassValues] = []
    ignore: int | None = None
    for key, value in labels.items():
        name, raw = (value, key) if str(key).lstrip("-").isdigit() and isinstance(value, str) else (str(key), value)
        try:
            values = tuple(int(v) for v in (raw if isinstance(raw, Sequence) and not isinstance(raw, str) else [raw]))
        except (TypeError, ValueError):
            raise SourceError(f"{path}: label {name!r} has value {raw!r}; expected a whole number or a list of them") from None
        if name.lower() == "ignore":
            ignore = values[0]
        elif values != (0,) and name.lower() not in BACKGROUND:
            if not values or min(values) < 1 or max(values) > 65535:
                raise SourceError(f"{path}: label {name!r} has values {list(values)}; expected 1 … 65535")
            classes.append((name, values))
    return classes, ignore


def modality_of(names: Any, channel: int) -> str | None:
    """The modality that `channel_names` or `modality` states for a channel (`CT`, `MRI`, …), or None."""
    if not isinstance(names, Mapping):
        return None
    name = names.get(str(channel))
    return str(name) if name else None
