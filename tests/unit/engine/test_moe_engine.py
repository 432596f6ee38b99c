"""Mixtures of experts in the embedded engine: which experts each token took, however its keys and values came about."""

from __future__ import annotations

import asyncio
import base64
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_tiny import ARCHITECTURES, VOCAB, make_checkpoint, request, run_all
from transformers import AutoModelForCausalLM

from miles.engine.embedded import EmbeddedEngine
from miles.engine.protocol import GenerateResult

KIND = "qwen3-moe-mixed"
LAYERS, DENSE, TOP_K = 3, 1, 3


def prompts(count: int, seed: int, shortest: int = 2, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def decoded(result: GenerateResult, layers: int = LAYERS, top_k: int = TOP_K) -> np.ndarray:
    """int32 [tokens - 1, layers, top_k] of what a client sees."""
    encoded = result.to_json()["meta_info"]["routed_experts"]
    return np.frombuffer(base64.b64decode(encoded), dtype="<i4").reshape(-1, layers, top_k)


class Reference:
    """Hugging Face's own routers, run over whole sequences."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.seen: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(self.model.model.layers):
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda _, __, out, i=i: self.seen.__setitem__(i, out[2]))

    def __call__(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            self.model(torch.tensor([tokens[:-1]]))
        some = next(iter(self.seen.values()))
        out = torch.zeros(len(tokens) - 1, len(self.model.model.layers), some.shape[1], dtype=torch.int32)
        for i, chosen in self.seen.items():
            out[:, i] = chosen
        return out.numpy()


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Reference:
    return Reference(checkpoints[KIND])


def check(reference: Reference, ids: list[int], result: GenerateResult) -> None:
    got, expected = decoded(result), reference(ids + result.output_ids)
    assert got.shape == (len(ids) + len(result.output_ids) - 1, LAYERS, TOP_K)
    assert not got[:, DENSE].any()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("exact", [False, True])
def test_experts_are_those_of_hugging_face_in_mixed_traffic(
    checkpoints: dict[str, Path], reference: Reference, exact: bool
) -> None:
    """Few slots, equal prompts, common prefixes, prompts of one token: slots swap, prefixes are copied."""
    engine = EmbeddedEngine.from_folder(checkpoints[KIND], max_running_requests=4, max_total_tokens=4 * 80, exact=exact)
    stems = prompts(3, 1, 10, 20)
    todo = [ids for stem in stems for ids in (stem, stem, stem + [5, 7], stem[:9])] + prompts(6, 2) + [[3]]
    random.Random(0).shuffle(todo)
    results = run_all(
        engine,
        [
            request(ids, max_new_tokens=3 + i % 9, sampling_seed=i, ignore_eos=True, return_routed_experts=True)
            for i, ids in enumerate(todo)
        ],
    )
    engine.close()
    assert any(result.cached_tokens for result in results)
    for ids, result in zip(todo, results):
        check(reference, ids, result)


def test_a_later_turn_covers_the_whole_prefix(checkpoints: dict[str, Path], reference: Reference) -> None:
    """The prefix of a resumed request comes from a slot, computed by a request that did not ask for experts."""
    engine = EmbeddedEngine.from_folder(checkpoints[KIND])
    [ids] = prompts(1, 3, 20)
    [first] = run_all(engine, [request(ids, max_new_tokens=8, ignore_eos=True)])
    assert first.routed_experts is None and "routed_experts" not in first.to_json()["meta_info"]
    again = ids + first.output_ids + [9, 8]
    [second] = run_all(engine, [request(again, max_new_tokens=4, return_routed_experts=True)])
    engine.close()
    assert second.cached_tokens >= len(ids)
    check(reference, again, second)


def test_retracted_and_aborted_requests(checkpoints: dict[str, Path], reference: Reference) -> None:
    engine = EmbeddedEngine.from_folder(checkpoints[KIND], max_running_requests=2)
    given = prompts(4, 4, 12)

    async def play() -> list[GenerateResult]:
        tasks = [
            asyncio.create_task(
                engine.generate(
                    request(ids, rid=f"r{i}", max_new_tokens=60, ignore_eos=True, return_routed_experts=True)
                )
            )
            for i, ids in enumerate(given)
        ]
        while engine.num_unfinished < 4 or engine._scheduler.running[:1] == []:
            await asyncio.sleep(0.001)
        engine.pause("retract")
        engine.resume()
        await asyncio.sleep(0.02)
        engine.abort("r3")  # never ran: nothing is known about it
        results = [await tasks[3]]
        engine.abort(abort_all=True)
        return [*(await asyncio.gather(*tasks[:3])), *results]

    results = asyncio.run(play())
    engine.close()
    for ids, result in zip(given[:2], results[:2]):
        check(reference, ids, result)
    waiting = results[3]
    assert waiting.finish_reason.type == "abort"
    assert waiting.routed_experts is None or decoded(waiting).shape[0] == len(given[3]) + len(waiting.output_ids) - 1


def test_weights_are_updated_and_read_back_by_the_names_on_disk(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    other = make_checkpoint(tmp_path / "other", KIND, seed=5)
    engine = EmbeddedEngine.from_folder(checkpoints[KIND])
    engine.update_weights_from_disk(other, "7")
    fresh = EmbeddedEngine.from_folder(other)
    [ids] = prompts(1, 8, 20)
    one = request(ids, temperature=0, max_new_tokens=10, return_routed_experts=True)
    [a], [b] = run_all(engine, [one]), run_all(fresh, [one])
    engine.close()
    fresh.close()
    assert (a.weight_version, a.output_ids, a.output_logprobs) == ("7", b.output_ids, b.output_logprobs)
    np.testing.assert_array_equal(decoded(a), decoded(b))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_exact_engines_answer_alike_in_any_company(checkpoints: dict[str, Path], kind: str) -> None:
    """Bit for bit: alone, with others, after a shared prefix, in few slots. And close to the ordinary engine."""
    given = [ids for ids in prompts(4, 6, 8, 30) for _ in range(2)]
    todo = [
        request(ids, max_new_tokens=4 + 3 * i, temperature=0.9, sampling_seed=i, ignore_eos=True)
        for i, ids in enumerate(given)
    ]
    crowd = EmbeddedEngine.from_folder(checkpoints[kind], exact=True)
    alone = EmbeddedEngine.from_folder(checkpoints[kind], max_running_requests=1, exact=True)
    plain = EmbeddedEngine.from_folder(checkpoints[kind])
    for a, b, c in zip(run_all(crowd, todo), run_all(alone, todo), run_all(plain, todo)):
        assert (a.output_ids, a.output_logprobs) == (b.output_ids, b.output_logprobs)
        assert a.output_ids == c.output_ids
        assert a.output_logprobs == pytest.approx(c.output_logprobs, abs=1e-4)
    for engine in (crowd, alone, plain):
        engine.close()
