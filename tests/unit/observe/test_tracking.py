"""Trackers: the record always, W&B and TensorBoard behind their flags, one tracker per process."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles.errors import FlagError
from miles.observe import tracking
from miles.observe.record import RunRecord, read_metrics
from miles.observe.tracking import Tracker
from miles.utils import tracking_utils


def settings(**changes: Any) -> Namespace:
    values: dict[str, Any] = {
        "use_wandb": False, "wandb_mode": None, "wandb_dir": None, "wandb_key": None, "wandb_host": None,
        "wandb_team": None, "wandb_group": None, "wandb_project": None, "wandb_random_suffix": True,
        "wandb_run_id": None, "use_tensorboard": False, "tb_project_name": None, "tb_experiment_name": None,
    }  # fmt: skip
    return Namespace(**(values | changes))


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracking.install(None)
    yield
    tracking.install(None)


def missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))


class FakeWandb(types.ModuleType):
    """As much of wandb as is called, with a note of each call."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.calls: list[tuple[str, Any]] = []
        self.refuses = False
        self.Settings = dict

    def login(self, **options: Any) -> None:
        self.calls.append(("login", options))

    def init(self, **options: Any) -> FakeWandb:
        if self.refuses:
            raise self.Error("no API key.")
        self.calls.append(("init", options))
        return self

    id = "run42"

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define", (name, step_metric)))

    def log(self, metrics: dict[str, Any]) -> None:
        self.calls.append(("log", metrics))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.calls if name == kind]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_the_record_gets_every_metric(tmp_path: Path) -> None:
    with RunRecord(tmp_path / "r") as run, Tracker.open(settings(), run) as tracker:
        tracker.log({"note": 1})
        tracker.rollout_id = 3
        tracker.log({"rollout/step": 3, "rollout/x": 0.5}, "rollout/step")
        tracker.log({"train/step": 5}, "train/step", rollout_id=2)
    lines = [{k: v for k, v in line.items() if k != "_time"} for line in read_metrics(tmp_path / "r")]
    assert lines == [
        {"note": 1},
        {"_rollout_id": 3, "rollout/step": 3, "rollout/x": 0.5},
        {"_rollout_id": 2, "train/step": 5},
    ]


def test_plug_ins_reach_the_tracker_of_the_run(tmp_path: Path) -> None:
    args = settings(wandb_run_id="stale")
    with RunRecord(tmp_path / "r") as run, Tracker.open(settings(), run) as tracker:
        tracking.install(tracker)
        tracking_utils.init_tracking(args, primary=False, router_addr="http://127.0.0.1:1")
        tracking_utils.log(args, {"rollout/step": 0, "mine": 1}, step_key="rollout/step")
        assert tracking.current() is tracker
    assert args.wandb_run_id is None
    assert read_metrics(tmp_path / "r")[0]["mine"] == 1


def test_outside_a_run_metrics_become_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tracking_utils.log(settings(), {"rollout/step": 0, "mine": 1}, "rollout/step")
    assert "'mine': 1" in caplog.text


def test_missing_packages_are_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "wandb")
    with pytest.raises(
        FlagError, match=r"--use-wandb: the package wandb is not installed.*pip install 'miles\[wandb\]'"
    ):
        Tracker.open(settings(use_wandb=True))
    missing(monkeypatch, "tensorboard")
    with pytest.raises(FlagError, match=r"--use-tensorboard: .*pip install 'miles\[tensorboard\]'"):
        Tracker.open(settings(use_tensorboard=True, tb_project_name="p"))


# ---- W&B -------------------------------------------------------------------------------------------------------


def test_wandb_primary(wandb: FakeWandb, tmp_path: Path) -> None:
    args = settings(
        use_wandb=True, wandb_key="secret", wandb_host="h", wandb_team="t", wandb_group="g", wandb_project="p",
        wandb_dir=str(tmp_path / "wb"), wandb_random_suffix=False,
    )  # fmt: skip
    tracking_utils.init_tracking(args)
    tracking_utils.log(args, {"train/step": 1, "train/loss": 0.5}, "train/step")
    tracker = tracking.current()
    assert tracker is not None
    tracker.close()
    assert args.wandb_run_id == "run42"
    assert wandb.of("login") == [{"key": "secret", "host": "h"}]
    (init,) = wandb.of("init")
    assert (init["entity"], init["project"], init["group"], init["name"]) == ("t", "p", "g", "g-RANK_0")
    assert init["settings"] == {"mode": "shared", "x_primary": True}
    assert "secret" not in str(init["config"]) and init["config"]["wandb_project"] == "p"
    assert ("perf/*", "rollout/step") in wandb.of("define") and ("eval/*", "eval/step") in wandb.of("define")
    assert wandb.of("log") == [{"train/step": 1, "train/loss": 0.5}]
    assert wandb.of("finish") == [None]
    assert (tmp_path / "wb").is_dir()


def test_wandb_groups_get_a_suffix(wandb: FakeWandb) -> None:
    Tracker.open(settings(use_wandb=True, wandb_group="g"))
    Tracker.open(settings(use_wandb=True, wandb_group="g"))
    first, second = (init["group"] for init in wandb.of("init"))
    assert first.startswith("g_") and second.startswith("g_") and first != second


def test_wandb_offline(wandb: FakeWandb) -> None:
    Tracker.open(settings(use_wandb=True, wandb_mode="offline", wandb_key="k"))
    assert wandb.of("login") == [] and "settings" not in wandb.of("init")[0]


def test_other_processes_attach_by_id(wandb: FakeWandb) -> None:
    assert Tracker.open(settings(use_wandb=True), primary=False).sinks == []
    Tracker.open(settings(use_wandb=True, wandb_run_id="run42", use_tensorboard=True), primary=False)
    (init,) = wandb.of("init")
    assert init["id"] == "run42" and init["settings"]["x_primary"] is False


def test_a_refusal_of_wandb_is_a_flag_error(wandb: FakeWandb) -> None:
    wandb.refuses = True
    with pytest.raises(FlagError, match=r"W&B did not start: no API key\. Check --wandb-key .*--wandb-mode offline"):
        Tracker.open(settings(use_wandb=True))


# ---- TensorBoard -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "changes", "expected"),
    [
        ("/tb", {}, "/tb"),
        ("/tb", {"tb_project_name": "p"}, "/tb"),
        (None, {"tb_project_name": "p", "tb_experiment_name": "e"}, "tensorboard_log/p/e"),
    ],
)
def test_tensorboard_directory(
    monkeypatch: pytest.MonkeyPatch, environment: str | None, changes: dict[str, str], expected: str
) -> None:
    if environment:
        monkeypatch.setenv("TENSORBOARD_DIR", environment)
    assert tracking.tensorboard_directory(settings(**changes)) == expected


def test_tensorboard_without_experiment_takes_the_time() -> None:
    *head, last = Path(tracking.tensorboard_directory(settings(tb_project_name="p"))).parts
    assert head == ["tensorboard_log", "p"] and len(last) == len("20261123_060120")


def test_tensorboard_needs_a_directory() -> None:
    with pytest.raises(FlagError, match=r"--use-tensorboard: .*--tb-project-name.*TENSORBOARD_DIR"):
        Tracker.open(settings(use_tensorboard=True))


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    scalars: list[Any] = []

    class SummaryWriter:
        def __init__(self, directory: str) -> None:
            scalars.append(directory)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            scalars.append((key, value, step))

        def flush(self) -> None:
            pass

        close = flush

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: find("json" if name == "tensorboard" else name)
    )
    return scalars


def test_tensorboard_gets_numbers_at_their_step(tensorboard: list[Any]) -> None:
    with Tracker.open(settings(use_tensorboard=True, tb_project_name="p", tb_experiment_name="e")) as tracker:
        tracker.log({"rollout/step": 5, "rollout/x": 0.5, "rollout/text": "no number"}, "rollout/step")
        with pytest.raises(KeyError, match="TensorBoard needs the step"):
            tracker.log({"rollout/x": 0.5}, "rollout/step")
    assert tensorboard == ["tensorboard_log/p/e", ("rollout/x", 0.5, 5)]


def test_skipped_steps_are_told_at_each_doubling(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker()
    with caplog.at_level(logging.WARNING, logger="miles.observe.tracking"):
        for step in range(9):
            skipped = float(step != 4)
            tracker.log({"train/skipped_step": skipped, "train/grad_norm": float("nan")}, rollout_id=step)
    assert [m.split(":")[0] for m in caplog.messages] == ["rollout 0", "rollout 1", "rollout 3", "rollout 8"]
    assert "the gradient is not finite (norm nan, loss None)" in caplog.messages[0]
    assert "8 skipped so far" in caplog.messages[-1]
