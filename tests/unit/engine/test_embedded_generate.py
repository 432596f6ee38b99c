"""The embedded engine against Hugging Face `generate`, and what batching, sharing and arrival order must not change."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import pytest
import torch
from engine_tiny import ARCHITECTURES, CONTEXT, VOCAB, generate_all, make_checkpoint, request, run_all
from transformers import AutoModelForCausalLM

from miles.engine.embedded import EmbeddedEngine
from miles.engine.protocol import BadRequestError, WeightVersionSpan


def prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def hf_greedy(folder: Path, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    tokens = out.sequences[0, len(ids) :].tolist()
    scores = [torch.log_softmax(step[0], -1)[token].item() for step, token in zip(out.logits, tokens)]
    return tokens, scores


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_equals_hugging_face_for_mixed_lengths_and_arrivals(checkpoints: dict[str, Path], kind: str) -> None:
    """Twelve requests over five slots, arriving in three waves: tokens equal, log-probs within 1e-4."""
    engine = EmbeddedEngine.from_folder(checkpoints[kind], max_running_requests=5)
    todo = [(ids, 3 + 7 * i % 30) for i, ids in enumerate(prompts(12))]

    async def waves() -> list:
        tasks = []
        for start in range(0, 12, 4):
            for ids, count in todo[start : start + 4]:
                tasks.append(asyncio.create_task(engine.generate(request(ids, temperature=0, max_new_tokens=count))))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await asyncio.gather(*tasks)

    results = asyncio.run(waves())
    engine.close()
    for (ids, count), result in zip(todo, results):
        tokens, scores = hf_greedy(checkpoints[kind], ids, count)
        assert result.output_ids == tokens
        assert result.output_logprobs == pytest.approx(scores, abs=1e-4)
        assert result.finish_reason.type == ("stop" if tokens[-1] == 1 else "length")


def test_bfloat16_is_close_to_float32(checkpoints: dict[str, Path]) -> None:
    ids = prompts(1, shortest=20)[0]
    narrow = EmbeddedEngine.from_folder(checkpoints["qwen3"], dtype=torch.bfloat16)
    wide = EmbeddedEngine.from_folder(checkpoints["qwen3"])
    scores = []
    for engine in (narrow, wide):
        [result] = run_all(engine, [request(ids, max_new_tokens=0, logprob_start_len=0)])
        engine.close()
        scores.append([score for score, _, _ in result.input_logprobs[1:]])
    assert scores[0] == pytest.approx(scores[1], abs=0.3)
    assert scores[0] != scores[1]


def test_a_group_is_prefilled_once_and_answers_as_if_prefilled_apart(checkpoints: dict[str, Path]) -> None:
    ids = prompts(1, shortest=30)[0]
    together = EmbeddedEngine.from_folder(checkpoints["qwen3"])
    group = [request(ids, max_new_tokens=12, sampling_seed=seed) for seed in range(6)]
    shared = run_all(together, group)
    together.close()
    assert sorted(r.cached_tokens for r in shared) == [0] + [len(ids) - 1] * 5
    for one, result in zip(group, shared):
        apart = EmbeddedEngine.from_folder(checkpoints["qwen3"])
        [alone] = run_all(apart, [one])
        apart.close()
        assert alone.cached_tokens == 0
        assert result.output_ids == alone.output_ids
        assert result.output_logprobs == pytest.approx(alone.output_logprobs, abs=1e-5)


def test_a_later_turn_takes_its_prefix_from_a_finished_request(engine: EmbeddedEngine, checkpoints) -> None:
    first_turn = prompts(1, shortest=20)[0]
    others = prompts(5, seed=9)

    async def talk() -> list:
        [first, *_] = await generate_all(
            engine, [request(ids, temperature=0, max_new_tokens=8, ignore_eos=True) for ids in [first_turn, *others]]
        )
        second_turn = first_turn + first.output_ids + [7, 8, 9]
        return [first, second_turn, await engine.generate(request(second_turn, temperature=0, max_new_tokens=6))]

    first, second_turn, second = asyncio.run(talk())
    assert second.cached_tokens == len(first_turn) + len(first.output_ids) - 1
    tokens, scores = hf_greedy(checkpoints["qwen3"], second_turn, 6)
    assert second.output_ids == tokens
    assert second.output_logprobs == pytest.approx(scores, abs=1e-4)


def test_random_traffic_with_shared_prefixes_equals_hugging_face(checkpoints: dict[str, Path]) -> None:
    """Slots, prefixes and lengths reused in any order never mix up two requests."""
    engine = EmbeddedEngine.from_folder(checkpoints["llama"], max_running_requests=4, max_total_tokens=4 * 64)
    rng = random.Random(5)
    stems = prompts(3, seed=5, shortest=12, longest=24)
    starts = [stems[rng.randrange(3)][: rng.randint(9, 24)] for _ in range(40)]
    todo = [(start + prompts(1, i, 1, 6)[0], rng.randint(1, 20)) for i, start in enumerate(starts)]

    async def traffic() -> list:
        async def one(ids: list[int], count: int) -> object:
            for _ in range(rng.randint(0, 60)):
                await asyncio.sleep(0)
            return await engine.generate(request(ids, temperature=0, max_new_tokens=count))

        return await asyncio.gather(*(one(ids, count) for ids, count in todo))

    results = asyncio.run(traffic())
    engine.close()
    assert sum(r.cached_tokens for r in results) > 0
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    for (ids, _), result in zip(todo, results):
        sequence = ids + result.output_ids
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([sequence])).logits[0], -1)
        expected = [scores[i - 1, sequence[i]].item() for i in range(len(ids), len(sequence))]
        assert result.output_logprobs == pytest.approx(expected, abs=1e-4)
        assert result.output_ids == [int(scores[i - 1].argmax()) for i in range(len(ids), len(sequence))]


def test_equal_runs_give_equal_tokens_and_log_probs(checkpoints: dict[str, Path]) -> None:
    """Unseeded requests that arrive in waves, twice: bitwise the same, because batches form the same way."""

    async def waves(engine: EmbeddedEngine) -> list:
        async def two_turns(ids: list[int]) -> list:
            first = await engine.generate(request(ids, max_new_tokens=3 + len(ids) % 7))
            second = await engine.generate(request(ids + first.output_ids, max_new_tokens=5))
            return [(r.output_ids, r.output_logprobs) for r in (first, second)]

        return await asyncio.gather(*(two_turns(ids) for ids in prompts(20, seed=4)))

    runs = []
    for _ in range(2):
        engine = EmbeddedEngine.from_folder(checkpoints["qwen3"], max_running_requests=6, seed=11)
        runs.append(asyncio.run(waves(engine)))
        engine.close()
    assert runs[0] == runs[1]


def test_a_seeded_request_samples_the_same_in_any_company(engine: EmbeddedEngine) -> None:
    ids = prompts(1, shortest=10)[0]
    seeded = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 15, "sampling_seed": 42}
    [alone] = run_all(engine, [request(ids, **seeded)])
    crowd = [request(other, temperature=1.3, max_new_tokens=9) for other in prompts(9, seed=1)]
    crowded = run_all(engine, [*crowd[:4], request(ids, **seeded), *crowd[4:]])[4]
    assert crowded.output_ids == alone.output_ids
    assert crowded.output_logprobs == pytest.approx(alone.output_logprobs, abs=1e-4)
    [other_seed] = run_all(engine, [request(ids, **(seeded | {"sampling_seed": 43}))])
    assert other_seed.output_ids != alone.output_ids


@pytest.mark.parametrize("start", [0, 1, 7, 29, 30])
def test_scoring_equals_hugging_face(engine: EmbeddedEngine, checkpoints: dict[str, Path], start: int) -> None:
    ids = prompts(1, seed=2, shortest=30, longest=30)[0]
    todo = [request(ids, max_new_tokens=new, ignore_eos=True, logprob_start_len=start) for new in (0, 3)]
    scored, with_output = run_all(engine, todo)
    assert scored.output_ids == [] and scored.finish_reason.to_json() == {"type": "length", "length": 0}
    assert len(with_output.output_ids) == 3
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"], dtype=torch.float32)
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    for result in (scored, with_output):
        entries = result.to_json()["meta_info"]["input_token_logprobs"]
        assert [token for _, token, _ in entries] == ids[start:]
        assert [score for score, _, _ in entries[:1]] == [None] * (start < 30)
        expected = [scores[i - 1, ids[i]].item() for i in range(start + 1, 30)]
        assert [score for score, _, _ in entries[1:]] == pytest.approx(expected, abs=1e-4)


def test_the_context_length_ends_a_request_without_max_new_tokens(engine: EmbeddedEngine) -> None:
    ids = prompts(1, shortest=10)[0]
    [result] = run_all(engine, [request(ids, max_new_tokens=None, ignore_eos=True)])
    assert len(ids) + len(result.output_ids) == CONTEXT
    assert result.finish_reason.type == "length"


def test_log_probs_follow_the_sampling_temperature(engine: EmbeddedEngine, checkpoints: dict[str, Path]) -> None:
    ids = prompts(1, shortest=8)[0]
    [result] = run_all(engine, [request(ids, temperature=0.5, top_k=3, max_new_tokens=1, sampling_seed=1)])
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"], dtype=torch.float32)
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1] / 0.5, -1)
    assert result.output_logprobs == pytest.approx([scores[result.output_ids[0]].item()], abs=1e-4)


BAD_REQUESTS = {
    "too long": (
        {"ids": [5] * 100, "max_new_tokens": 100},
        "prompt of 100 tokens + max_new_tokens 100 exceeds context length 128",
    ),
    "too long alone": ({"ids": [5] * 913, "max_new_tokens": None}, "prompt of 913 tokens fills the context length 128"),
    "vocabulary": ({"ids": [5, 4000]}, f"token 4000 is outside the vocabulary of {VOCAB} tokens"),
    "nothing": ({"ids": []}, "the prompt has no tokens"),
    "start": ({"ids": [5, 6], "logprob_start_len": 3}, "logprob_start_len 3 is beyond the 2 prompt tokens"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_answered_with_a_sentence(engine: EmbeddedEngine, case: str) -> None:
    options, message = BAD_REQUESTS[case]
    with pytest.raises(BadRequestError, match=re.escape(message)):
        run_all(engine, [request(**options)])
    assert engine.num_unfinished == 0


def test_a_weight_update_in_mid_request_shows_in_its_spans(engine: EmbeddedEngine, checkpoints, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)

    async def update_in_between() -> object:
        task = asyncio.create_task(engine.generate(request([5, 6, 7], max_new_tokens=60, ignore_eos=True)))
        while not engine._scheduler.running or engine._scheduler.running[0].num_output < 5:
            await asyncio.sleep(0.001)
        engine.pause("in_place")
        await asyncio.to_thread(engine.update_weights_from_disk, other, "8")
        engine.resume()
        return await task

    result = asyncio.run(update_in_between())
    first, second = result.weight_versions
    assert first == WeightVersionSpan("default", 0, first.end) and 5 <= first.end < 60
    assert second == WeightVersionSpan("8", first.end, 60)
    assert result.to_json()["meta_info"]["weight_version"] == "8"
    tokens, _ = hf_greedy(other, [5, 6, 7], 10)
    [fresh] = run_all(engine, [request([5, 6, 7], temperature=0, max_new_tokens=10)])
    assert fresh.output_ids == tokens and fresh.cached_tokens == 0


def test_a_live_update_refers_to_the_trainers_tensors(engine: EmbeddedEngine, checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"], dtype=torch.float32)
    engine.update_weights(dict(model.named_parameters()), "2")
    assert engine.model.embed.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    engine.update_weights(dict(model.named_parameters()), "3", copy=True)
    assert engine.model.embed.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    [result] = run_all(engine, [request([5, 6], max_new_tokens=1)])
    assert result.weight_version == "3"
