"""The published helper paths: what they re-export is what the core has, and the few helpers of their own work."""

from __future__ import annotations

import asyncio
import importlib
import socket
import subprocess
import threading
import time

import pytest

from miles.utils import misc


@pytest.mark.parametrize(
    ("published", "core", "names"),
    [
        ("miles.utils.data", "miles.rollout.dataset", "Dataset read_file filter_long_prompt"),
        ("miles.utils.mask_utils", "miles.rollout.loss_mask", "MultiTurnLossMaskGenerator get_response_lengths"),
        ("miles.utils.async_utils", "miles.rollout.loop_thread", "run get_async_loop AsyncLoopThread"),
        ("miles.utils.types", "miles.types", "Sample ParamInfo RolloutBatch MultimodalType MultimodalTypes"),
        ("miles.rollout.base_types", "miles.types", "RolloutFnTrainInput RolloutFnEvalOutput GenerateFnInput"),
        ("miles.rollout.filter_hub.base_types", "miles.types", "DynamicFilterOutput"),
        ("miles.utils.misc", "miles.hooks", "load_function function_registry FunctionRegistry"),
        (
            "miles.utils.processing_utils",
            "miles.rollout.tokenizer",
            "load_tokenizer load_processor process_vision_info encode_image_for_rollout_engine DEFAULT_PATCH_SIZE",
        ),
    ],
)
def test_published_paths_lead_to_the_core(published: str, core: str, names: str) -> None:
    shim, origin = importlib.import_module(published), importlib.import_module(core)
    for name in names.split():
        assert getattr(shim, name) is getattr(origin, name)
        assert name in shim.__all__


@pytest.mark.parametrize(
    ("interval", "per_epoch", "num_rollout", "due"),
    [
        (None, 2, 10, []),
        (4, None, None, [3, 7]),
        (4, None, 10, [3, 7, 9]),
        (4, 5, None, [3, 4, 7, 9]),
        (1, None, 10, list(range(10))),
    ],
)
def test_periodic_actions(interval: int | None, per_epoch: int | None, num_rollout: int | None, due: list[int]) -> None:
    got = [i for i in range(10) if misc.should_run_periodic_action(i, interval, per_epoch, num_rollout)]
    assert got == due


def test_a_singleton_is_the_first_caller_s() -> None:
    class Thing(metaclass=misc.SingletonMeta):
        def __init__(self, value: int) -> None:
            self.value = value

    assert Thing(1) is Thing(2)
    assert Thing(3).value == 1
    misc.SingletonMeta.clear_all_instances()
    assert Thing(4).value == 4


def test_a_singleton_is_built_once_however_many_threads_ask() -> None:
    built: list[int] = []

    class Inner(metaclass=misc.SingletonMeta):
        pass

    class Slow(metaclass=misc.SingletonMeta):
        def __init__(self) -> None:
            Inner()
            time.sleep(0.02)
            built.append(1)

    got: list[Slow] = []
    threads = [threading.Thread(target=lambda: got.append(Slow())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    misc.SingletonMeta.clear_all_instances()
    assert built == [1] and len(got) == 4 and len({id(one) for one in got}) == 1


def test_exec_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert misc.exec_command("echo one; echo two >&2", capture_output=True) == "one\n"
    assert misc.exec_command("[[ -n x ]] && echo seen") is None
    assert "seen" in capfd.readouterr().out
    with pytest.raises(subprocess.CalledProcessError):
        misc.exec_command("exit 3")


def test_a_free_port_is_free_and_so_are_those_after_it() -> None:
    first = misc.get_free_port(20000, consecutive=3)
    with socket.socket() as taken:
        taken.bind(("", first + 1))
        taken.listen()
        assert misc.get_free_port(first, consecutive=2) >= first + 2
    with pytest.raises(OSError, match="no 3 free ports"):
        misc.get_free_port(65534, consecutive=3)


def test_the_address_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    socket.inet_aton(misc.get_current_node_ip())
    monkeypatch.setenv("MILES_HOST_IP", "10.1.2.3")
    assert misc.get_current_node_ip() == "10.1.2.3"


def test_results_come_as_they_complete() -> None:
    async def after(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def collect() -> list[float]:
        return [r async for r in misc.as_completed_async([after(0.05), after(0.0), after(0.02)])]

    assert asyncio.run(collect()) == [0.0, 0.02, 0.05]
