"""Streams of the embedded engine: partial results that only grow, and a reader who leaves."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from engine_tiny import request, run_all
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from miles.engine.embedded import EmbeddedEngine
from miles.engine.embedded.replies import TextSoFar
from miles.engine.protocol import BadRequestError, GenerateRequest, GenerateResult, SamplingParams
from miles.errors import EngineError

LONG = {"temperature": 1.0, "max_new_tokens": 40, "ignore_eos": True, "sampling_seed": 5}


async def read(engine: EmbeddedEngine, wanted: GenerateRequest) -> list[GenerateResult]:
    return [result async for result in engine.stream(wanted)]


def test_a_stream_grows_to_the_result_of_generate(engine: EmbeddedEngine) -> None:
    [whole] = run_all(engine, [request([5, 6, 7], **LONG)])
    results = asyncio.run(read(engine, request([5, 6, 7], **LONG)))
    *partial, last = results
    assert len(partial) > 1
    assert (last.output_ids, last.text, last.output_logprobs) == (whole.output_ids, whole.text, whole.output_logprobs)
    assert last.finish_reason == whole.finish_reason
    sizes = [len(r.output_ids) for r in results]
    assert sizes == sorted(set(sizes)), "every chunk but the last says something new"
    for r in partial:
        num = len(r.output_ids)
        assert r.finish_reason is None and r.to_json()["meta_info"]["finish_reason"] is None
        assert r.output_ids == whole.output_ids[:num] and whole.text.startswith(r.text)
        assert r.output_logprobs == whole.output_logprobs[:num]
        assert r.prompt_tokens == 3
        assert [(s.version, s.start, s.end) for s in r.weight_versions] == [("default", 0, num)]


def test_many_streams_and_plain_requests_share_steps(engine: EmbeddedEngine) -> None:
    async def scenario() -> None:
        plain, *streams = await asyncio.gather(
            engine.generate(request([9, 9], **LONG)), *(read(engine, request([5, i], **LONG)) for i in range(5, 11))
        )
        assert len(plain.output_ids) == 40
        assert all(len(results) > 1 and len(results[-1].output_ids) == 40 for results in streams)

    asyncio.run(scenario())
    assert engine.num_unfinished == 0 and not engine._streams


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_reader_who_leaves_aborts_the_request(engine: EmbeddedEngine, how: str) -> None:
    async def scenario() -> None:
        endless = request([5, 6], max_new_tokens=120, ignore_eos=True)
        if how == "close":
            async with aclosing(engine.stream(endless)) as results:
                async for result in results:
                    assert result.finish_reason is None
                    engine.pause("in_place")
                    break
        else:
            engine.pause("in_place")
            reading = asyncio.create_task(read(engine, endless))
            while engine.num_unfinished == 0:
                await asyncio.sleep(0.001)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        while engine.num_unfinished:
            await asyncio.sleep(0.001)
        assert engine._scheduler.running == [] and not engine._streams
        engine.resume()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_stream_spans_a_weight_update(engine: EmbeddedEngine) -> None:
    tensors = {name: tensor.clone() for name, tensor in engine.model.named.items()}

    async def scenario() -> list[GenerateResult]:
        results = []
        async for result in engine.stream(request([5, 6], **LONG)):
            if not results:
                engine.update_weights(tensors, "2")
            results.append(result)
        return results

    for result in asyncio.run(scenario()):
        spans = result.weight_versions
        assert spans[0].start == 0 and spans[-1].end == len(result.output_ids)
        assert [s.start for s in spans[1:]] == [s.end for s in spans[:-1]]
    assert [s.version for s in spans] == ["default", "2"]


def test_refusals_and_failures_reach_the_reader(engine: EmbeddedEngine) -> None:
    with pytest.raises(BadRequestError, match="outside the vocabulary"):
        asyncio.run(read(engine, request([4000])))

    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    engine.model.forward = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineError, match="RuntimeError: boom"):
        asyncio.run(read(engine, request([5])))
    assert not engine._streams


def byte_tokenizer() -> Tokenizer:
    """One token per byte: characters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Decoder:
    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()

    def decode(self, ids: list[int], **_: object) -> str:
        return self.tokenizer.decode(ids)


def shown(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    decoder = Decoder()
    ids = decoder.tokenizer.encode(text).ids
    so_far = TextSoFar(GenerateRequest(text="", sampling_params=SamplingParams(stop=stop)), decoder)
    return [so_far.of(ids[:n]) for n in range(1, len(ids) + 1)]


def test_half_characters_wait_for_their_rest() -> None:
    assert shown("aé€") == ["a", "a", "aé", "aé", "aé", "aé€"]


def test_bytes_that_are_no_character_do_not_wait_for_ever() -> None:
    decoder = Decoder()
    half = decoder.tokenizer.encode("é").ids[:1]
    so_far = TextSoFar(GenerateRequest(text=""), decoder)
    texts = [so_far.of(half * n) for n in range(1, 21)]
    assert texts[0] == "" and len(texts[-1]) >= 9


def test_what_may_become_a_stop_string_is_held() -> None:
    assert shown("a12b123", ("123",)) == ["a", "a", "a", "a12b", "a12b", "a12b", "a12b123"]
