"""The published helpers that have work of their own: memory, iterators, processes, launch scripts."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.errors import FlagError, MilesError, UsageError
from miles.utils import async_utils, memory_utils, wandb_utils
from miles.utils.context_utils import with_defer
from miles.utils.data import get_minimum_num_micro_batch_size
from miles.utils.external_utils import command_utils as U
from miles.utils.health_monitor import RolloutHealthMonitor
from miles.utils.iter_utils import chunk_named_params_by_size, group_by
from miles.utils.metric_checker import MetricChecker
from miles.utils.ray_utils import Box
from miles.utils.tensorboard_utils import _TensorboardAdapter
from miles.utils.train_dump_utils import save_debug_train_data
from miles.utils.typer_utils import dataclass_cli

# ---- small ones ------------------------------------------------------------------------------------------------------


def test_deferred_calls_run_also_after_an_error() -> None:
    calls: list[str] = []
    with pytest.raises(KeyError), with_defer(lambda: calls.append("block")):
        raise KeyError

    @with_defer(lambda: calls.append("function"))
    def work() -> int:
        assert "function" not in calls
        return 1

    assert work() == 1 and calls == ["block", "function"]


def test_group_by() -> None:
    assert group_by(range(5), key=lambda x: x % 2) == {0: [0, 2, 4], 1: [1, 3]}
    assert group_by([("b", 1), ("a", 2), ("b", 3)]) == {"b": [1, 3], "a": [2]}


def test_parameters_in_chunks() -> None:
    sizes = [4, 4, 8, 100, 4]  # bytes
    params = [(f"p{i}", torch.zeros(size // 4)) for i, size in enumerate(sizes)]
    chunks = [[name for name, _ in chunk] for chunk in chunk_named_params_by_size(iter(params), 12)]
    assert chunks == [["p0", "p1"], ["p2"], ["p3"], ["p4"]]
    assert not list(chunk_named_params_by_size([], 12))


@pytest.mark.parametrize(
    ("lengths", "budget", "number"), [([3, 4, 2], 5, 2), ([], 5, 0), ([9, 1], 5, 2), ([2, 4, 3, 1], 5, 2)]
)
def test_first_fit(lengths: list[int], budget: int, number: int) -> None:
    assert get_minimum_num_micro_batch_size(lengths, budget) == number


def test_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        memory = memory_utils.print_memory("after loading", clear_before_print=True)
    assert 0 < memory["free_GB"] < memory["total_GB"]
    assert memory["used_GB"] == pytest.approx(memory["total_GB"] - memory["free_GB"], abs=0.02)
    assert "memory after loading" in caplog.text


def test_a_box_hands_on_what_it_holds() -> None:
    inner = object()
    assert Box(inner).inner is inner


def test_the_shared_loop_is_the_module_s_async_loop() -> None:
    loop = async_utils.get_async_loop()
    assert async_utils.async_loop is loop
    with pytest.raises(AttributeError):
        async_utils.nothing  # noqa: B018


# ---- metrics and dumps -----------------------------------------------------------------------------------------------


def test_metric_checker() -> None:
    assert MetricChecker.maybe_create(Namespace(ci_metric_checker_key=None)) is None
    args = Namespace(ci_metric_checker_key="eval/a", ci_metric_checker_threshold=0.5)
    checker = MetricChecker.maybe_create(args)
    assert checker is not None
    checker.on_eval({"eval/a": 0.4})
    with pytest.raises(MilesError, match=r"best was 0\.4, expected at least 0\.5"):
        checker.dispose()
    checker.on_eval({"eval/a": 0.6})
    checker.on_eval({"eval/a": 0.1})
    checker.dispose()
    with pytest.raises(FlagError, match="one of eval/b"):
        checker.on_eval({"eval/b": 1.0})


def test_train_data_dump(tmp_path: Path) -> None:
    args = Namespace(save_debug_train_data=None)
    save_debug_train_data(args, rollout_id=3, rollout_data={})
    args.save_debug_train_data = str(tmp_path / "{rollout_id}_{rank}.pt")
    save_debug_train_data(args, rollout_id=3, rollout_data={"rewards": [1.0]})
    stored = torch.load(tmp_path / "3_0.pt", weights_only=True)
    assert stored == {"rollout_id": 3, "rank": 0, "rollout_data": {"rewards": [1.0]}}


def test_tensorboard_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path))
    args = Namespace(tb_project_name=None, tb_experiment_name=None)
    _TensorboardAdapter.clear_all_instances()
    adapter = _TensorboardAdapter(args)
    assert _TensorboardAdapter(Namespace()) is adapter
    adapter.log({"a/b": 0.5, "text": "no number"}, step=7)
    adapter.finish()
    _TensorboardAdapter.clear_all_instances()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("a/b")] == [(7, 0.5)]
    assert events.Tags()["scalars"] == ["a/b"]


def test_wandb_off_leaves_no_id() -> None:
    from miles.observe import tracking

    before = tracking.current()
    tracking.install(None)
    try:
        args = Namespace(use_wandb=False, use_tensorboard=True, wandb_run_id="old")
        wandb_utils.init_wandb_primary(args)
        assert args.wandb_run_id is None and args.use_tensorboard
        wandb_utils.init_wandb_secondary(args, router_addr="http://x")
    finally:
        tracking.install(before)


# ---- the health monitor ----------------------------------------------------------------------------------------------


class Engine:
    """Answers as it is told, and counts."""

    base_url = "http://engine"

    def __init__(self) -> None:
        self.answers, self.asked = True, 0
        self.changed = threading.Condition()

    async def healthy(self) -> bool:
        with self.changed:
            self.asked += 1
            self.changed.notify_all()
        if self.answers is None:
            import asyncio

            await asyncio.sleep(60)
        return bool(self.answers)

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.asked >= count, timeout=10), self.asked


def monitor(engine: Any) -> RolloutHealthMonitor:
    args = Namespace(
        rollout_health_check_interval=0.005, rollout_health_check_timeout=0.05, rollout_health_check_first_wait=0.0
    )
    return RolloutHealthMonitor(Namespace(client=engine), args)


def test_health_is_asked_between_resume_and_pause(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    watch = monitor(engine)
    assert not watch.is_checking_enabled()
    assert watch.start() and watch.start()
    assert not watch.is_checking_enabled()
    time.sleep(0.03)
    assert engine.asked == 0
    watch.resume()
    assert watch.is_checking_enabled()
    engine.wait_for(3)
    assert watch.healthy is True
    watch.pause()
    time.sleep(0.03)
    asked = engine.asked
    time.sleep(0.03)
    assert engine.asked == asked and not watch.is_checking_enabled()
    engine.answers = False
    watch.resume()
    engine.wait_for(asked + 3)
    watch.stop()
    assert watch.healthy is False
    assert caplog.text.count("does not answer its health check") == 1
    assert not any(thread.name == "miles-health" for thread in threading.enumerate())


def test_an_engine_that_never_answers_is_unhealthy() -> None:
    engine = Engine()
    engine.answers = None  # type: ignore[assignment]
    watch = monitor(engine)
    watch.start()
    watch.resume()
    engine.wait_for(2)
    watch.stop()
    assert watch.healthy is False


def test_no_engines_no_thread() -> None:
    watch = monitor(None)
    assert not watch.start()
    watch.stop()


# ---- launch scripts --------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    given: list[str] = []
    monkeypatch.setattr(U, "exec_command", lambda cmd, capture_output=False: given.append(cmd))
    return given


def test_execute_train(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before: list[int] = []
    U.execute_train(
        train_args='--lr 1e-6 \n--chat "{\\"a  b\\": 1}" --save $HOME/x ',
        num_gpus_per_node=8,
        megatron_model_type=None,
        before_ray_job_submit=lambda: before.append(len(commands)),
        extra_env_vars={"A": "1 2"},
        config=U.ExecuteTrainConfig(num_nodes=1, extra_env_vars="B=3 C='4 5'", cuda_core_dump=True),
    )
    assert before == [0]
    done = subprocess.run(
        ["bash", "-c", f"python() {{ :; }}; set -x; echo {commands[0]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    head, flags = done.split(" -m miles train ")
    assert head.startswith("env B=3 C=4 5 A=1 2 PYTHONPATH=") and head.endswith(sys.executable)
    assert "CUDA_ENABLE_COREDUMP_ON_EXCEPTION=1" in head
    assert flags.startswith('--lr 1e-6 --chat {"a  b": 1} --save /') and "$HOME" not in flags


def test_execute_train_takes_megatron_models(commands: list[str]) -> None:
    U.execute_train("--train-backend megatron --lr 1e-6", num_gpus_per_node=8, megatron_model_type="qwen3-4B")
    assert commands[0].endswith("-m miles train --train-backend megatron --lr 1e-6")


def test_execute_train_really_starts_miles(capfd: pytest.CaptureFixture[str]) -> None:
    U.execute_train("--help", num_gpus_per_node=1, megatron_model_type=None)
    assert "--custom-rm-path" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"megatron_model_type": "qwen3-4B", "train_args": "--train-backend fsdp"}, "'qwen3-4B' beside --train"),
        ({"config": U.ExecuteTrainConfig(num_nodes=2)}, "expected one node, got num_nodes=2"),
        ({"train_script": "nowhere/train_async.py"}, "no such file"),
    ],
)
def test_execute_train_says_what_one_machine_cannot_do(commands: list[str], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        U.execute_train(**{"train_args": "", "num_gpus_per_node": 8, "megatron_model_type": None, **given})
    assert commands == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: U.convert_checkpoint("Qwen3-4B", "qwen3-4B", 8),
        lambda: U.fp8_cast_bf16("/a", "/b"),
        lambda: U.hf_download_dataset("zhuzilin/gsm8k"),
    ],
)
def test_what_is_not_built_says_what_to_do_instead(call: Any) -> None:
    with pytest.raises(UsageError, match=r"--hf-checkpoint|--prompt-data"):
        call()


def test_nodes_come_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert U.ExecuteTrainConfig().num_nodes == 4


def test_wandb_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert U.get_default_wandb_args(__file__) == ""
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    flags = shlex.split(U.get_default_wandb_args("a/run_tiny.py", run_name_prefix="x", run_id="7"))
    assert flags == [
        "--use-wandb", "--wandb-project", "miles-run_tiny", "--wandb-group", "x_7", "--disable-wandb-random-suffix",
    ]  # fmt: skip


def test_environment_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, said in {"1": True, "TRUE": True, "0": False, "no": False, "": False}.items():
        monkeypatch.setenv("SOME_SWITCH", text)
        assert U.get_bool_env_var("SOME_SWITCH") is said
    monkeypatch.delenv("SOME_SWITCH")
    assert not U.get_bool_env_var("SOME_SWITCH") and U.get_bool_env_var("SOME_SWITCH", "true")
    monkeypatch.setenv("MILES_TEST_ENABLE_INFINITE_RUN", "true")
    assert U.get_env_enable_infinite_run()


def test_files(tmp_path: Path, commands: list[str]) -> None:
    path = Path(U.save_to_temp_file("a: ü\n", "yaml"))
    assert path.suffix == ".yaml" and path.read_text(encoding="utf-8") == "a: ü\n"
    path.unlink()
    U.rsync_simple("/from here", str(tmp_path))
    assert commands == [f"mkdir -p {tmp_path} && rsync -a '/from here'/ {tmp_path}"]
    assert (U.repo_base_dir / "miles" / "types.py").is_file()
    assert U.create_run_id() != ""


def test_no_nvlink_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(U.shutil, "which", lambda name: None)
    assert U.check_has_nvlink() is False
    monkeypatch.setattr(U.shutil, "which", lambda name: "/bin/nvidia-smi")
    for topology, said in {"GPU0 X NV18": True, "GPU0 X PHB NVME0": False}.items():
        monkeypatch.setattr(U, "exec_command", lambda cmd, capture_output, text=topology: text)
        assert U.check_has_nvlink() is said


@dataclass
class ScriptArgs:
    model_name: str = field(default="tiny", metadata={"help": "Which one."})
    steps: int = 3
    fast: bool = False
    extras: list[str] = field(default_factory=list)


def test_options_of_a_dataclass(monkeypatch: pytest.MonkeyPatch) -> None:
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    got: list[ScriptArgs] = []

    @dataclass_cli
    def launch(args: ScriptArgs) -> None:
        """Starts it."""
        got.append(args)

    app = typer.Typer()
    app.command()(launch)
    monkeypatch.setenv("MILES_SCRIPT_STEPS", "5")
    result = CliRunner().invoke(app, ["--model-name", "big", "--fast", "--extras", "a", "--extras", "b"])
    assert result.exit_code == 0, result.output
    assert got == [ScriptArgs("big", 5, True, ["a", "b"])]
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "Which one." in shown and "MILES_SCRIPT_STEPS" in shown and "Starts it." in shown
    launch(model_name="small")
    assert got[-1] == ScriptArgs("small")


def test_options_need_a_dataclass() -> None:
    pytest.importorskip("typer")
    with pytest.raises(UsageError, match="expected launch"):

        @dataclass_cli
        def launch(args: int) -> None: ...
