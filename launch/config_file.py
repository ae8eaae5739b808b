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
) -> tuple[str, str]:
    """The first thing wrong: its dotted key, and one line saying what was given and what is expected.

    Args:
        values: what was validated.
        keys: `known_keys`.
        elsewhere: names that other programs use -> our dotted key.
    """
    errors = error.errors(include_url=False)
    # An unknown key goes first: the key that is missing is often the same one, misspelt.
    errors.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    first = errors[0]
    dotted = _dotted(first["loc"], values, missing=first["type"] == "missing")
    text = _explain_one(dotted, first, values, keys, elsewhere)
    return dotted, text if len(errors) == 1 else f"{text} (and {len(errors) - 1} more)"


def _explain_one(
    dotted: str, detail: Any, values: Mapping[str, Any], keys: Mapping[str, str], elsewhere: Mapping[str, str]
) -> str:
    kind, given = detail["type"], detail["input"]
    note = f" ({keys[dotted]})" if keys.get(dotted) else ""
    match kind:
        case "extra_forbidden" if dotted in keys:  # known, but not to the alternative that was chosen by name
            section = dotted.rpartition(".")[0]
            return f"{dotted} has no meaning for {section} {_look_up(values, section + '.name')}"
        case "extra_forbidden":
            near = nearest_key(dotted, keys, elsewhere)
            return f"unknown key {dotted}" + (f"; did you mean {near}?" if near else "")
        case "missing":
            return f"{dotted} is missing{note}"
        case "value_error":
            # A rule between several keys names them itself; there is no single value to show.
            said = dotted if isinstance(given, dict) else f"{dotted} is {_show(given)}"
            return f"{said}: {detail['ctx']['error']}"
        case "union_tag_invalid":
            return f"{dotted}.name is {_show(detail['ctx']['tag'])}; expected {detail['ctx']['expected_tags']}"
        case "model_type" | "model_attributes_type":
            return f"{dotted or 'the configuration'} is {_show(given)}; expected a section with keys"
        case "path_type":
            return f"{dotted} is {_show(given)}; expected a path{note}"
    expected = re.sub("^(greater|less)", r"a number \1", detail["msg"].removeprefix("Input should be "))
    return f"{dotted} is {_show(given)}; expected {expected}{note}"


def _look_up(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _dotted(location: Sequence[int | str], values: Any, missing: bool) -> str:
    """The key as it is written in the file: without the names of the alternatives that pydantic tried."""
    parts = []
    for position, part in enumerate(location):
        is_key = isinstance(values, Mapping) and part in values
        is_index = isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if is_key or is_index:
            values = values[part]
        elif not (missing and position == len(location) - 1):
            continue
        parts.append(str(part))
    return ".".join(parts)


def nearest_key(dotted: str, keys: Mapping[str, str], elsewhere: Mapping[str, str]) -> str | None:
    """The known key that an unknown one most likely means, or None.

    Tried in turn: the same name in another section, another program's name for it, a similar name in its own section,
    a similar name anywhere.
    """
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
