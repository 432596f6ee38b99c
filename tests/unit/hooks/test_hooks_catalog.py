"""The catalogue agrees with itself, with the guide, and with everything that derives from it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from miles.hooks import CATALOG, Hooks, PlugPoint, plug_point_named
from miles.hooks.adapt import annotation_text
from miles.hooks.skeletons import SKELETONS

POINTS = list(CATALOG.values())

# Names in the order of the published tables; a new plug point is added here on purpose.
FLAGS = [
    "--rollout-function-path",
    "--eval-function-path",
    "--custom-generate-function-path",
    "--custom-rm-path",
    "--dynamic-sampling-filter-path",
    "--buffer-filter-path",
    "--rollout-sample-filter-path",
    "--rollout-all-samples-process-path",
    "--custom-reward-post-process-path",
    "--custom-convert-samples-to-train-data-path",
    "--custom-rollout-log-function-path",
    "--custom-eval-rollout-log-function-path",
    "--data-source-path",
    "--miles-router-middleware-paths",
    "--custom-agent-function-path",
    "--generate-tool-specs-path",
    "--generate-execute-tool-function-path",
    "--rollout-data-postprocess-path",
    "--custom-loss-function-path",
    "--custom-tis-function-path",
    "--custom-pg-loss-reducer-function-path",
    "--custom-megatron-init-path",
    "--custom-megatron-before-log-prob-hook-path",
    "--custom-megatron-before-train-step-hook-path",
    "--custom-megatron-post-save-hook-path",
    "--custom-model-provider-path",
]


def test_the_flags_are_frozen() -> None:
    assert [p.flag for p in POINTS] == FLAGS


@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.name)
def test_each_declaration_is_complete(point: PlugPoint) -> None:
    assert point.when.endswith(".") and point.help.startswith("Plug-in: ") and len(point.contract) > 30
    assert point.canonical.startswith("(") and "self" not in point.canonical
    assert point.dest == point.flag[2:].replace("-", "_") and point.nargs == ("+" if point.plural else None)
    names = [f.name for f in point.forms]
    assert len(names) == len(set(names)) >= 1
    for form in point.forms:
        assert form.recognised_by and isinstance(form.positional, tuple)
    assert inspect.iscoroutinefunction(point.protocol.__call__) == point.awaited
    for spelling in (point.name, point.flag, point.key, point.dest):
        assert plug_point_named(spelling) is point


def test_what_derives_from_the_catalogue_is_complete() -> None:
    assert list(Hooks.__annotations__) and set(Hooks.__annotations__) == set(CATALOG)
    assert set(SKELETONS) == set(CATALOG)


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    point = CATALOG["rollout_function"]
    monkeypatch.delenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", raising=False)
    assert point.default == "miles.rollout.sglang_rollout.generate_rollout"
    monkeypatch.setenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", "1")
    assert point.default == "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn"
    monkeypatch.setenv("MILES_EXPERIMENTAL_ROLLOUT_REFACTOR", "yes")
    with pytest.raises(ValueError, match="yes"):
        assert point.default
    assert CATALOG["data_source"].default == "miles.rollout.data_source.RolloutDataSourceWithBuffer"
    unset = {p.name for p in POINTS if p.name != "rollout_function" and p.default}
    assert unset == {"data_source"}


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        ("Sample", "Sample"),
        ("types.Sample", "Sample"),
        ("'list[Sample]'", "list[Sample]"),
        ("List[miles.utils.types.Sample]", "list[Sample]"),
        (list[list[int]], "list[list[int]]"),
        ("typing.List[List['Sample']]", "list[list[Sample]]"),
        ("Sample | list[Sample]", "Sample|list[Sample]"),
        (inspect.Parameter.empty, ""),
    ],
)
def test_annotations_compare_as_text(annotation: object, text: str) -> None:
    assert annotation_text(annotation) == text


@pytest.mark.parametrize(
    "code",
    [
        "import miles.hooks",
        "import miles.hooks.check, miles.hooks.replay, miles.hooks.new",
        "from argparse import Namespace; from miles.hooks import bind\n"
        "bind(Namespace(custom_megatron_init_path='json.loads'))",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'ray', 'pyarrow', 'rich'} & set(sys.modules)"
    program = f"import sys\n{code}\nprint({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stdout
