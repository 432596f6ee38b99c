"""What is asked for and cannot be done, how errors travel between processes, and the engine's memory."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from miles.config import parse, resolve
from miles.config.layout import ParallelLayout
from miles.errors import CheckpointError, FlagError, HookError, MilesError, TrainerError
from miles.loss.parallel_state import ParallelState
from miles.trainer.commands import Failed
from miles.trainer.group import Death, Process, RankGroup, portable, rank_environment
from miles.types import Failure
from miles.weights.gather import Held, buckets, rows_of
from miles.weights.shared_memory import SharedMemory, anonymous_file, views

BASE = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "base"
FLAGS = [
    "--hf-checkpoint", str(BASE), "--prompt-data", "x.jsonl", "--num-rollout", "1", "--rollout-batch-size", "4",
    "--n-samples-per-prompt", "4", "--rm-type", "math", "--global-batch-size", "16",
]  # fmt: skip


def settings(*flags: str) -> list[str]:
    return parse([*FLAGS, *flags])[0].notices


@pytest.mark.parametrize(
    ("flags", "gpus", "sentence"),
    [
        (["--actor-num-gpus-per-node", "3"], 0, "expected a multiple of 3"),
        (["--actor-num-gpus-per-node", "4"], 2, "expected at most 2, the GPUs of this machine"),
        (["--actor-num-gpus-per-node", "2", "--distributed-backend", "nccl"], 0, "expected gloo"),
        (["--actor-num-gpus-per-node", "2", "--distributed-backend", "mpi"], 2, "expected nccl or gloo"),
        (["--fsdp-param-dtype", "bfloat16"], 0, "needs several trainer processes"),
        (["--fsdp-cpu-offload"], 1, "needs several trainer processes"),
        (
            ["--true-on-policy-mode", "--fsdp-param-dtype", "bfloat16", "--actor-num-gpus-per-node", "2"],
            0,
            "--true-on-policy-mode: needs --fsdp-param-dtype float32",
        ),
    ],
)
def test_what_cannot_be_done(flags: list[str], gpus: int, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "local_gpus", lambda: gpus)
    with pytest.raises(FlagError, match=sentence):
        settings(*flags)


def test_a_size_that_is_not_given_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "local_gpus", lambda: 4)
    config, args = parse(FLAGS)
    assert config.cluster.world_size == args.world_size == 1
    config, args = parse([*FLAGS, "--actor-num-gpus-per-node", "4"])
    assert config.cluster.world_size == args.world_size == 4 and config.cluster.distributed_backend == "nccl"


@pytest.mark.parametrize("flags", [["--balance-data"], ["--distributed-timeout-minutes", "3"]], ids=" ".join)
def test_flags_of_several_processes(flags: list[str]) -> None:
    assert any(n.startswith(" ".join(flags)) and "no meaning here" in n for n in settings(*flags))
    assert not any(n.startswith(flags[0]) for n in settings(*flags, "--actor-num-gpus-per-node", "2"))


def test_errors_keep_their_kind_and_words() -> None:
    failure = Failure("--x", "p", "exception", "m", "f.py:3", None, None)
    for error in (FlagError("--lr", given=-1, expected="more"), HookError(failure, "the card"), CheckpointError("c")):
        sent: Failed = pickle.loads(pickle.dumps(Failed.of(error, "trace")))
        back = sent.error("rank 1")
        assert type(back) is type(error) and str(back) == str(error) and back.exit_status == error.exit_status
    assert isinstance(back, MilesError)
    other = Failed.of(ValueError("mine"), "Traceback ... ValueError: mine").error("rank 1")
    assert isinstance(other, TrainerError) and other.consequence and "rank 1 failed:\nTraceback" in str(other)


def test_what_is_no_consequence_is_told_before_what_may_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankGroup, "close", lambda self, at_once: None)
    group = RankGroup(*parse(FLAGS), [], anonymous_file(), Path("nowhere"))
    lost, cause = TrainerError("lost my neighbour", consequence=True), TrainerError("killed")
    with pytest.raises(TrainerError, match="killed"):
        group._fail({0: lost, 1: cause})


def test_a_death_is_told_before_what_a_plug_in_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that waits for a rank which is gone fails, and is often heard of first; where nobody died, it is the
    cause."""
    monkeypatch.setattr(RankGroup, "close", lambda self, at_once: None)
    group = RankGroup(*parse(FLAGS), [], anonymous_file(), Path("nowhere"))
    group.processes = [Namespace(rank=0), Namespace(rank=1)]
    card = HookError(Failure("--x", "p", "exception", "m", "f.py:3", None, None), "the card")
    heard: list[dict[int, MilesError]] = [{1: Death("rank 1 was killed")}]
    monkeypatch.setattr(group, "_receive", lambda waiting, results, timeout_s: heard.pop() if heard else {})
    with pytest.raises(Death, match="rank 1 was killed"):
        group._fail({0: card})
    with pytest.raises(HookError, match="the card"):
        group._fail({0: card})


def test_one_rank_writes_for_all_that_hold_its_samples() -> None:
    layout = ParallelLayout(16, tensor=2, context=2, pipeline=2)
    states = [
        ParallelState(
            tp_rank=layout.tp_rank(rank), cp_rank=layout.cp_rank(rank), is_pp_last_stage=layout.is_last_stage(rank)
        )
        for rank in range(16)
    ]
    speaking = [rank for rank, state in enumerate(states) if state.speaks]
    assert speaking == [rank for rank in range(16) if layout.reports(rank)]
    assert [layout.dp_rank(rank) for rank in speaking] == [0, 1]


def test_args_that_no_other_process_can_have() -> None:
    with pytest.raises(FlagError, match=r"args\.mine"):
        portable(Namespace(lr=1.0, mine=lambda: None))


def test_cores_are_shared_and_the_network_is_loopback() -> None:
    torch.set_num_threads(1)
    found = rank_environment({"OMP_NUM_THREADS": "8"}, 1, 2, "cpu")
    assert found["OMP_NUM_THREADS"] == "1" and found["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert rank_environment({"GLOO_SOCKET_IFNAME": "eth7"}, 1, 2, "cpu")["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.parametrize(("rows", "size"), [(41, 4), (2, 4), (5, 4), (0, 2), (8, 2)])
def test_rows_are_cut_as_torch_cuts_them(rows: int, size: int) -> None:
    lengths = [len(part) for part in torch.arange(rows).chunk(size)] if rows else []
    lengths += [0] * (size - len(lengths))
    assert [end - begin for begin, end in (rows_of(rows, size, rank) for rank in range(size))] == lengths


def test_buckets_hold_at_most_their_bytes() -> None:
    weights = {"a": torch.zeros(10), "b": torch.zeros(10), "c": torch.zeros(100), "d": torch.zeros(1).double()}
    assert list(buckets(weights, 80)) == [["a", "b"], ["c"], ["d"]]


def test_the_engine_s_memory_is_the_trainer_s(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3, 5), "b": torch.arange(4), "empty": torch.zeros(0, 2)}
    fd = anonymous_file()
    transport = SharedMemory(fd, bucket_bytes=16)
    layout, size = transport.share(Held(weights))
    seen = views(fd, layout, size)
    assert all(torch.equal(seen[name], tensor) for name, tensor in weights.items())
    transport.update(Held({name: tensor + 1 for name, tensor in weights.items()}), 2)
    assert all(torch.equal(seen[name], tensor + 1) for name, tensor in weights.items())
    os.close(fd)


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "miles").mkdir()
    (tmp_path / "miles" / "__init__.py").write_text("raise ImportError('out of order')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = Process(1, 2, tmp_path / "ranks" / "rank_1.log", environment, [])
    try:
        process.ended_within(60)
        text = str(process.epitaph())
        assert "rank 1 of the trainer's 2 processes ended with exit status 1" in text and "out of order" in text
        assert "out of order" in (tmp_path / "ranks" / "rank_1.log").read_text()
    finally:
        process.kill()
        process.connection.close()
