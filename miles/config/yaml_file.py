"""YAML files of flags: `--config`, `--custom-config-path`, `--eval-config`.

A key is a flag name, with dashes or underscores, with or without the leading `--`. Values are read by the flag itself
from the text that stands in the file, so that `lr: 1e-6` is a number and `wandb-group: 007` a string. `null` counts as
not given. Mappings may be nested one level deep; the outer keys are headings and mean nothing:

    model:
      hf-checkpoint: models/base
      lr: 1.5e-4
    apply-chat-template: true
    disable-rewards-normalization: true
    rollout-stop: ["\\n", END]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles.config.flags import Flag
from miles.errors import DataError, FlagError

if TYPE_CHECKING:
    import yaml


@dataclass(frozen=True)
class Entry:
    """One `key: value` of a file.

    Example: `Entry(key="lr", value="1e-6", texts=["1e-6"], many=False, where="carry.yaml:12")`
    """

    key: str  # with underscores, without leading dashes
    value: Any
    texts: list[str] | None  # the scalars as written; None for mappings and nested lists
    many: bool  # written as a list
    where: str  # file:line

    def error(self, option: str, *, given: object, expected: str = "", remedy: str = "") -> FlagError:
        return FlagError(f"{self.where}: {option}", given=given, expected=expected, remedy=remedy)


def normal_key(key: str) -> str:
    return key.removeprefix("--").replace("-", "_")


def read_entries(path: str, option: str, takes_mapping: Callable[[str], bool]) -> list[Entry]:
    """All entries of the file, headings dissolved. `takes_mapping(key)`: the value of this key is a mapping."""
    entries: list[Entry] = []
    with _parsing(path):
        loader, root = _compose(path, option)
        for entry, node in _items(loader, root, path) if root is not None else ():
            if isinstance(entry.value, dict) and not takes_mapping(entry.key):
                entries.extend(inner for inner, _ in _items(loader, node, path))
            else:
                entries.append(entry)
    _refuse_duplicates(entries)
    return entries


def load_mapping(path: str, option: str) -> dict[str, Any]:
    """The file as plain values; {} for an empty one."""
    with _parsing(path):
        loader, root = _compose(path, option)
        content = loader.construct_mapping(root, deep=True) if root is not None else {}
    return {str(k): v for k, v in content.items()}


def read_value(flag: Flag, entry: Entry) -> Any:
    """The value of `flag` that an entry gives. `disable-x: true` and `x: false` say the same."""
    try:
        return _read(flag, entry)
    except FlagError as error:
        raise FlagError(f"{entry.where}: {error.flag}", given=error.given, expected=error.expected) from None


def _read(flag: Flag, entry: Entry) -> Any:
    if flag.is_switch:
        if not isinstance(entry.value, bool):
            raise FlagError(flag.option, given=entry.value, expected="true or false")
        return entry.value if entry.key == flag.name else not entry.value
    if flag.kind == "json" and not isinstance(entry.value, str):
        return entry.value
    if flag.kind == "pattern" and isinstance(entry.value, list):
        return flag.read(str(entry.value))
    if flag.kind == "pairs":
        if isinstance(entry.value, dict):
            return {str(name): str(value) for name, value in entry.value.items()}
        return dict(flag.read(text) for text in entry.texts or [])
    if entry.texts is None or (entry.many and not flag.many):
        raise FlagError(flag.option, given=entry.value, expected="one value")
    values = [flag.read(text) for text in entry.texts]
    return values if flag.many else values[0]


@contextmanager
def _parsing(path: str) -> Iterator[None]:
    """What is wrong with a file's YAML becomes a DataError with its line."""
    import yaml

    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise DataError(path, f"not valid YAML: {error.problem}.", line=line) from None
    except (ValueError, TypeError) as error:  # dates and numbers that do not exist, keys that are mappings
        raise DataError(path, f"not valid YAML: {error}.") from None
    except RecursionError:
        raise DataError(path, "not valid YAML: nested too deeply.") from None


def _compose(path: str, option: str) -> tuple[yaml.SafeLoader, yaml.MappingNode | None]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise FlagError(option, given=path, expected="a readable YAML file", remedy=f"({error.strerror}.)") from None
    except UnicodeDecodeError as error:
        raise DataError(
            path, f"expected text in UTF-8, got byte 0x{error.object[error.start]:02x}.",
            line=error.object.count(b"\n", 0, error.start) + 1, remedy="Save the file as UTF-8.",
        ) from None  # fmt: skip
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:  # characters that no YAML file may have
        raise DataError(path, f"not valid YAML: {str(error).splitlines()[0]}.") from None
    root = loader.get_single_node()
    if root is None:
        return loader, None
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise DataError(path, "expected a mapping of flags to values.", line=line)
    return loader, root


def _items(loader: yaml.SafeLoader, node: Any, path: str) -> Iterator[tuple[Entry, Any]]:
    import yaml

    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        where = f"{os.path.basename(path)}:{key_node.start_mark.line + 1}"
        scalars = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        plain = all(isinstance(s, yaml.ScalarNode) for s in scalars)
        yield (
            Entry(
                key=normal_key(str(key_node.value)),
                value=loader.construct_object(value_node, deep=True),
                texts=[s.value for s in scalars] if plain else None,
                many=isinstance(value_node, yaml.SequenceNode),
                where=where,
            ),
            value_node,
        )


def _refuse_duplicates(entries: list[Entry]) -> None:
    seen: dict[str, Entry] = {}
    for entry in entries:
        if entry.key in seen:
            raise entry.error(f"--{entry.key.replace('_', '-')}", given=f"given before, at {seen[entry.key].where}.")
        seen[entry.key] = entry
