"""From YAML and `section.key=value` to a nested mapping, and from a validation error to one line for people.

Knows no key of ours: `config.py` says what may stand in a run's configuration.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; 1e-4 is a number (YAML 1.1 wants 1.0e-4), and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Raises ValueError naming the source and the line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{source}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def read_mapping(path: Path | None) -> dict[str, Any]:
    """The mapping in a YAML file; empty for None.

    Raises:
        ValueError: if the file cannot be read, is no YAML, or holds something else than a mapping.
    """
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {_show(values)}; expected sections with keys, such as 'model:'")
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with every `section.key=value` put in its place; values are YAML.

    Raises:
        ValueError: for an override of another form, or one that reaches into what is not a section.
    """
    for override in overrides:
        dotted, separator, text = override.partition("=")
        parts = dotted.strip().split(".")
        if not separator or not all(parts):
            raise ValueError(f"override {override!r}; expected section.key=value, such as optim.batch_size=8")
        values = _put(values, parts, parse_yaml(text, f"override {override!r}"), override)
    return values


def _put(values: dict[str, Any], parts: list[str], value: Any, override: str) -> dict[str, Any]:
    head, *rest = parts
    if not rest:
        return {**values, head: value}
    inner = values.get(head)
    if inner is not None and not isinstance(inner, dict):
        raise ValueError(f"override {override!r}: {head} is {_show(inner)} and has no key {rest[0]}")
    return {**values, head: _put(inner or {}, rest, value, override)}


def known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Dotted key -> description, of everything that a configuration may hold."""
    keys: dict[str, str] = {}
    for name, field in model.model_fields.items():
        keys[prefix + name] = field.description or ""
        for inner in _models_in(field.annotation):
            keys.update(known_keys(inner, f"{prefix}{name}."))
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def explain(
    error: ValidationError, values: Mapping[str, Any], keys: Mapping[str, str], elsewhere: Mapping[str, str]
) -> str:
    """The first thing wrong, in one line: which key, what was given, what is expected; and how many more there are.

    Args:
        values: what was validated.
        keys: `known_keys`.
        elsewhere: names that other programs use -> our dotted key.
    """
    errors = error.errors(include_url=False)
    # An unknown key goes first: the key that is missing is often the same one, misspelt.
    errors.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    text = _explain_one(errors[0], values, keys, elsewhere)
    return text if len(errors) == 1 else f"{text} (and {len(errors) - 1} more)"


def _explain_one(detail: Any, values: Mapping[str, Any], keys: Mapping[str, str], elsewhere: Mapping[str, str]) -> str:
    dotted = _dotted(detail["loc"], values, missing=detail["type"] == "missing")
    kind, message = detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        near = nearest_key(dotted, keys, elsewhere)
        return f"unknown key {dotted}" + (f"; did you mean {near}?" if near else "")
    if kind == "missing":
        return f"{dotted} is missing; expected: {keys.get(dotted, 'a value')}"
    if kind == "value_error":
        reason = str(detail["ctx"]["error"])
        # A rule that holds between several keys names them itself; there is no single value to show.
        return (
            f"{dotted}: {reason}"
            if isinstance(detail["input"], dict)
            else f"{dotted} is {_show(detail['input'])}: {reason}"
        )
    if kind == "model_type":
        return f"{dotted or 'the configuration'} is {_show(detail['input'])}; expected a section with keys"
    expected = message.replace("Input should be ", "").removesuffix(", unable to parse string as a number")
    note = f" ({keys[dotted]})" if keys.get(dotted) else ""
    return f"{dotted} is {_show(detail['input'])}; expected {expected}{note}"


def _dotted(location: Sequence[int | str], values: Any, missing: bool) -> str:
    """The key as it is written in the file: without the names of the alternatives that pydantic tried."""
    parts = []
    for position, part in enumerate(location):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list | tuple) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif not (missing and position == len(location) - 1):
            continue
        parts.append(str(part))
    return ".".join(parts)


def nearest_key(dotted: str, keys: Mapping[str, str], elsewhere: Mapping[str, str]) -> str | None:
    """The known key that an unknown one most likely means: the same name in another section, another program's name
    for it, a similar name in its own section, a similar name anywhere."""
    section, _, name = dotted.rpartition(".")
    same = [key for key in keys if key.rpartition(".")[2] == name]
    if same:
        return same[0]
    if name in elsewhere:
        return elsewhere[name]
    own = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.55)
    if close:
        return own[close[0]]
    every = {key.rpartition(".")[2]: key for key in keys}
    close = difflib.get_close_matches(name, every, n=1, cutoff=0.7)
    return every[close[0]] if close else None


def _show(value: Any) -> str:
    """A value as YAML would have it, short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
