"""Threads, codec and door: what every plug-in call relies on."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.hooks import bind, function_registry
from miles.hooks.codec import Decoder, Encoder
from miles.hooks.source import own_place, source_of
from miles.hooks.threads import Threads
from miles.types import RolloutFnTrainInput, Sample


def test_threads_are_bounded_and_overlap() -> None:
    threads = Threads(max_threads=4)
    running, most = 0, 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return number

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(threads.run(work, i) for i in range(20)))

    assert asyncio.run(all_of_them()) == list(range(20))
    assert 2 <= most <= 4


def test_a_thread_that_never_returns_is_replaced() -> None:
    threads = Threads(max_threads=1)
    release = threading.Event()

    async def main() -> str:
        stuck = asyncio.ensure_future(threads.run(release.wait))
        await asyncio.sleep(0.05)
        stuck.cancel()
        return await asyncio.wait_for(threads.run(lambda: "next"), timeout=5)

    assert asyncio.run(main()) == "next"
    release.set()


def test_a_cancelled_job_that_has_not_begun_never_runs() -> None:
    threads = Threads(max_threads=1)
    release, ran = threading.Event(), []

    async def main() -> None:
        first = asyncio.ensure_future(threads.run(release.wait))
        await asyncio.sleep(0.02)
        second = asyncio.ensure_future(threads.run(ran.append, 2))
        await asyncio.sleep(0.02)
        second.cancel()
        await asyncio.sleep(0)
        release.set()
        await first
        await threads.run(ran.append, 3)

    asyncio.run(main())
    assert ran == [3]


def test_errors_and_context_cross_the_thread() -> None:
    import contextvars

    who = contextvars.ContextVar("who", default="nobody")

    def fails() -> None:
        raise LookupError("in thread")

    async def main() -> None:
        who.set("caller")
        assert await Threads().run(who.get) == "caller"
        with pytest.raises(LookupError, match="in thread"):
            await Threads().run(fails)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await Threads().run(lambda: next(iter([])))

    asyncio.run(main())


VALUES: list[Any] = [
    None,
    True,
    3,
    "text",
    [1, [2.5, None]],
    (1, "a"),
    {"a": {"b": 1}},
    {1: "int key", (1, 2): "tuple key"},
    {"$sample": "not a tag"},
    {1, 2},
    b"bytes",
    Path("a/b"),
    Namespace(a=1, b=[2]),
    RolloutFnTrainInput(3),
    Sample(index=3, metadata={"k": [1]}, status=Sample.Status.TRUNCATED),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_codec_round_trip(value: Any, tmp_path: Path) -> None:
    text = json.dumps(Encoder().encode(value), allow_nan=False)
    assert Decoder(tmp_path).decode(json.loads(text)) == value


def test_codec_of_numbers_that_json_lacks(tmp_path: Path) -> None:
    text = json.dumps(Encoder().encode([math.inf, -math.inf, math.nan, np.float32(0.5)]), allow_nan=False)
    a, b, c, d = Decoder(tmp_path).decode(json.loads(text))
    assert (a, b, d) == (math.inf, -math.inf, 0.5) and math.isnan(c)


def test_codec_of_tensors(tmp_path: Path) -> None:
    encoder = Encoder()
    base = torch.arange(6.0, requires_grad=True)
    values = {"view": base[::2], "half": torch.ones(2, dtype=torch.bfloat16), "array": np.arange(4, dtype=np.int32)}
    encoded = json.loads(json.dumps(encoder.encode(values)))
    encoder.save_tensors(tmp_path)
    decoded = Decoder(tmp_path).decode(encoded)
    assert decoded["view"].tolist() == [0.0, 2.0, 4.0] and decoded["half"].dtype == torch.bfloat16
    assert isinstance(decoded["array"], np.ndarray) and decoded["array"].dtype == np.int32


def test_codec_survives_awkward_objects(tmp_path: Path) -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    loop: list[Any] = []
    loop.append(loop)
    encoded = json.loads(json.dumps(Encoder().encode({"rude": Rude(), "fn": len, "loop": loop})))
    decoded = Decoder(tmp_path).decode(encoded)
    assert "repr raised RuntimeError" in repr(decoded["rude"]) and "len" in repr(decoded["fn"])


def test_own_place_skips_libraries() -> None:
    try:
        json.loads("{")
    except ValueError as error:
        place = own_place(error.__traceback__, None)
    assert place is not None and place.file == __file__ and place.text == 'json.loads("{")'


def test_own_place_of_an_installed_plug_in_is_in_its_own_file() -> None:
    source = source_of(json.loads)
    try:
        json.loads(3)  # type: ignore[arg-type]
    except TypeError as error:
        assert error.__traceback__ is not None
        inside = error.__traceback__.tb_next
    place = own_place(inside, source.file)
    assert place is not None and place.file == source.file


def test_the_door_is_cheap() -> None:
    """Less than 10 microseconds a call; the best of several rounds, since other processes share the machine."""

    def fn(rollout_id: int, args: Namespace, data: Any, extra: Any) -> bool:
        return False

    with function_registry.temporary("test:log", fn):
        hook = bind(Namespace(custom_eval_rollout_log_function_path="test:log")).custom_eval_rollout_log_function
    assert hook is not None
    args, best = Namespace(), math.inf
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(500):
            hook(0, args, None, None)
        best = min(best, (time.perf_counter() - begin) / 500)
    assert best < 10e-6
