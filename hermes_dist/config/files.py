"""From a JSON file and overrides to a configuration, and what two configurations differ in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hermes_dist.config.schema import READINGS, Config
from hermes_dist.errors import ConfigError, nearest


def find_config(name: str, config_dir: Path) -> Path:
    """`--config NAME`: a path as given, else in `config_dir`. Raises ConfigError naming both places."""
    for path in (Path(name), config_dir / name, config_dir / f"{name}.json"):
        if path.is_file():
            return path
    known = sorted(p.name for p in config_dir.glob("*.json"))
    raise ConfigError(f"no configuration {name!r}: looked for {Path(name)} and {config_dir / name}.{nearest(name, known)}")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a JSON file, apply `section.key=JSON-or-text` overrides, validate, and fill in the reading's presets.

    Raises:
        ConfigError: unreadable JSON, unknown key, wrong type; names the key, the value and the nearest known key.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # no JSON, or no text at all
        raise ConfigError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}; expected an object of sections (run, data, model, …)")
    data.pop("$schema", None)  # tells editors where configs/schema.json is
    for override in overrides:
        set_dotted(data, override)
    return resolve(validate(data, source=str(path)))


def validate(data: dict[str, Any], source: str = "config") -> Config:
    """Parse a plain dict. Raises ConfigError with one line per wrong key."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [_explain(e["loc"], e["type"], e["msg"].removeprefix("Value error, "), e["input"]) for e in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def resolve(config: Config) -> Config:
    """Fill every field left at None from the preset of `model.reading`."""
    data = config.model_dump()
    for dotted, value in READINGS[config.model.reading].items():
        section = data
        *parents, leaf = dotted.split(".")
        for parent in parents:
            section = section[parent]
        if section[leaf] is None:
            section[leaf] = value
    return Config.model_validate(data)


def set_dotted(data: dict[str, Any], override: str) -> None:
    """Apply one `section.key=JSON-or-text` to a plain dict in place. Raises ConfigError if it has another form."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, leaf = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    data[leaf] = value


def _explain(location: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    dotted = ".".join(str(part) for part in location)
    if kind == "tuple_type" and isinstance(value, str):
        return f"{dotted} = {value!r}: expected a JSON list, in a shell within quotes: '{dotted}=[…]'"
    if kind != "extra_forbidden":
        return f"{dotted} = {value!r}: {message[0].lower()}{message[1:]}"
    section: Any = Config
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    return f"unknown key {dotted!r}.{nearest(str(location[-1]), list(section.model_fields))}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) for each setting of two dumped configurations that differs; None where one has no such key."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
