"""Which engines a run has: chosen by flags, refused where they cannot be had, told where a flag changes nothing."""

from __future__ import annotations

import pytest
from config_helpers import refusal, settings

from miles.config import engines
from miles.config import resolve as rules
from miles.config.run_config import RunConfig


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "local_gpus", lambda: 0)


def chosen(config: RunConfig) -> tuple[str, int]:
    return config.rollout.rollout_engine, config.cluster.rollout_num_gpus


CHOICES = [
    ([], ("embedded", 1)),
    (["--rollout-num-gpus", "3"], ("embedded", 3)),
    (["--rollout-engine", "sglang", "--rollout-num-gpus", "2"], ("sglang", 2)),
    (["--rollout-external", "--rollout-external-engine-addrs", "a:1", "b:2"], ("external", 2)),
    (["--rollout-external", "--rollout-external-engine-addrs", "http://[::1]:3"], ("external", 1)),
]


@pytest.mark.parametrize(("flags", "expected"), CHOICES, ids=lambda v: " ".join(map(str, v)))
def test_engines_follow_from_the_flags(flags: list[str], expected: tuple[str, int]) -> None:
    assert chosen(settings(*flags)) == expected


def test_with_gpus_and_sglang_sglang_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "local_gpus", lambda: 4)
    assert chosen(settings("--rollout-num-gpus", "4", "--sglang-python", "/opt/sglang/bin/python")) == ("sglang", 4)
    assert chosen(settings("--rollout-num-gpus", "1"))[0] == "embedded"
    flags = ("--rollout-engine", "sglang", "--rollout-num-gpus", "4", "--rollout-num-gpus-per-engine", "2")
    assert chosen(settings(*flags)) == ("sglang", 4)
    assert "at most 4" in refusal("--rollout-engine", "sglang", "--rollout-num-gpus", "8")
    assert "has a GPU" in refusal("--use-fault-tolerance")


REFUSED = [
    (["--rollout-num-gpus", "3", "--rollout-num-gpus-per-engine", "2", "--rollout-engine", "sglang"], "a multiple of"),
    (["--rollout-num-gpus", "2", "--rollout-num-gpus-per-engine", "2"], "computes on one device"),
    (["--rollout-external"], "HOST:PORT"),
    (["--rollout-external-engine-addrs", "a:1"], "needs --rollout-external"),
    (["--rollout-external", "--rollout-external-engine-addrs", "a:1", "http://a:1"], "named twice"),
    (["--rollout-external", "--rollout-external-engine-addrs", "a"], "HOST:PORT"),
    (["--rollout-external", "--rollout-external-engine-addrs", "a:b"], "HOST:PORT"),
    (["--rollout-external", "--rollout-external-engine-addrs", "ftp://a:1"], "HOST:PORT"),
    (["--rollout-external", "--rollout-external-engine-addrs", "https://a:1"], "HOST:PORT"),
    (["--rollout-external", "--rollout-external-engine-addrs", "a:1", "--rollout-engine", "sglang"], "excludes"),
    (["--rollout-engine", "sglang", "--true-on-policy-mode"], "needs --rollout-engine embedded"),
    (["--sglang-router-ip", "10.0.0.1", "--sglang-router-port", "30000"], "inside its process"),
    (["--sglang-router-ip", "10.0.0.1", "--rollout-num-gpus", "2"], "needs --sglang-router-port"),
]


@pytest.mark.parametrize(("flags", "says"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_what_cannot_be_had_is_refused(flags: list[str], says: str) -> None:
    assert says in refusal(*flags)


UNREAD = [
    (["--rollout-health-check-timeout", "5"], ["--use-fault-tolerance"]),
    (["--rollout-health-check-interval", "5"], ["--rollout-num-gpus", "2"]),
    (["--engine-start-timeout-s", "5"], ["--use-fault-tolerance"]),
    (["--check-weight-update-equal"], ["--rollout-num-gpus", "2"]),
    (["--update-weight-transport", "disk"], ["--rollout-engine", "sglang"]),
]


@pytest.mark.parametrize(("flags", "with_which"), UNREAD, ids=lambda v: " ".join(v))
def test_a_flag_that_nobody_reads_is_told(flags: list[str], with_which: list[str]) -> None:
    shown = flags[0]
    assert any(n.startswith(f"{shown}: no meaning here") for n in settings(*flags).notices)
    assert not any(n.startswith(f"{shown}: no meaning here") for n in settings(*flags, *with_which).notices)


def test_one_embedded_engine_is_a_process_of_its_own_where_it_may_have_to_be_started_anew() -> None:
    assert not engines.in_processes("embedded", 1, fault_tolerance=False)
    assert engines.in_processes("embedded", 1, fault_tolerance=True)
    assert engines.in_processes("embedded", 2, fault_tolerance=False)
    assert engines.in_processes("external", 1, fault_tolerance=False)
