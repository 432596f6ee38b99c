"""Wrong plug-ins that are found before anything starts: plug point by kind, with the whole problem word for word."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.errors import HookReport
from miles.hooks import CATALOG, bind
from miles.hooks.problems import expected_forms

KINDS = (
    "missing_module",
    "missing_name",
    "raises_at_import",
    "not_callable",
    "wrong_arity",
    "wrong_keyword",
    "async_for_sync",
    "sync_for_async",
)

# ---- signatures: plug point -> (wrong arity, remedy), (wrong keyword, remedy) ----------------------------------------

ROLLOUT = "the call passes (args, rollout_id, evaluation=): "
LOG = "the call passes (rollout_id, args, samples, rollout_extra_metrics, rollout_time): too many positional arguments"
LOG_EVAL = "the call passes (rollout_id, args, data, extra_metrics): too many positional arguments"
AGENT = "the call passes (base_url=, prompt=, request_kwargs=): "
TIS = (
    "the call passes (args=, pg_loss=, train_log_probs=, rollout_log_probs=, loss_masks=, total_lengths=, "
    "response_lengths=, parallel_state=): "
)
REDUCER = (
    "the call passes (total_lengths, response_lengths, loss_masks, calculate_per_token_loss): too many positional "
    "arguments"
)
STEP = (
    "the call passes (args, rollout_id, step_id, model, optimizer, opt_param_scheduler): too many positional arguments"
)
SAVE = "the call passes (args, rollout_id, checkpoint_dir, hf_checkpoint_dir): too many positional arguments"
PROVIDER = "the call passes (pre_process=, post_process=): "
SAMPLES = (
    ("(samples)", "the call passes (args, samples): too many positional arguments"),
    ("(args, samples, *, limit)", "the call passes (args, samples): missing a required argument: 'limit'"),
)

SIGNATURES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "rollout_function": (
        ("(args)", ROLLOUT + "too many positional arguments"),
        (
            "(args, rollout_id, data_source, *, evaluate=False)",
            "the call passes (args, rollout_id, data_source, evaluation=): got an unexpected keyword argument "
            "'evaluation'; did you mean evaluation?",
        ),
    ),
    "eval_function": (
        ("(args, rollout_id)", ROLLOUT + "got an unexpected keyword argument 'evaluation'"),
        ("(args, rollout_id, *, training)", ROLLOUT + "missing a required argument: 'training'"),
    ),
    "custom_generate_function": (
        ("(args, sample)", "the call passes (args, sample, sampling_params): too many positional arguments"),
        (
            "(args, sample, sampling_params, *, tools)",
            "the call passes (args, sample, sampling_params): missing a required argument: 'tools'",
        ),
    ),
    "custom_rm": (
        ("(sample)", "the call passes (args, sample): too many positional arguments"),
        ("(args, sample, *, limit)", "the call passes (args, sample): missing a required argument: 'limit'"),
    ),
    "dynamic_sampling_filter": SAMPLES,
    "buffer_filter": (
        ("(args, buffer)", "the call passes (samples): missing a required argument: 'buffer'"),
        (
            "(args, rollout_id, buffer, num_samples, *, limit)",
            "the call passes (args, rollout_id, buffer, num_samples): missing a required argument: 'limit'",
        ),
    ),
    "rollout_sample_filter": SAMPLES,
    "rollout_all_samples_process": SAMPLES,
    "custom_reward_post_process": SAMPLES,
    "custom_convert_samples_to_train_data": SAMPLES,
    "custom_rollout_log_function": (
        ("(rollout_id, samples)", LOG),
        ("(rollout_id, args, samples, metrics, *, seconds)", LOG),
    ),
    "custom_eval_rollout_log_function": (
        ("(rollout_id, data)", LOG_EVAL),
        ("(rollout_id, args, data, *, metrics)", LOG_EVAL),
    ),
    "data_source": (
        ("()", "the call passes (args): too many positional arguments"),
        ("(args, *, seed)", "the call passes (args): missing a required argument: 'seed'"),
    ),
    "miles_router_middleware": (
        ("(app)", "the call passes (app, router=): got an unexpected keyword argument 'router'"),
        (
            "(app, *, routre)",
            "the call passes (app, router=): missing a required argument: 'routre'; did you mean router?",
        ),
    ),
    "custom_agent_function": (
        ("(base_url)", AGENT + "got an unexpected keyword argument 'prompt'"),
        ("(base_url, prompt, kwargs)", AGENT + "missing a required argument: 'kwargs'; did you mean request_kwargs?"),
    ),
    "generate_execute_tool_function": (
        ("(name)", "the call passes (name, params): too many positional arguments"),
        ("(name, params, *, limit)", "the call passes (name, params): missing a required argument: 'limit'"),
    ),
    "rollout_data_postprocess": (
        ("()", "the call passes (args): too many positional arguments"),
        ("(args, *, limit)", "the call passes (args): missing a required argument: 'limit'"),
    ),
    "custom_loss_function": (
        ("(args, logits)", "the call passes (args, batch, logits, sum_of_sample_mean): too many positional arguments"),
        (
            "(args, batch, logits, reduce, *, limit)",
            "the call passes (args, batch, logits, sum_of_sample_mean): missing a required argument: 'limit'",
        ),
    ),
    "custom_tis_function": (
        ("(pg_loss)", TIS + "got an unexpected keyword argument 'args'"),
        (
            "(args, pg_loss, train_logprobs, **kwargs)",
            TIS + "missing a required argument: 'train_logprobs'; did you mean train_log_probs?",
        ),
    ),
    "custom_pg_loss_reducer_function": (("(masks)", REDUCER), ("(total, response, masks, *, per_token)", REDUCER)),
    "custom_megatron_init": (
        ("()", "the call passes (args): too many positional arguments"),
        ("(args, *, limit)", "the call passes (args): missing a required argument: 'limit'"),
    ),
    "custom_megatron_before_log_prob_hook": (
        ("(args)", "the call passes (args, model, store_prefix): too many positional arguments"),
        ("(args, model, *, prefix)", "the call passes (args, model, store_prefix): too many positional arguments"),
    ),
    "custom_megatron_before_train_step_hook": (
        ("(args, model)", STEP),
        ("(args, rollout_id, step_id, model, optimizer, *, scheduler)", STEP),
    ),
    "custom_megatron_post_save_hook": (
        ("(args, rollout_id)", SAVE),
        ("(args, rollout_id, checkpoint_dir, *, hf_dir)", SAVE),
    ),
    "custom_model_provider": (
        ("(pre_process)", PROVIDER + "got an unexpected keyword argument 'post_process'"),
        (
            "(pre_process, postprocess)",
            PROVIDER + "missing a required argument: 'postprocess'; did you mean post_process?",
        ),
    ),
}

# Kinds that make no sense at a plug point, each with the reason.
NO_PARAMETERS = "a list has no parameters"
SENSELESS: dict[str, dict[str, str]] = {
    "generate_tool_specs": {
        "wrong_arity": NO_PARAMETERS,
        "wrong_keyword": NO_PARAMETERS,
        "async_for_sync": "a list is not called",
        "sync_for_async": "a list is not called",
    },
    "miles_router_middleware": {
        "async_for_sync": "a class is named; its object may be async inside",
        "sync_for_async": "a class is named; its object may be async inside",
    },
}
CLASSES = ("data_source", "miles_router_middleware")


CELLS = [(name, kind) for name in CATALOG for kind in KINDS if kind not in SENSELESS.get(name, {})]


def test_every_cell_is_filled() -> None:
    """Each plug point has a wrong signature of both kinds, or the reason why there is none."""
    assert len(CELLS) + sum(len(row) for row in SENSELESS.values()) == len(CATALOG) * len(KINDS)
    assert set(SIGNATURES) == {name for name, kind in CELLS if kind == "wrong_arity"}
    assert set(SIGNATURES) == {name for name, kind in CELLS if kind == "wrong_keyword"}
    assert all(len(reason) > 10 for row in SENSELESS.values() for reason in row.values())


# ---- the working directory of a user ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory that is importable, and forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    path, modules = sys.path[:], set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def problem_of(point: str, path: str) -> str | None:
    """What is told about this plug-in; None where it is accepted."""
    dest = CATALOG[point].dest
    try:
        bind(Namespace(**{dest: [path] if CATALOG[point].plural else path}))
    except HookReport as report:
        (text,) = report.problems
        assert str(report) == f"1 plug-in problem, found before anything was started:\n\n{text}"
        return text
    return None


def source_of(point: str, signature: str, *, is_async: bool = False) -> str:
    if point in CLASSES and not is_async:
        own = "(self)" if signature == "()" else f"(self, {signature[1:]}"
        return f"class plug_in:\n    def __init__{own}: ...\n"
    return f"{'async ' if is_async else ''}def plug_in{signature}: ...\n"


def told(point: str, path: str, found: str, remedy: str, *, expected: bool = True) -> str:
    lines = [f"{CATALOG[point].flag} {path}", f"  found     {found}"]
    if expected:
        expected_text = expected_forms(CATALOG[point]).replace("\n", "\n" + 12 * " ")
        lines.append(f"  expected  {expected_text}")
    return "\n".join([*lines, f"  remedy    {remedy}"])


def of_kind(kind: str) -> list[str]:
    return [name for name, filled in CELLS if filled == kind]


@pytest.mark.parametrize("point", of_kind("missing_module"))
def test_missing_module(point: str, folder: Path) -> None:
    assert problem_of(point, "my_rewards.plug_in") == told(
        point,
        "my_rewards.plug_in",
        f"no module named 'my_rewards' on the import path (working directory: {os.getcwd()})",
        "put its folder on PYTHONPATH, or give the file: path/to/my_rewards.py:function",
        expected=False,
    )


@pytest.mark.parametrize("point", of_kind("missing_name"))
def test_missing_name(point: str, folder: Path) -> None:
    (folder / "mine.py").write_text("\n\ndef plug_in(): ...\n")
    assert problem_of(point, "mine.py:plugin") == told(
        point,
        "mine.py:plugin",
        "mine (mine.py) has no 'plugin'; it defines plug_in (mine.py:3)",
        "did you mean mine.py:plug_in (mine.py:3)?",
    )


@pytest.mark.parametrize("point", of_kind("raises_at_import"))
def test_raises_at_import(point: str, folder: Path) -> None:
    (folder / "mine.py").write_text("import json\n\nlimits = json.loads('{')\n")
    assert problem_of(point, "mine.py:plug_in") == told(
        point,
        "mine.py:plug_in",
        "importing it raised JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1) at mine.py:3: limits = json.loads('{')",
        "mend that line; the module must import by itself: python -c 'import ...'",
        expected=False,
    )


@pytest.mark.parametrize("point", of_kind("not_callable"))
@pytest.mark.parametrize(("value", "kind"), [("3", "an int"), ("None", "None"), ("'text'", "a str")])
def test_not_callable(point: str, value: str, kind: str, folder: Path) -> None:
    (folder / "mine.py").write_text(f"plug_in = {value}\n")
    targets = dict.fromkeys(form.target for form in CATALOG[point].forms)
    if "value" in targets:
        found, remedy = f"plug_in, {kind}, not a list", "name a list of dicts, one per tool"
    else:
        found = f"plug_in, {kind}, not a function or class"
        remedy = "name " + " or ".join(f"a {target}" for target in targets)
    assert problem_of(point, "mine.py:plug_in") == told(point, "mine.py:plug_in", found, remedy)


@pytest.mark.parametrize(
    ("point", "kind"), [cell for cell in CELLS if cell[1] in ("wrong_arity", "wrong_keyword")], ids="-".join
)
def test_wrong_signature(point: str, kind: str, folder: Path) -> None:
    signature, remedy = SIGNATURES[point][kind == "wrong_keyword"]
    is_async = CATALOG[point].awaited and point not in CLASSES
    (folder / "mine.py").write_text(source_of(point, signature, is_async=is_async))
    word = "class " if point in CLASSES else "async " if is_async else ""
    found = f"{word}plug_in{signature} at mine.py:1"
    assert problem_of(point, "mine.py:plug_in") == told(point, "mine.py:plug_in", found, remedy)


@pytest.mark.parametrize("point", of_kind("async_for_sync"))
def test_async_where_it_is_called_synchronously(point: str, folder: Path) -> None:
    """Refused before the start; accepted, and awaited, where the core awaits or may."""
    declared = CATALOG[point]
    form = next(form for form in declared.forms if form.target == "function" and not form.requires)
    signature = f"({', '.join([*form.positional, *(['*'] if form.keywords else []), *form.keywords])})"
    (folder / "mine.py").write_text(source_of(point, signature, is_async=True))
    if declared.awaited or declared.may_be_async:
        assert problem_of(point, "mine.py:plug_in") is None
        return
    found = f"async plug_in{signature} at mine.py:1, which is async; this plug point is called synchronously"
    assert problem_of(point, "mine.py:plug_in") == told(
        point, "mine.py:plug_in", found, "write `def` instead of `async def`"
    )


@pytest.mark.parametrize("point", of_kind("sync_for_async"))
def test_sync_where_it_is_awaited(point: str, folder: Path) -> None:
    """Accepted everywhere: where the core awaits, it runs in a thread."""
    declared = CATALOG[point]
    form = next(form for form in declared.forms if form.target == "function" and not form.requires)
    signature = f"({', '.join([*form.positional, *(['*'] if form.keywords else []), *form.keywords])})"
    (folder / "mine.py").write_text(f"def plug_in{signature}: ...\n")
    assert problem_of(point, "mine.py:plug_in") is None
    hook = getattr(bind(Namespace(**{declared.dest: "mine.py:plug_in"})), point)
    assert hook.in_thread == declared.awaited


# ---- what only some plug points can do wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "found", "remedy"),
    [
        ("async def get_samples(self, n): ...", "whose get_samples is async; it is called synchronously",
         "write `def get_samples`"),
        ("def get_samples(self): ...", "whose get_samples cannot take one argument: too many positional arguments",
         "make it `def get_samples(self, ...)`"),
        ("get_samples = 3", "without get_samples", "add the method"),
    ],
)  # fmt: skip
def test_a_data_source_with_a_wrong_method(method: str, found: str, remedy: str, folder: Path) -> None:
    others = "".join(f"    def {name}(self, x): ...\n" for name in ("add_samples", "save", "load"))
    (folder / "mine.py").write_text(
        f"class plug_in:\n    def __init__(self, args): ...\n{others}    {method}\n"
    )
    assert problem_of("data_source", "mine.py:plug_in") == told(
        "data_source", "mine.py:plug_in", f"class plug_in(args) at mine.py:1, {found}", remedy
    )


def test_a_wrong_rollout_function_is_said_once(folder: Path) -> None:
    """Evaluation falls back to it; the user gave one flag."""
    (folder / "mine.py").write_text("def plug_in(args): ...\n")
    with pytest.raises(HookReport) as caught:
        bind(Namespace(rollout_function_path="mine.py:plug_in", eval_function_path=None))
    assert [text.split()[0] for text in caught.value.problems] == ["--rollout-function-path"]
