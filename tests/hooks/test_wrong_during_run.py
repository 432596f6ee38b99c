"""Wrong plug-ins while a run goes: each cell of the table, through the real call sites, with the card word for word."""

from __future__ import annotations

import asyncio
import inspect
import re
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hooks_helpers import answered
from hooks_stage import Stage
from wrong_during_run import KINDS, LIMIT_S, TABLE, Harmless, Senseless, Wrong
from wrong_plug_ins import GOOD, failing_second_call

from miles.errors import HookError
from miles.hooks import CATALOG, Hook, bind, function_registry
from miles.hooks.watchdog import Watchdog
from miles.rollout.loop_thread import get_async_loop

MakeStage = Callable[..., Stage]
HERE = Path(__file__).parent

FLAGS: dict[str, tuple[str, ...]] = {
    "custom_loss_function": ("--loss-type", "custom_loss"),
    "custom_tis_function": ("--use-tis", "--micro-batch-size", "4"),
    "custom_pg_loss_reducer_function": ("--micro-batch-size", "4"),
}
EVALUATES = ("eval_function", "custom_eval_rollout_log_function")
TRAINS = (
    "rollout_data_postprocess",
    "custom_loss_function",
    "custom_tis_function",
    "custom_pg_loss_reducer_function",
)
# What is called here directly, for want of a call site: its arguments.
DIRECT: dict[str, Any] = {
    "custom_agent_function": {"base_url": "http://x", "prompt": "p", "request_kwargs": {}},
    "generate_execute_tool_function": ("add", {"a": 1}),
    "custom_megatron_init": (Namespace(),),
    "custom_megatron_before_log_prob_hook": (Namespace(), [], ""),
    "custom_megatron_before_train_step_hook": (Namespace(), 0, 0, [], None, None),
    "custom_megatron_post_save_hook": (Namespace(), 0, "ckpt", None),
    "custom_model_provider": (True, True),
}
# What runs when a class or a list is named.
NOT_CALLED = ("miles_router_middleware", "generate_tool_specs")


def cells(kind: type[Any]) -> list[Any]:
    return [
        pytest.param(point, cell, id=f"{point}-{name}")
        for point, row in TABLE.items()
        for name, cell in row.items()
        if isinstance(cell, kind)
    ]


def test_every_cell_is_filled() -> None:
    assert set(TABLE) == set(GOOD) == set(CATALOG)
    for point, row in TABLE.items():
        assert tuple(row) == KINDS, point
        for cell in row.values():
            assert isinstance(cell, Wrong) or len(cell.because) > 10


# ---- the stage of each plug point ------------------------------------------------------------------------------------


@contextmanager
def watched(hooks: Any) -> Iterator[None]:
    """As in a run: calls that do not await are interrupted."""
    loop = get_async_loop()
    stuck: list[str] = []
    with Watchdog(hooks, [(loop.loop, loop.thread_id)], on_stuck=stuck.append):
        yield
    assert not stuck, stuck


def run_twice(point: str, plug_in: Any, stage: MakeStage, *flags: object) -> list[Any]:
    """What two rollouts, evaluations or calls make of `plug_in`: batches, reports, metrics."""
    if point in DIRECT:
        return call_twice(point, plug_in, *flags)
    if inspect.isclass(plug_in):
        s = stage(*flags, data_source=plug_in)
    else:
        s = stage(*FLAGS.get(point, ()), *flags, **{"eval_function": GOOD["eval_function"], point: plug_in})
    with watched(s.hooks):
        return [once(point, s, i) for i in range(2)]


def once(point: str, s: Stage, rollout_id: int) -> Any:
    if point in EVALUATES:
        report = s.evaluate(rollout_id + 1)
        assert report is not None
        return report.scores
    if point == "buffer_filter":
        first = 100 * rollout_id
        s.manager.data_source.add_samples([[answered(first + i, group_index=first, reward=1.0 * i) for i in range(2)]])
    report = s.rollout(rollout_id)
    batch = report.shards[0]
    made = [batch.tokens.tolist(), batch.raw_reward]
    if point in TRAINS:
        s.train(report, rollout_id)
    return [*made, batch.loss_masks.tolist(), [float(r) for r in batch.rewards]]


def call_twice(point: str, plug_in: Any, *flags: object) -> list[Any]:
    limit = LIMIT_S if flags else None
    with function_registry.temporary(f"test:{point}", plug_in):
        hooks = bind(Namespace(**{CATALOG[point].dest: f"test:{point}"}), timeout_s=limit)
    hook: Hook = getattr(hooks, point)
    given = DIRECT[point]
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    with watched(hooks):
        for _ in range(2):
            asyncio.run(hook.call_async(*args, **kwargs)) if hook.point.awaited else hook(*args, **kwargs)
    return [hook.stats.calls]


# ---- the card --------------------------------------------------------------------------------------------------------

CARD = re.compile(
    r"(?P<flag>--\S+) test:(?P<path>\w+) failed at (?P<file>\S+):(?P<line>\d+)\n"
    r"  (?P=line) \| (?P<source>.*)\n"
    r"(?P<says>(?:  (?!sample  |hint  |policy  ).*\n)+)"
    r"(?:  sample    (?P<sample>.*)\n)?"
    r"(?:  hint      (?P<hint>.*)\n)?"
    r"  policy    (?P<policy>.*)"
    r"(?:\n  (?:replay    |trace     ).*)?"
)


def card_of(error: HookError, point: str) -> tuple[str, str]:
    """Message and hint of a card that names the right flag and a line of the user's, and shows no stack."""
    card = CARD.fullmatch(str(error))
    assert card is not None, str(error)
    assert (card["flag"], card["path"]) == (CATALOG[point].flag, point)
    file = Path(card["file"])
    assert file.name in ("wrong_plug_ins.py", "wrong_during_run.py"), "the user's own file"
    lines = (HERE / file.name).read_text().splitlines()
    assert lines[int(card["line"]) - 1].strip() == card["source"]
    assert "Traceback" not in str(error) and "miles/" not in card["says"]
    return textwrap.dedent(card["says"]).rstrip("\n"), card["hint"] or ""


@pytest.mark.parametrize(("point", "cell"), cells(Wrong))
def test_wrong(point: str, cell: Wrong, stage: MakeStage) -> None:
    with pytest.raises(HookError) as caught:
        run_twice(point, cell.plug_in, stage, "--hook-timeout-s", LIMIT_S)
    assert card_of(caught.value, point) == (cell.says, cell.hint)


@pytest.mark.parametrize("point", [p for p in CATALOG if p not in NOT_CALLED])
def test_the_second_call_raises(point: str, stage: MakeStage) -> None:
    with pytest.raises(HookError) as caught:
        run_twice(point, failing_second_call(GOOD[point]), stage)
    assert card_of(caught.value, point) == ("ValueError: the second call", "")
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(("point", "cell"), cells(Harmless))
def test_harmless(point: str, cell: Harmless, stage: MakeStage) -> None:
    """The batches are the same as with a good plug-in, and every weight is a number."""
    got = run_twice(point, cell.plug_in, stage)
    assert got == run_twice(point, GOOD[point], stage)
    if point in TRAINS:
        s = stage()
        assert all(torch.isfinite(p).all() for p in s.actor.backend.params)  # type: ignore[attr-defined]


@pytest.mark.parametrize("point", [p for p, row in TABLE.items() if Senseless in map(type, row.values())])
def test_the_good_one_is_good(point: str, stage: MakeStage) -> None:
    if point not in NOT_CALLED:
        assert run_twice(point, GOOD[point], stage)
