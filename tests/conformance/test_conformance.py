"""What miles relies on of SGLang's HTTP API, asked of the embedded engine and of SGLang: one file of tests for both.

`make test` runs it against the embedded engine, `make conformance` against both. Where they answer otherwise on
purpose, `differences.py` says how, and the test expects that.
"""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conformance_models import CONTEXT, EOS, LAYERS, TOP_K, VOCAB
from conformance_server import PATIENCE_S, Server, until
from differences import DIFFERENCES, ENDS
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from miles.engine.member import Member
from miles.weights.delivery import Delivery
from miles.weights.disk import DiskDelivery
from miles.weights.distributed import DistributedDelivery
from miles.weights.sglang_tensor import TensorDelivery

PROMPT = [5, 6, 7, 8]
LONG = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 1.0}
AGREE = 0.005  # largest difference of a log-prob from Hugging Face's in float32

_references: dict[Path, Any] = {}


def greedy(count: int, **more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": count, **more}


def reference(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Hugging Face's log-probs [tokens - 1] of every token but the first, float32."""
    if folder not in _references:
        _references[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = _references[folder](torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def logprobs(entries: list[list[Any]]) -> list[float]:
    return [entry[0] for entry in entries]


# ---- generate --------------------------------------------------------------------------------------------------------


def test_an_answer_has_text_ids_and_meta_info(server: Server) -> None:
    answer = server.generate(input_ids=PROMPT, sampling_params=greedy(6), rid="mine")
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == 6 and isinstance(answer["text"], str)
    assert meta["id"] == "mine" and meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["weight_version"]) == (4, 6, "default")
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]
    assert "output_token_logprobs" not in meta


def test_text_and_its_tokens_are_one_prompt(server: Server) -> None:
    text = server.generate(text="1+2=", sampling_params=greedy(8))
    ids = server.generate(input_ids=[5, 40, 6, 41], sampling_params=greedy(8))
    assert text["output_ids"] == ids["output_ids"] and text["text"] == ids["text"]
    assert text["meta_info"]["prompt_tokens"] == 4


def test_a_batch_answers_in_order(server: Server) -> None:
    params = [greedy(2), greedy(3)]
    rows = server.generate(input_ids=[PROMPT, [9, 10]], sampling_params=params, return_logprob=[True, False], rid="b")
    alone = server.generate(input_ids=[9, 10], sampling_params=greedy(3))
    assert [row["meta_info"]["id"] for row in rows] == ["b_0", "b_1"]
    assert [len(row["output_ids"]) for row in rows] == [2, 3] and rows[1]["output_ids"] == alone["output_ids"]
    assert "output_token_logprobs" in rows[0]["meta_info"] and "output_token_logprobs" not in rows[1]["meta_info"]
    named = server.generate(text=["1", "2"], sampling_params=greedy(1), rid=["x", "y"])
    assert [row["meta_info"]["id"] for row in named] == ["x", "y"]


def test_n_answers_of_one_prompt(server: Server) -> None:
    same = server.generate(text="1+2=", sampling_params=greedy(4, n=2))
    assert len(same) == 2 and same[0]["output_ids"] == same[1]["output_ids"]
    drawn = server.generate(text="1+2=", sampling_params={"n": 4, "max_new_tokens": 24, "ignore_eos": True})
    assert len({tuple(row["output_ids"]) for row in drawn}) == 4
    assert len({row["meta_info"]["id"] for row in drawn}) == 4


# ---- log-probs -------------------------------------------------------------------------------------------------------


def test_output_log_probs_are_those_of_hugging_face(server: Server) -> None:
    answer = server.generate(input_ids=PROMPT, sampling_params=greedy(40, ignore_eos=True), return_logprob=True)
    entries = answer["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in entries] == answer["output_ids"] and {entry[2] for entry in entries} == {None}
    expected = reference(server.folders[0], PROMPT + answer["output_ids"])[len(PROMPT) - 1 :]
    assert logprobs(entries) == pytest.approx(expected.tolist(), abs=AGREE)
    assert answer["meta_info"]["input_token_logprobs"] == []


def test_sampled_log_probs_are_divided_by_the_temperature(server: Server) -> None:
    params = {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 1, "ignore_eos": True}
    answer = server.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True)
    [[value, token, _]] = answer["meta_info"]["output_token_logprobs"]
    reference(server.folders[0], PROMPT)
    with torch.no_grad():
        logits = _references[server.folders[0]](torch.tensor([PROMPT])).logits[0, -1]
    assert value == pytest.approx((logits / 0.5).log_softmax(-1)[token].item(), abs=AGREE)


@pytest.mark.parametrize("start", [0, 2, 3])
def test_prompt_log_probs_from_a_position_on(server: Server, start: int) -> None:
    body = {"input_ids": PROMPT, "return_logprob": True, "logprob_start_len": start}
    meta = server.generate(**body, sampling_params=greedy(2))["meta_info"]
    entries = meta["input_token_logprobs"]
    assert [entry[1] for entry in entries] == PROMPT[start:] and entries[0][0] is None
    expected = reference(server.folders[0], PROMPT)[start:]
    assert logprobs(entries[1:]) == pytest.approx(expected.tolist(), abs=AGREE)
    assert len(meta["output_token_logprobs"]) == 2


def test_scoring_generates_nothing(server: Server) -> None:
    body = {"input_ids": PROMPT, "return_logprob": True, "logprob_start_len": 0}
    answer = server.generate(**body, sampling_params=greedy(0))
    assert answer["output_ids"] == [] and answer["text"] == ""
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert [entry[1] for entry in answer["meta_info"]["input_token_logprobs"]] == PROMPT


def test_log_probs_with_text(server: Server) -> None:
    body = {"text": "1+", "return_logprob": True, "logprob_start_len": 0, "return_text_in_logprobs": True}
    meta = server.generate(**body, sampling_params=greedy(1))["meta_info"]
    assert [entry[2] for entry in meta["input_token_logprobs"]] == ["1", "+"]
    assert isinstance(meta["output_token_logprobs"][0][2], str)


# ---- where a request stops -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(server: Server) -> tuple[list[int], str]:
    """What the model says greedily: tokens that are one visible character each."""
    answer = server.generate(input_ids=PROMPT, sampling_params=greedy(16, ignore_eos=True, skip_special_tokens=False))
    return answer["output_ids"], answer["text"]


def test_stop_token(server: Server, course: tuple[list[int], str]) -> None:
    ids, _ = course
    answer = server.generate(input_ids=PROMPT, sampling_params=greedy(16, stop_token_ids=[ids[1]]))
    assert answer["output_ids"] == ids[:2]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[1]}
    kept = server.generate(input_ids=PROMPT, sampling_params=greedy(16, stop_token_ids=[ids[1]], no_stop_trim=True))
    assert kept["text"].startswith(answer["text"]) and len(kept["text"]) == len(answer["text"]) + 1


def test_stop_string(server: Server, course: tuple[list[int], str]) -> None:
    ids, text = course
    answer = server.generate(input_ids=PROMPT, sampling_params=greedy(16, stop=[text[1], "never"]))
    assert answer["output_ids"] == ids[:2] and answer["text"] == text[:1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": text[1]}
    kept = server.generate(input_ids=PROMPT, sampling_params=greedy(16, stop=text[1], no_stop_trim=True))
    assert kept["text"] == text[:2]


def test_end_of_sequence(server: Server) -> None:
    params = {"temperature": 5.0, "max_new_tokens": 900}
    answer = server.generate(input_ids=PROMPT, sampling_params=params)
    assert answer["output_ids"][-1] == EOS and EOS not in answer["output_ids"][:-1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    on = server.generate(input_ids=PROMPT, sampling_params=params | {"ignore_eos": True})
    assert len(on["output_ids"]) == 900 and EOS in on["output_ids"]


def test_least_number_of_tokens(server: Server, course: tuple[list[int], str]) -> None:
    params = greedy(16, stop_token_ids=[course[0][1]], min_new_tokens=6)
    assert len(server.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]) >= 6


def test_special_tokens_are_skipped_in_text(server: Server) -> None:
    params = {"temperature": 5.0, "max_new_tokens": 300, "ignore_eos": True}
    plain = server.generate(input_ids=PROMPT, sampling_params=params)
    assert EOS in plain["output_ids"] and "<eos>" not in plain["text"]
    shown = server.generate(input_ids=PROMPT, sampling_params=params | {"skip_special_tokens": False})
    assert "<eos>" in shown["text"]


# ---- streams ---------------------------------------------------------------------------------------------------------


def events(server: Server, path: str, body: dict[str, Any]) -> Iterator[str]:
    with httpx.stream("POST", server.url + path, json=body, timeout=PATIENCE_S, trust_env=False) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield from (line.removeprefix("data: ") for line in answer.iter_lines() if line)


def test_a_stream_grows_to_the_whole_answer(server: Server) -> None:
    body = {"input_ids": PROMPT, "sampling_params": greedy(5, ignore_eos=True), "return_logprob": True}
    *parts, end = events(server, "/generate", body | {"stream": True})
    assert end == "[DONE]" and len(parts) >= 2
    whole = server.generate(**body)
    rows = [json.loads(part) for part in parts]
    for before, after in itertools.pairwise(rows):
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
    assert rows[-1]["output_ids"] == whole["output_ids"] and rows[-1]["text"] == whole["text"]
    assert rows[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert len(rows[-1]["meta_info"]["output_token_logprobs"]) == 5


# ---- abort and pause -------------------------------------------------------------------------------------------------


class Started:
    """A long request of which at least one token is there.

    Its answer is read as it comes, in a thread of its own: SGLang waits for a reader, and what waits for the request
    would wait with it.
    """

    def __init__(self, server: Server, rid: str) -> None:
        body = {"input_ids": PROMPT, "sampling_params": LONG, "stream": True, "rid": rid, "return_logprob": True}
        self._begun, self._last = threading.Event(), {}
        self._reader = threading.Thread(target=self._read, args=(server, body), daemon=True)
        self._reader.start()
        assert self._begun.wait(PATIENCE_S)

    def _read(self, server: Server, body: dict[str, Any]) -> None:
        for part in events(server, "/generate", body):
            if part != "[DONE]":
                self._last = json.loads(part)
                self._begun.set()

    def last(self) -> dict[str, Any]:
        """The end of the answer."""
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive()
        return self._last


@pytest.mark.parametrize("body", [{"rid": "long"}, {"abort_all": True}])
def test_an_aborted_request_returns_what_it_has(server: Server, body: dict[str, Any]) -> None:
    running = Started(server, "long")
    assert server.post("/abort_request", body).status_code == 200
    last = running.last()
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(last["output_ids"]) < LONG["max_new_tokens"]
    assert len(last["meta_info"]["output_token_logprobs"]) == len(last["output_ids"])


def test_abort_by_rid_spares_the_others(server: Server) -> None:
    running = Started(server, "one")
    other = server.in_background(input_ids=PROMPT, sampling_params=greedy(20, ignore_eos=True), rid="two")
    server.post("/abort_request", {"rid": "one"})
    assert other.result(PATIENCE_S)["meta_info"]["finish_reason"]["type"] == "length"
    assert running.last()["meta_info"]["finish_reason"]["type"] == "abort"


def test_aborting_nobody_is_no_error(server: Server) -> None:
    assert server.post("/abort_request", {"rid": "nobody"}).status_code == 200


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_pause_and_continue(server: Server, mode: str) -> None:
    running = Started(server, f"paused-{mode}")
    assert server.ask("/pause_generation", {"mode": mode})["status"] == "ok"
    late = server.in_background(input_ids=PROMPT, sampling_params=greedy(2))
    try:
        if mode == "abort":
            assert running.last()["meta_info"]["finish_reason"]["type"] == "abort"
        flushed = server.post("/flush_cache", {}).status_code
        assert flushed == (400 if mode == "in_place" else 200)
        assert server.get("/health").status_code == 200
        assert not late.done()
    finally:
        assert server.ask("/continue_generation", {})["status"] == "ok"
    assert len(late.result(PATIENCE_S)["output_ids"]) == 2
    if mode != "abort":
        last = running.last()
        assert len(last["output_ids"]) == LONG["max_new_tokens"]
        assert last["meta_info"]["finish_reason"]["type"] == "length"


def test_flush_is_refused_while_requests_run(server: Server) -> None:
    running = Started(server, "busy")
    assert server.post("/flush_cache", {}).status_code == 400
    server.post("/abort_request", {"rid": "busy"})
    running.last()
    until(lambda: server.post("/flush_cache", {}).status_code == 200, "an idle engine to flush its cache")
    assert server.get("/flush_cache").status_code == 200


def test_prefixes_are_shared_until_they_are_flushed(server: Server) -> None:
    prompt = list(range(5, 45))
    server.generate(input_ids=prompt, sampling_params=greedy(1))
    again = server.generate(input_ids=prompt, sampling_params=greedy(1))["meta_info"]["cached_tokens"]
    assert again >= len(prompt) - 1
    until(lambda: server.post("/flush_cache", {}).status_code == 200, "the cache to be flushed")
    assert server.generate(input_ids=prompt, sampling_params=greedy(1))["meta_info"]["cached_tokens"] == 0


# ---- weights ---------------------------------------------------------------------------------------------------------


def says(server: Server) -> list[int]:
    """What the engine's weights make of a prompt."""
    ids: list[int] = server.generate(input_ids=PROMPT, sampling_params=greedy(12, ignore_eos=True))["output_ids"]
    return ids


def test_weights_from_disk(restored: Server) -> None:
    before = says(restored)
    answer = restored.ask("/update_weights_from_disk", {"model_path": str(restored.folders[1]), "weight_version": "7"})
    assert answer["success"] is True and answer["num_paused_requests"] == 0
    assert restored.version == "7" and says(restored) != before
    score = restored.generate(input_ids=PROMPT, sampling_params=greedy(1), return_logprob=True, logprob_start_len=0)[
        "meta_info"
    ]
    expected = reference(restored.folders[1], PROMPT).tolist()
    assert logprobs(score["input_token_logprobs"][1:]) == pytest.approx(expected, abs=AGREE)


def test_a_folder_that_is_not_there(server: Server, tmp_path: Path) -> None:
    refused = server.post("/update_weights_from_disk", {"model_path": str(tmp_path / "none"), "weight_version": "9"})
    assert refused.status_code == 400 and refused.json()["success"] is False
    assert server.version == "default"


def delivery(name: str, folder: Path, server: Server) -> Delivery:
    small = 40_000  # several buckets
    if name == "disk":
        return DiskDelivery(folder, server.folders[0], small)
    if name == "distributed":
        return DistributedDelivery(small)
    return TensorDelivery(small, flattened=name == "flattened bucket")


@pytest.mark.parametrize("name", ["disk", "distributed", "flattened bucket", "plain tensors"])
def test_weights_by_each_transport(restored: Server, name: str, tmp_path: Path) -> None:
    """miles's own senders; twice, because the second update finds what the first one left."""
    if restored.kind == "embedded" and name in ("flattened bucket", "plain tensors"):
        assert DIFFERENCES["tensors in update_weights_from_tensor"].embedded == "safetensors"
        pytest.skip("the embedded engine reads no pickle; see test_weights_as_safetensors")
    before = says(restored)
    sender, member = delivery(name, tmp_path, restored), Member(0, restored.url)
    try:
        assert sender.deliver([member], load_file(restored.folders[1] / "model.safetensors"), "8") == {}
        assert restored.version == "8"
        changed = says(restored)
        assert changed != before
        assert sender.deliver([member], load_file(restored.folders[0] / "model.safetensors"), "9") == {}
        assert restored.version == "9" and says(restored) == before
    finally:
        if isinstance(sender, DistributedDelivery):
            sender.close()


def test_weights_as_safetensors(restored: Server) -> None:
    expected = DIFFERENCES["tensors in update_weights_from_tensor"].of(restored.kind)
    data = base64.b64encode(save(load_file(restored.folders[1] / "model.safetensors"))).decode()
    body = {"serialized_named_tensors": [data], "load_format": "safetensors", "weight_version": "8"}
    if expected != "safetensors":
        pytest.skip("SGLang takes a pickle here and would end on another format")
    before = says(restored)
    assert restored.ask("/update_weights_from_tensor", body)["success"] is True
    assert restored.version == "8" and says(restored) != before


def test_parts_belong_between_begin_and_end(server: Server) -> None:
    assert server.post("/end_weight_update", {}).status_code == 400
    assert server.ask("/begin_weight_update", {})["success"] is True
    assert server.post("/begin_weight_update", {}).status_code == 400
    assert server.ask("/end_weight_update", {})["success"] is True


def test_a_paused_request_goes_on_under_the_new_weights(restored: Server) -> None:
    """And says which of its tokens came from which."""
    running = Started(restored, "across")
    restored.ask("/pause_generation", {"mode": "retract"})
    body = {"model_path": str(restored.folders[1]), "weight_version": "12"}
    restored.ask("/update_weights_from_disk", body)
    restored.ask("/continue_generation", {})
    last = running.last()
    first, second = last["meta_info"]["weight_versions"]
    assert (first["version"], first["start"]) == ("default", 0)
    assert (second["version"], second["start"], second["end"]) == ("12", first["end"], LONG["max_new_tokens"])
    assert 0 < first["end"] < LONG["max_new_tokens"] and last["meta_info"]["weight_version"] == "12"


def test_an_update_while_a_request_runs(restored: Server) -> None:
    running = Started(restored, "during")
    body = {"model_path": str(restored.folders[1]), "weight_version": "13"}
    updated = restored.post("/update_weights_from_disk", body)
    assert updated.status_code == 200
    spans = running.last()["meta_info"]["weight_versions"]
    waits = DIFFERENCES["an update while requests run"].of(restored.kind) == "waits for them"
    assert [span["version"] for span in spans] == (["default"] if waits else ["default", "13"])
    assert restored.version == "13"


def test_the_weights_checker(restored: Server) -> None:
    total = restored.ask("/weights_checker", {"action": "checksum"})
    assert total["success"] is True and total["per_engine_checksum"]
    assert restored.ask("/weights_checker", {"action": "snapshot"})["success"] is True
    assert restored.ask("/weights_checker", {"action": "reset_tensors"})["success"] is True
    assert (
        restored.ask("/weights_checker", {"action": "checksum"})["per_engine_checksum"]
        != (total["per_engine_checksum"])
    )
    restored.ask("/update_weights_from_disk", {"model_path": str(restored.folders[0]), "weight_version": "14"})
    compared = restored.post("/weights_checker", {"action": "compare"})
    if DIFFERENCES["weights_checker compare"].of(restored.kind) == 200:
        assert compared.status_code == 200 and compared.json()["success"] is True
    else:
        assert compared.status_code == 400 and "CUDA" in compared.json()["message"]


def test_memory_is_released_and_resumed(restored: Server) -> None:
    before = says(restored)
    until(lambda: restored.post("/flush_cache", {}).status_code == 200, "an idle engine")
    assert restored.post("/release_memory_occupation", {}).status_code == 200
    assert restored.post("/resume_memory_occupation", {"tags": ["weights"]}).status_code == 200
    restored.ask("/update_weights_from_disk", {"model_path": str(restored.folders[0]), "weight_version": "15"})
    assert restored.post("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]}).status_code == 200
    assert says(restored) == before


# ---- experts ---------------------------------------------------------------------------------------------------------


def test_experts_of_every_token_but_the_last(moe: Server) -> None:
    """int32 [prompt + output - 1, layers, top_k], as Hugging Face routes them."""
    body = {"input_ids": PROMPT, "sampling_params": greedy(20, ignore_eos=True)}
    answer = moe.generate(**body, return_routed_experts=True, return_logprob=True)
    data = base64.b64decode(answer["meta_info"]["routed_experts"])
    experts = np.frombuffer(data, dtype="<i4").reshape(-1, LAYERS, TOP_K)
    tokens = PROMPT + answer["output_ids"]
    assert len(experts) == len(tokens) - 1
    model = AutoModelForCausalLM.from_pretrained(moe.folders[0], dtype=torch.float32)
    seen: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out[2]))
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
    for i, chosen in seen.items():
        np.testing.assert_array_equal(np.sort(experts[:, i]), np.sort(chosen.numpy()))
    expected = logits.log_softmax(-1)[len(PROMPT) - 1 :].gather(1, torch.tensor(answer["output_ids"])[:, None])[:, 0]
    entries = answer["meta_info"]["output_token_logprobs"]
    assert logprobs(entries) == pytest.approx(expected.tolist(), abs=AGREE)
    assert "routed_experts" not in moe.generate(**body)["meta_info"]


def test_experts_include_a_cached_prefix(moe: Server) -> None:
    prompt = list(range(5, 35))
    moe.generate(input_ids=prompt, sampling_params=greedy(1))
    meta = moe.generate(input_ids=prompt, sampling_params=greedy(2, ignore_eos=True), return_routed_experts=True)[
        "meta_info"
    ]
    experts = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype="<i4").reshape(-1, LAYERS, TOP_K)
    assert meta["cached_tokens"] > 0 and len(experts) == len(prompt) + 1


# ---- chat completions ------------------------------------------------------------------------------------------------

CHAT = {"model": "any", "messages": [{"role": "user", "content": "1+2="}], "temperature": 0, "max_tokens": 6}
RENDERED = [2, 5, 40, 6, 41, EOS, 3]


def test_a_chat_says_what_its_rendered_prompt_says(server: Server) -> None:
    answer = server.ask("/v1/chat/completions", CHAT)
    [choice] = answer["choices"]
    plain = server.generate(input_ids=RENDERED, sampling_params=greedy(6))
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == plain["text"]
    assert answer["usage"]["prompt_tokens"] == len(RENDERED)
    assert choice["finish_reason"] == {"length": "length", "stop": "stop"}[plain["meta_info"]["finish_reason"]["type"]]


def test_what_sessions_ask_of_a_chat(server: Server) -> None:
    body = CHAT | {"logprobs": True, "return_meta_info": True, "return_token_ids": True}
    [choice] = server.ask("/v1/chat/completions", body)["choices"]
    meta, ids = choice["meta_info"], choice["response_token_ids"]
    assert choice["prompt_token_ids"] == RENDERED
    assert [entry[1] for entry in meta["output_token_logprobs"]] == ids
    assert [item["logprob"] for item in choice["logprobs"]["content"]] == pytest.approx(
        logprobs(meta["output_token_logprobs"])
    )
    assert meta["prompt_tokens"] == len(RENDERED) and meta["weight_version"] == server.version
    expected = reference(server.folders[0], RENDERED + ids)[len(RENDERED) - 1 :]
    assert logprobs(meta["output_token_logprobs"]) == pytest.approx(expected.tolist(), abs=AGREE)


def test_a_chat_with_token_ids_for_a_prompt(server: Server) -> None:
    body = CHAT | {"input_ids": PROMPT, "return_token_ids": True}
    [choice] = server.ask("/v1/chat/completions", body)["choices"]
    assert choice["prompt_token_ids"] == PROMPT
    assert choice["response_token_ids"] == server.generate(input_ids=PROMPT, sampling_params=greedy(6))["output_ids"]


def test_a_streamed_chat(server: Server) -> None:
    *parts, end = events(server, "/v1/chat/completions", CHAT | {"stream": True})
    rows = [json.loads(part) for part in parts]
    text = "".join(row["choices"][0]["delta"].get("content") or "" for row in rows if row["choices"])
    assert end == "[DONE]" and {row["object"] for row in rows} == {"chat.completion.chunk"}
    assert text == server.ask("/v1/chat/completions", CHAT)["choices"][0]["message"]["content"]


def test_a_chat_without_messages_is_refused(server: Server) -> None:
    assert server.post("/v1/chat/completions", {"model": "any", "messages": []}).status_code == 400


# ---- information -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
def test_health(server: Server, path: str) -> None:
    assert server.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/get_model_info", "/model_info"])
def test_model_info(server: Server, path: str) -> None:
    info = server.get(path).json()
    assert info["model_path"] == str(server.folders[0]) and info["weight_version"] == "default"
    assert info["is_generation"] is True and info["model_type"] == "qwen3"
    assert info["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("path", ["/get_server_info", "/server_info"])
def test_server_info(server: Server, path: str) -> None:
    info = server.get(path).json()
    assert info["model_path"] == str(server.folders[0]) and (info["tp_size"], info["dp_size"]) == (1, 1)
    assert info["version"]


def test_models(server: Server) -> None:
    [model] = server.get("/v1/models").json()["data"]
    assert model["object"] == "model" and model["max_model_len"] == CONTEXT


def test_weight_version_endpoint(server: Server) -> None:
    assert server.get("/get_weight_version").status_code == DIFFERENCES["GET /get_weight_version"].of(server.kind)


# ---- bad input -------------------------------------------------------------------------------------------------------

FEW = {"max_new_tokens": 2}
REFUSED = {
    "a negative number of tokens": {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": -1}},
    "no prompt": {"sampling_params": FEW},
    "no tokens": {"input_ids": [], "sampling_params": FEW},
    "tokens that are text": {"input_ids": "abc", "sampling_params": FEW},
    "an unknown sampling parameter": {"input_ids": PROMPT, "sampling_params": {"temprature": 1.0}},
    "a negative temperature": {"input_ids": PROMPT, "sampling_params": FEW | {"temperature": -1}},
    "top_p of 0": {"input_ids": PROMPT, "sampling_params": FEW | {"top_p": 0}},
    "top_k of 0": {"input_ids": PROMPT, "sampling_params": FEW | {"top_k": 0}},
    "more least than most tokens": {"input_ids": PROMPT, "sampling_params": FEW | {"min_new_tokens": 5}},
    "a prompt beyond the context": {"input_ids": [5] * (CONTEXT + 1), "sampling_params": FEW},
    "more tokens than the context has": {"input_ids": PROMPT * 250, "sampling_params": {"max_new_tokens": 100}},
}
DIFFER = {
    "n is 0": {"input_ids": PROMPT, "sampling_params": FEW | {"n": 0}},
    "text and input_ids": {"text": "1", "input_ids": PROMPT, "sampling_params": FEW},
    "an unknown field": {"input_ids": PROMPT, "inputids": PROMPT, "sampling_params": FEW},
    "an empty text": {"text": "", "sampling_params": FEW},
    "a negative token id": {"input_ids": [5, -3], "sampling_params": FEW},
    "a token id outside the vocabulary": {"input_ids": [5, VOCAB + 1000], "sampling_params": FEW},
    "experts of a dense model": {"input_ids": PROMPT, "sampling_params": FEW, "return_routed_experts": True},
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_requests_are_refused(server: Server, what: str) -> None:
    answer = server.post("/generate", REFUSED[what])
    assert answer.status_code == 400 and answer.json().get("error", answer.json().get("message"))
    assert server.generate(input_ids=PROMPT, sampling_params=FEW)


@pytest.mark.parametrize("what", DIFFER)
def test_bad_requests_that_are_taken_otherwise(server: Server, what: str) -> None:
    expected = DIFFERENCES[what].of(server.kind)
    if expected == ENDS:
        pytest.skip(ENDS)
    assert server.post("/generate", DIFFER[what]).status_code == expected


@pytest.mark.parametrize("content", [b"{nope", b"[1]", b'"text"', b""])
def test_bodies_that_are_no_object(server: Server, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/generate", content=content, headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == 400


def test_control_requests_that_make_no_sense(server: Server) -> None:
    assert server.post("/pause_generation", {"mode": "x"}).status_code == 400
    assert server.post("/abort_request", {}).status_code == DIFFERENCES["abort without rid"].of(server.kind)
    assert server.get("/nothing").status_code == 404


def test_each_difference_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "engines.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    documented = {row[0]: row for row in rows}
    for what in DIFFERENCES:
        assert len(documented[what]) == 4, what
