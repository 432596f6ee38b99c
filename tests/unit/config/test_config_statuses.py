"""What this version and this machine can honour: substitutes, notices, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from config_helpers import refusal, settings, value_of

from miles.config import resolve as rules
from miles.config.flags import Flag, Status
from miles.config.machine import local_gpus
from miles.config.sections import FLAGS

SUBSTITUTES = [
    ("train_backend", "fsdp"),
    ("actor_num_gpus_per_node", 1),
    ("num_gpus_per_node", 1),
    ("distributed_backend", "gloo"),
    ("attn_implementation", "sdpa"),
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "local_gpus", lambda: 0)


@pytest.mark.parametrize(("name", "expected"), SUBSTITUTES)
def test_a_default_that_cannot_be_honoured_is_substituted_with_a_notice(name: str, expected: object) -> None:
    config = settings()
    assert value_of(config, name) == expected
    assert config.origins[name] == "substituted"
    flag = FLAGS[name]
    (notice,) = [n for n in config.notices if n.startswith(flag.option + ":")]
    assert f"{expected!r} in place of the default {flag.default!r}" in notice


def test_substitutes_of_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "local_gpus", lambda: 4)
    config = settings()
    assert config.cluster.distributed_backend == "nccl" and config.cluster.num_gpus_per_node == 4


def test_what_is_given_is_not_substituted() -> None:
    config = settings("--train-backend", "fsdp", "--distributed-backend", "mpi")
    assert config.cluster.distributed_backend == "mpi" and config.origins["train_backend"] == "command line"
    assert not any(n.startswith("--train-backend") for n in config.notices)


def test_there_is_at_least_one_engine() -> None:
    assert settings().cluster.rollout_num_gpus == 1
    assert settings("--rollout-num-gpus", "0").cluster.rollout_num_gpus == 1


NOT_BUILT = [
    ["--actor-num-nodes", "2"],
    ["--max-staleness", "1"],
    ["--launcher", "ray"],
    ["--fp16"],
    ["--sglang-ep-size", "2"],
    ["--profile-target", "train_actor", "train_log_probs"],
]


@pytest.mark.parametrize("flags", NOT_BUILT, ids=" ".join)
def test_not_built_yet(flags: list[str]) -> None:
    text = refusal(*flags)
    assert FLAGS_BY_ANY_NAME[flags[0]].option in text and "is not built yet." in text


FLAGS_BY_ANY_NAME: Mapping[str, Flag] = {name: f for f in FLAGS.values() for name in (f.option, *f.aliases)}


def test_everything_that_is_not_built_is_named_at_once() -> None:
    text = refusal("--use-pytorch-profiler", "--max-staleness", "1", "--fp16")
    assert len(text.splitlines()) == 3


NO_MEANING = [["--colocate"], ["--offload"], ["--balance-data"], ["--distributed-backend", "mpi"], ["--gamma", "0.9"]]
NO_MEANING += [["--critic-num-nodes", "1"], ["--critic-num-gpus-per-node", "2"]]


@pytest.mark.parametrize("flags", NO_MEANING, ids=" ".join)
def test_no_meaning_here(flags: list[str]) -> None:
    (notice,) = [n for n in settings(*flags).notices if n.startswith(" ".join(flags))]
    assert "no meaning here" in notice


UNREAD = [
    (["--lambd", "0.9"], ["--advantage-estimator", "ppo"]),
    (["--gamma", "0.9"], ["--advantage-estimator", "reinforce_plus_plus", "--normalize-advantages"]),
    (["--critic-lr", "0.1"], ["--advantage-estimator", "ppo"]),
    (["--num-critic-only-steps", "2"], ["--advantage-estimator", "ppo"]),
    (["--kl-coef", "0.1", "--ref-load", "m"], ["--advantage-estimator", "ppo"]),
    (["--kl-loss-coef", "0.1"], ["--use-kl-loss", "--ref-load", "m"]),
    (["--use-unbiased-kl"], ["--use-kl-loss", "--ref-load", "m"]),
    (["--kl-loss-type", "k3"], ["--use-kl-loss", "--ref-load", "m"]),
    (["--ref-load", "m"], ["--use-kl-loss"]),
    (["--ref-update-interval", "2"], ["--use-kl-loss", "--ref-load", "m"]),
    (["--opsm-delta", "0.1"], ["--use-opsm"]),
]


@pytest.mark.parametrize(("flags", "with_which"), UNREAD, ids=lambda flags: " ".join(flags))
def test_flags_that_nothing_reads(flags: list[str], with_which: list[str]) -> None:
    """A notice without the flags that make something read them, none with them."""
    said = [n for n in settings(*flags).notices if n.startswith(flags[0])]
    assert len(said) == 1 and "no meaning here" in said[0]
    assert not any(n.startswith(flags[0]) for n in settings(*flags, *with_which).notices)


@pytest.mark.parametrize("flags", [["--gamma", "1.0"], ["--kl-coef", "0.0"], ["--value-clip", "0.2"]], ids=" ".join)
def test_the_default_may_always_be_given(flags: list[str]) -> None:
    assert not any(n.startswith(flags[0]) for n in settings(*flags).notices)


def test_every_status_says_why() -> None:
    for flag in FLAGS.values():
        status: Status = flag.status
        if status.kind == "effective":
            assert not status.sentence
        else:
            assert status.sentence, flag.option
            assert status.sentence.endswith(".") == (status.kind == "no_meaning_here"), flag.option


@pytest.mark.parametrize(
    ("files", "visible", "expected"),
    [
        ([], None, 0),
        (["dev/nvidia0", "dev/nvidia1", "dev/nvidiactl"], None, 2),
        (["dev/nvidia0", "dev/nvidia1"], "1", 1),
        (["dev/nvidia0"], "", 0),
        (["dev/nvidia0"], "-1", 0),
        (["proc/driver/nvidia/gpus/0000:01:00.0"], None, 1),
        ([], "0,1", 0),
    ],
)
def test_local_gpus(tmp_path: Path, files: list[str], visible: str | None, expected: int) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert local_gpus(tmp_path, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected
