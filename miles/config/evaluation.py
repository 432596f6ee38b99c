"""On what a run is evaluated: `--eval-config` or `--eval-prompt-data`, resolved to one `EvalDatasetConfig` per set.

Each field is taken from the data set's own entry, else from `defaults`, else from the flags. A key that is present
with `null` counts as given. The published import path of all this is `miles.utils.eval_config`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from miles.config.flags import FRACTION, TOP_K, Check, at_least
from miles.errors import DataError, FlagError

DEFAULT_NAME = "aime"  # the published name of a single unnamed evaluation set

Spec = dict[str, tuple[str, ...]]


def _spec(key: str, *arg_attrs: str) -> Spec:
    return {"dataset_keys": (key,), "default_keys": (key,), "arg_attrs": arg_attrs}


DATASET_RUNTIME_SPECS: dict[str, Spec] = {
    "n_samples_per_eval_prompt": _spec(
        "n_samples_per_eval_prompt", "n_samples_per_eval_prompt", "n_samples_per_prompt"
    ),
    "temperature": _spec("temperature", "eval_temperature", "rollout_temperature"),
    "top_p": _spec("top_p", "eval_top_p", "rollout_top_p"),
    "top_k": _spec("top_k", "eval_top_k", "rollout_top_k"),
    "max_response_len": _spec("max_response_len", "eval_max_response_len", "rollout_max_response_len"),
}
"""How responses are sampled: field -> where its value is looked up."""

_FURTHER_SPECS: dict[str, Spec] = {"min_new_tokens": _spec("min_new_tokens", "eval_min_new_tokens")}

DATASET_SAMPLE_SPECS: dict[str, Spec] = {
    "input_key": _spec("input_key", "eval_input_key", "input_key"),
    "label_key": _spec("label_key", "eval_label_key", "label_key"),
    "tool_key": _spec("tool_key", "eval_tool_key", "tool_key"),
    "metadata_key": _spec("metadata_key", "metadata_key"),
}
"""Which columns of the data file are read: field -> where its value is looked up."""


@dataclass
class EvalDatasetConfig:
    """One evaluation set.

    Example: `EvalDatasetConfig(name="carry", path="eval.jsonl", n_samples_per_eval_prompt=4, temperature=1.0)`
    """

    name: str
    path: str
    rm_type: str | None = None
    input_key: str | None = None
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str | None = None
    n_samples_per_eval_prompt: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_response_len: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_new_tokens: int | None = None
    metadata_overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metadata_overrides is None:
            self.metadata_overrides = {}
        if not isinstance(self.metadata_overrides, dict):
            got = type(self.metadata_overrides).__name__
            raise TypeError(f"metadata_overrides of evaluation set {self.name!r} must be a mapping, got {got}")

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """Sets with equal keys read the same rows, so their prompts are loaded once."""
        return (self.name, self.path, self.input_key, self.label_key, self.tool_key, self.metadata_key)

    def inject_metadata(self, sample_metadata: Any) -> dict[str, Any]:
        """A copy of a sample's metadata with the set's `rm_type` and `metadata_overrides`."""
        metadata = dict(sample_metadata) if isinstance(sample_metadata, dict) else {}
        if self.rm_type is not None:
            metadata["rm_type"] = self.rm_type
        metadata.update(self.metadata_overrides)
        return metadata


def pick_from_args(args: Any, attrs: tuple[str, ...]) -> Any:
    """The first of these attributes of `args` that is not None."""
    for attr in attrs:
        value = getattr(args, attr, None)
        if value is not None:
            return value
    return None


def ensure_dataset_list(config: Any) -> list[dict[str, Any]]:
    """`[{name: a, ...}, ...]` and `{a: {...}, ...}` both become a list of entries with names."""
    if config is None:
        return []
    if isinstance(config, dict):
        entries = []
        for name, entry in config.items():
            if not isinstance(entry, dict):
                raise TypeError(f"evaluation set {name!r} must be a mapping, got {entry!r}")
            entries.append({**entry, "name": entry.get("name", name)})
        return entries
    if not isinstance(config, (list, tuple)):
        raise TypeError(f"datasets must be a list or a mapping, got {config!r}")
    for entry in config:
        if not isinstance(entry, dict):
            raise TypeError(f"an evaluation set must be a mapping, got {entry!r}")
    return [dict(entry) for entry in config]


def _apply_dataset_field_overrides(
    args: Any, dataset_cfg: dict[str, Any], defaults: dict[str, Any], spec_names: dict[str, Any]
) -> None:
    """Fill the fields of `spec_names` into `dataset_cfg`: its own entry, else `defaults`, else `args`."""
    for name, spec in spec_names.items():
        dataset_cfg[name] = _pick(args, dataset_cfg, defaults, spec)


def _pick(args: Any, dataset_cfg: dict[str, Any], defaults: dict[str, Any], spec: Spec) -> Any:
    for source, keys in ((dataset_cfg, spec["dataset_keys"]), (defaults, spec["default_keys"])):
        for key in keys:
            if key in source:
                return source[key]
    return pick_from_args(args, spec["arg_attrs"])


def build_eval_dataset_configs(
    args: Any, raw_config: Iterable[dict[str, Any]], defaults: dict[str, Any]
) -> list[EvalDatasetConfig]:
    """One config per entry. Raises TypeError for keys that an evaluation set does not have."""
    known = {**DATASET_RUNTIME_SPECS, **DATASET_SAMPLE_SPECS, **_FURTHER_SPECS}
    configs = []
    for raw in raw_config:
        entry = dict(raw)
        for key, value in defaults.items():
            if key not in known:
                entry.setdefault(key, value)
        _apply_dataset_field_overrides(args, entry, defaults, known)
        configs.append(EvalDatasetConfig(**entry))
    return configs


# ---- from the flags ------------------------------------------------------------------------------------------------


def resolve_eval_datasets(args: Any) -> list[EvalDatasetConfig]:
    """The evaluation sets that `args.eval_config`, else `args.eval_prompt_data`, describes; [] without either."""
    if args.eval_config is not None:
        return _from_file(args, args.eval_config)
    datasets = build_eval_dataset_configs(args, name_path_pairs(args.eval_prompt_data), {})
    twice = _first_double([d.name for d in datasets])
    if twice is not None:
        raise FlagError("--eval-prompt-data", given=twice, expected="a name of its own for each evaluation set")
    return datasets


def _first_double(names: list[str]) -> str | None:
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def name_path_pairs(prompt_data: list[str] | None) -> list[dict[str, Any]]:
    """`[name, path, ...]` as entries; a single value is a path."""
    values = list(prompt_data or [])
    if len(values) == 1:
        values = [DEFAULT_NAME, *values]
    if len(values) % 2:
        raise FlagError("--eval-prompt-data", given=values, expected="pairs: name path, name path, ...")
    return [{"name": name, "path": path} for name, path in zip(values[::2], values[1::2], strict=True)]


def _from_file(args: Any, path: str) -> list[EvalDatasetConfig]:
    from miles.config.yaml_file import load_mapping

    content = load_mapping(path, "--eval-config")
    content = content.get("eval", content)
    if not isinstance(content, dict):
        raise DataError(path, "`eval` must be a mapping with `datasets`.")
    defaults = content.get("defaults") or {}
    try:
        entries = ensure_dataset_list(content.get("datasets"))
        if not entries:
            raise DataError(path, "no data sets.", remedy="Expected `datasets`: a list of entries with name and path.")
        for entry in entries:
            if not (entry.get("name") and entry.get("path")):
                raise DataError(path, f"evaluation set {entry!r} needs a name and a path.")
            _refuse_unknown(path, {**defaults, **entry})
        datasets = build_eval_dataset_configs(args, entries, defaults)
    except TypeError as error:
        raise DataError(path, f"{error}.") from None
    twice = _first_double([d.name for d in datasets])
    if twice is not None:
        raise DataError(path, f"two evaluation sets are called {twice!r}.", remedy="Give each a name of its own.")
    for dataset in datasets:
        _verify(path, dataset)
    return datasets


def _refuse_unknown(path: str, entry: dict[str, Any]) -> None:
    known = [f.name for f in fields(EvalDatasetConfig)]
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"Did you mean {close[0]}?" if close else f"Known keys: {', '.join(known)}."
            raise DataError(path, f"evaluation set {entry['name']!r} has an unknown key {key!r}.", remedy=remedy)


_TEXT = Check("text", lambda v: isinstance(v, str) and v != "")
_TEXTS = Check("a text or a list of texts", lambda v: isinstance(v, str) or _all_of(v, str))
_IDS = Check("a list of token ids", lambda v: _all_of(v, int))
_COUNT = Check("a whole number >= 1", lambda v: type(v) is int and v >= 1)
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("name", "path", "rm_type", "input_key", "label_key", "tool_key", "metadata_key"), _TEXT),
    **dict.fromkeys(("n_samples_per_eval_prompt", "max_response_len"), _COUNT),
    "temperature": at_least(0),
    "top_p": FRACTION,
    "top_k": TOP_K,
    "stop": _TEXTS,
    "stop_token_ids": _IDS,
    "min_new_tokens": Check("a whole number >= 0", lambda v: type(v) is int and v >= 0),
}


def _all_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _allowed(value: Any, check: Check) -> bool:
    if isinstance(value, bool) or value == math.inf:
        return False
    try:
        return check.holds(value)
    except TypeError:  # a text or a list where a number is compared
        return False


def _verify(path: str, dataset: EvalDatasetConfig) -> None:
    """What the flags of the same meaning are checked for."""
    for key, check in _CHECKS.items():
        value = getattr(dataset, key)
        if value is not None and not _allowed(value, check):
            raise DataError(
                path, f"evaluation set {dataset.name!r}: {key}: expected {check.expected}, got {value!r}."
            )
