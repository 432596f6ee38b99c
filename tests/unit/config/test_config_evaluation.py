"""Evaluation sets from --eval-prompt-data and --eval-config."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from config_helpers import namespace, refusal, settings, write

from miles.config.evaluation import (
    DATASET_RUNTIME_SPECS,
    EvalDatasetConfig,
    _apply_dataset_field_overrides,
    build_eval_dataset_configs,
    ensure_dataset_list,
    pick_from_args,
)
from miles.errors import DataError, UsageError


def test_pairs_on_the_command_line() -> None:
    flags = [
        "--eval-prompt-data",
        "carry",
        "a.jsonl",
        "other",
        "b.jsonl",
        "--eval-temperature",
        "0.5",
        "--label-key",
        "y",
    ]
    carry, other = settings(*flags).eval.eval_datasets
    assert (carry.name, carry.path, other.name, other.path) == ("carry", "a.jsonl", "other", "b.jsonl")
    assert (carry.temperature, carry.top_p, carry.top_k) == (0.5, 1.0, -1)
    assert (carry.input_key, carry.label_key, carry.tool_key, carry.metadata_key) == ("input", "y", "tools", "metadata")
    assert carry.n_samples_per_eval_prompt == 1  # its own default wins over --n-samples-per-prompt
    assert namespace(*flags).eval_datasets == [carry, other]


def test_a_single_path_gets_the_published_name() -> None:
    args = namespace("--eval-prompt-data", "a.jsonl")
    assert args.eval_prompt_data == ["aime", "a.jsonl"]


def test_odd_lists_are_refused() -> None:
    assert "--eval-prompt-data: expected pairs" in refusal("--eval-prompt-data", "a", "b", "c")


FILE = """\
eval:
  defaults:
    temperature: 0.7
    top_p: null
    rm_type: math
    label_key: answer
  datasets:
    - name: one
      path: one.jsonl
      temperature: 0.1
      metadata_overrides: {level: 3}
    - name: two
      path: two.jsonl
      temperature: null
      rm_type: f1
"""


def test_file_entry_over_defaults_over_flags(tmp_path: Path) -> None:
    flags = ["--eval-config", write(tmp_path, FILE, "eval.yaml"), "--eval-top-k", "5", "--eval-prompt-data", "x", "y"]
    one, two = settings(*flags).eval.eval_datasets
    assert (one.temperature, two.temperature) == (0.1, None)  # present with null counts as given
    assert (one.top_p, two.top_p) == (None, None)
    assert (one.top_k, one.rm_type, two.rm_type, one.label_key) == (5, "math", "f1", "answer")
    assert one.metadata_overrides == {"level": 3} and two.metadata_overrides == {}
    assert namespace(*flags).eval_prompt_data == ["one", "one.jsonl", "two", "two.jsonl"]


def test_file_without_eval_and_with_a_mapping(tmp_path: Path) -> None:
    path = write(tmp_path, "datasets:\n  one: {path: one.jsonl}\n", "eval.yaml")
    (one,) = settings("--eval-config", path).eval.eval_datasets
    assert (one.name, one.path, one.temperature) == ("one", "one.jsonl", 1.0)


MISTAKES = [
    ("eval: {}", "no data sets"),
    ("", "no data sets"),
    ("datasets: []", "no data sets"),
    ("eval: 3", "`eval` must be a mapping"),
    ("datasets: [{name: a}]", "needs a name and a path"),
    ("datasets: [{name: a, path: b, colour: red}]", "unknown key 'colour'"),
    ("datasets: {a: b}", "evaluation set 'a' must be a mapping, got 'b'"),
    ("datasets: [a]", "an evaluation set must be a mapping, got 'a'"),
    ("datasets: 3", "datasets must be a list or a mapping, got 3"),
    (
        "datasets: [{name: a, path: b, metadata_overrides: 3}]",
        "metadata_overrides of evaluation set 'a' must be a mapping",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes_in_the_file(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        settings("--eval-config", write(tmp_path, text, "eval.yaml"))
    assert sentence in str(caught.value) and "eval.yaml" in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(UsageError, match="--eval-config: expected a readable YAML file"):
        settings("--eval-config", "none.yaml")


# ---- the published functions ---------------------------------------------------------------------------------------


def test_published_import_path() -> None:
    from miles.utils import eval_config

    assert eval_config.EvalDatasetConfig is EvalDatasetConfig
    assert set(eval_config.DATASET_SAMPLE_SPECS) == {"input_key", "label_key", "tool_key", "metadata_key"}
    for spec in (*eval_config.DATASET_RUNTIME_SPECS.values(), *eval_config.DATASET_SAMPLE_SPECS.values()):
        assert set(spec) == {"dataset_keys", "default_keys", "arg_attrs"}
        assert all(isinstance(value, tuple) for value in spec.values())


def test_overrides_are_written_into_the_entry() -> None:
    entry = {"name": "a", "path": "b", "top_k": 9}
    args = Namespace(eval_temperature=None, rollout_temperature=0.3, eval_top_p=0.2)
    _apply_dataset_field_overrides(args, entry, {"max_response_len": 7}, DATASET_RUNTIME_SPECS)
    assert (entry["temperature"], entry["top_p"], entry["top_k"], entry["max_response_len"]) == (0.3, 0.2, 9, 7)
    assert entry["n_samples_per_eval_prompt"] is None


def test_pick_from_args() -> None:
    assert pick_from_args(Namespace(a=None, b=0, c=1), ("a", "missing", "b", "c")) == 0
    assert pick_from_args(Namespace(), ("a",)) is None


def test_lists_of_entries() -> None:
    assert ensure_dataset_list(None) == []
    assert ensure_dataset_list({"a": {"path": "x"}}) == [{"path": "x", "name": "a"}]
    entries = [{"name": "a", "path": "x"}]
    listed = ensure_dataset_list(entries)
    assert listed == entries and listed[0] is not entries[0]


def test_unknown_keys_are_a_type_error() -> None:
    with pytest.raises(TypeError):
        build_eval_dataset_configs(Namespace(), [{"name": "a", "path": "b", "colour": 1}], {})


def test_dataset_config() -> None:
    config = EvalDatasetConfig("a", "p", rm_type="math", metadata_overrides={"level": 3})
    assert config.cache_key == ("a", "p", None, None, None, None)
    metadata = {"rm_type": "f1", "source": "s"}
    assert config.inject_metadata(metadata) == {"rm_type": "math", "source": "s", "level": 3}
    assert metadata == {"rm_type": "f1", "source": "s"}
    assert config.inject_metadata("nothing") == {"rm_type": "math", "level": 3}
    assert EvalDatasetConfig("a", "p", metadata_overrides=None).metadata_overrides == {}  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        EvalDatasetConfig("a", "p", metadata_overrides=[1])  # type: ignore[arg-type]
