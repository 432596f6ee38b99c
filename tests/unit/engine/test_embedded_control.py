"""Stop conditions, abort, pause, failures, threads: how requests end, and that none is left waiting."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from engine_tiny import CHARACTERS, generate_all, request, run_all

from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded import engine as engine_module
from miles.engine.protocol import GenerateRequest, SamplingParams
from miles.errors import CheckpointError, EngineError

EOS, THINK_END = 1, 3
DIGIT = {c: 4 + i for i, c in enumerate(CHARACTERS)}


def text_request(text: str, **params: object) -> GenerateRequest:
    return GenerateRequest(text=text, return_logprob=True, sampling_params=SamplingParams.from_payload(params))


def say(engine: EmbeddedEngine, answer: list[int]) -> None:
    """Make the model answer exactly this, whatever it is asked: its logits count up the answer by position."""

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(hidden.shape[0], engine.model.shape.vocab_size)
        for row, running in enumerate(engine._scheduler.running[: hidden.shape[0]]):
            out[row, answer[min(running.num_output, len(answer) - 1)]] = 50.0
        return out

    engine.model.logits = logits  # type: ignore[method-assign]


STOPS = {
    "eos": ([10, 11, EOS, 12], {}, [10, 11, EOS], {"type": "stop", "matched": EOS}, "67"),
    "eos ignored": (
        [10, EOS, 11],
        {"ignore_eos": True, "max_new_tokens": 3},
        [10, EOS, 11],
        {"type": "length", "length": 3},
        "67",
    ),
    "token id": ([10, 11, 12], {"stop_token_ids": [11]}, [10, 11], {"type": "stop", "matched": 11}, "6"),
    "token id, not trimmed": (
        [10, 11, 12],
        {"stop_token_ids": [11], "no_stop_trim": True},
        [10, 11],
        {"type": "stop", "matched": 11},
        "67",
    ),
    "string over two tokens": ([10, 11, 12, 13], {"stop": "78"}, [10, 11, 12], {"type": "stop", "matched": "78"}, "6"),
    "string, not trimmed": (
        [10, 11, 12, 13],
        {"stop": ["zz", "78"], "no_stop_trim": True},
        [10, 11, 12],
        {"type": "stop", "matched": "78"},
        "678",
    ),
    "string of a special token": (
        [10, THINK_END, 11],
        {"stop": "</think>", "skip_special_tokens": False},
        [10, THINK_END],
        {"type": "stop", "matched": "</think>"},
        "6",
    ),
    "length": ([10, 11, 12], {"max_new_tokens": 2}, [10, 11], {"type": "length", "length": 2}, "67"),
    "special tokens shown": (
        [10, EOS],
        {"skip_special_tokens": False, "no_stop_trim": True},
        [10, EOS],
        {"type": "stop", "matched": EOS},
        "6<eos>",
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_requests_stop_where_they_should(engine: EmbeddedEngine, case: str) -> None:
    answer, params, ids, finish, text = STOPS[case]
    say(engine, answer)
    [result] = run_all(engine, [text_request("1+2=", **params)])
    assert result.output_ids == ids
    assert result.finish_reason.to_json() == finish
    assert result.text == text
    assert result.prompt_tokens == 4


def test_min_new_tokens_keeps_every_stop_away(engine: EmbeddedEngine) -> None:
    say(engine, [EOS])
    [result] = run_all(engine, [text_request("1", min_new_tokens=4, max_new_tokens=9, stop_token_ids=[7])])
    assert result.output_ids[-1] == EOS and len(result.output_ids) == 5
    assert not {EOS, 7} & set(result.output_ids[:4])


def test_text_can_be_returned_with_the_log_probs(engine: EmbeddedEngine) -> None:
    say(engine, [10, 11])
    one = request([5, 6], max_new_tokens=2, logprob_start_len=0, return_text_in_logprobs=True)
    meta = run_all(engine, [one])[0].to_json()["meta_info"]
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[10, "6"], [11, "7"]]
    assert [entry[1:] for entry in meta["input_token_logprobs"]] == [[5, "1"], [6, "2"]]


def long_requests(count: int) -> list[GenerateRequest]:
    return [request([5 + i, 6], rid=f"r{i}", max_new_tokens=100, ignore_eos=True) for i in range(count)]


async def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s in vain"
        await asyncio.sleep(0.0005)


def slow_down(engine: EmbeddedEngine, step_s: float = 0.002) -> None:
    step = engine._scheduler.step

    def slow() -> None:
        time.sleep(step_s)
        step()

    engine._scheduler.step = slow  # type: ignore[method-assign]


def test_abort_by_rid_returns_what_there_is_and_leaves_others_alone(engine: EmbeddedEngine) -> None:
    slow_down(engine)

    async def scenario() -> list:
        tasks = [asyncio.create_task(engine.generate(r)) for r in long_requests(3)]
        await until(lambda: engine._scheduler.running and engine._scheduler.running[0].num_output > 4)
        engine.abort("r1")
        return await asyncio.gather(*tasks)

    kept, aborted, also_kept = asyncio.run(scenario())
    assert aborted.finish_reason.to_json() == {"type": "abort", "message": "Aborted"}
    assert 4 < len(aborted.output_ids) < 100
    assert len(aborted.output_logprobs) == len(aborted.output_ids)
    assert len(kept.output_ids) == len(also_kept.output_ids) == 100


def test_abort_all_reaches_requests_that_wait_and_those_just_submitted(checkpoints) -> None:
    engine = EmbeddedEngine.from_folder(checkpoints["qwen3"], max_running_requests=2)

    async def scenario() -> list:
        tasks = [asyncio.create_task(engine.generate(r)) for r in long_requests(6)]
        await asyncio.sleep(0)
        engine.abort(abort_all=True)
        return await asyncio.gather(*tasks)

    results = asyncio.run(scenario())
    engine.close()
    assert [r.finish_reason.type for r in results] == ["abort"] * 6


def test_cancelling_the_caller_aborts_the_request(engine: EmbeddedEngine) -> None:
    slow_down(engine)

    async def scenario() -> None:
        task = asyncio.create_task(engine.generate(long_requests(1)[0]))
        await until(lambda: engine._scheduler.running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.num_unfinished == 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_paused_engine_goes_on_where_it_stopped(engine: EmbeddedEngine, mode: str) -> None:
    asked = [request([5 + i, 6], temperature=0, max_new_tokens=60, ignore_eos=True) for i in range(3)]
    undisturbed = run_all(engine, asked)
    slow_down(engine)

    async def scenario() -> list:
        tasks = [asyncio.create_task(engine.generate(r)) for r in asked[:2]]
        await until(lambda: engine._scheduler.running and engine._scheduler.running[0].num_output > 3)
        engine.pause(mode)
        done = [len(r.ids) for r in [*engine._scheduler.running, *engine._scheduler.waiting]]
        assert engine.flush_cache() is (mode == "retract")
        tasks.append(asyncio.create_task(engine.generate(asked[2])))
        await asyncio.sleep(0.05)
        now = [len(r.ids) for r in [*engine._scheduler.running, *engine._scheduler.waiting]]
        assert now[:2] == done and not any(task.done() for task in tasks)
        engine.resume()
        return await asyncio.gather(*tasks)

    results = asyncio.run(scenario())
    assert [r.output_ids for r in results] == [r.output_ids for r in undisturbed]
    for result, expected in zip(results, undisturbed):
        assert result.output_logprobs == pytest.approx(expected.output_logprobs, abs=1e-4)


def test_pausing_with_abort_ends_requests(engine: EmbeddedEngine) -> None:
    slow_down(engine)

    async def scenario() -> object:
        task = asyncio.create_task(engine.generate(long_requests(1)[0]))
        await until(lambda: engine._scheduler.running)
        engine.pause()
        return await task

    assert asyncio.run(scenario()).finish_reason.type == "abort"
    engine.resume()
    assert len(run_all(engine, [request([5], max_new_tokens=2, ignore_eos=True)])[0].output_ids) == 2


def test_a_step_that_raises_fails_all_requests_and_the_engine_goes_on(engine: EmbeddedEngine) -> None:
    forward = engine.model.forward

    def broken(*_: object) -> None:
        raise RuntimeError("the disk is on fire")

    async def scenario() -> list:
        engine.model.forward = broken  # type: ignore[method-assign, assignment]
        return await asyncio.gather(*(engine.generate(r) for r in long_requests(3)), return_exceptions=True)

    errors = asyncio.run(scenario())
    assert all(isinstance(error, EngineError) for error in errors)
    assert "RuntimeError: the disk is on fire" in str(errors[0])
    engine.model.forward = forward  # type: ignore[method-assign]
    assert len(run_all(engine, [request([5], max_new_tokens=2, ignore_eos=True)])[0].output_ids) == 2


def test_a_tokenizer_that_raises_fails_its_request_alone(engine: EmbeddedEngine) -> None:
    class Broken:
        def encode(self, text: str) -> list[int]:
            raise KeyError(text)

        def decode(self, ids: list[int], **_: object) -> str:
            return ""

    slow_down(engine)
    engine._scheduler.tokenizer = Broken()

    async def scenario() -> list:
        asked = [text_request("1"), request([5], max_new_tokens=0)]
        return await asyncio.gather(*(engine.generate(r) for r in asked), return_exceptions=True)

    error, scored = asyncio.run(scenario())
    assert isinstance(error, EngineError) and "the request failed: KeyError: '1'" in str(error)
    assert scored.finish_reason.type == "length"


def test_diverged_weights_are_an_error_and_leave_no_trace(engine: EmbeddedEngine) -> None:
    good = {name: tensor.clone() for name, tensor in engine_tensors(engine).items()}
    [before] = run_all(engine, [request([5, 6, 7], temperature=0, max_new_tokens=5, ignore_eos=True)])
    engine.update_weights({name: tensor * float("nan") for name, tensor in good.items()}, "2")
    with pytest.raises(EngineError, match="logits are not finite"):
        run_all(engine, [request([5, 6, 7], max_new_tokens=5)])
    engine.update_weights(good, "3")
    [after] = run_all(engine, [request([5, 6, 7], temperature=0, max_new_tokens=5, ignore_eos=True)])
    assert after.output_ids == before.output_ids


def engine_tensors(engine: EmbeddedEngine) -> dict[str, torch.Tensor]:
    from miles.engine.embedded.model import load_tensors

    return load_tensors(engine.model_path, dtype=None, device="cpu")


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(engine: EmbeddedEngine) -> None:
    tensors = engine_tensors(engine)
    missing = {name: t for name, t in tensors.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight'"):
        engine.update_weights(missing, "2")
    with pytest.raises(CheckpointError, match=r"model.norm.weight: expected shape \[32\] from config.json, got \[5\]"):
        engine.update_weights(tensors | {"model.norm.weight": torch.ones(5)}, "2")
    assert engine.weight_version == "default"
    assert run_all(engine, [request([5], max_new_tokens=1)])[0].weight_version == "default"


def test_two_threads_with_their_own_loops_share_the_engine(engine: EmbeddedEngine) -> None:
    """Plug-ins call from other threads while the run's loop generates, and even while they block that loop."""
    asked = [request([5 + i, 6, 7], temperature=0, max_new_tokens=20, ignore_eos=True) for i in range(8)]
    expected = [r.output_ids for r in run_all(engine, asked)]
    found: dict[str, list[list[int]]] = {}

    def other_thread(name: str) -> None:
        found[name] = [r.output_ids for r in asyncio.run(generate_all(engine, asked))]

    async def scenario() -> None:
        mine = asyncio.gather(*(engine.generate(r) for r in asked))
        threads = [threading.Thread(target=other_thread, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        await asyncio.sleep(0)
        threads[0].join()  # blocks this loop, as a synchronous plug-in would
        found["mine"] = [r.output_ids for r in await mine]
        await asyncio.to_thread(threads[1].join)

    begin = time.monotonic()
    asyncio.run(scenario())
    assert found == {"a": expected, "b": expected, "mine": expected}
    assert time.monotonic() - begin < 2 * engine_module.SETTLE_TIMEOUT_S + 3


def test_an_idle_engine_uses_no_processor_time(engine: EmbeddedEngine) -> None:
    run_all(engine, [request([5], max_new_tokens=2)])
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_a_closed_engine_says_so(engine: EmbeddedEngine) -> None:
    slow_down(engine)

    async def scenario() -> None:
        task = asyncio.create_task(engine.generate(long_requests(1)[0]))
        await until(lambda: engine._scheduler.running)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="the engine was closed"):
            await task
        with pytest.raises(EngineError, match="the engine is closed"):
            await engine.generate(long_requests(1)[0])

    asyncio.run(scenario())
