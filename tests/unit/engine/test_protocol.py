"""What a /generate body may say, and the sentence for each thing it may not."""

from __future__ import annotations

import pytest

from miles.engine.protocol import (
    BadRequestError,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
    WeightVersionSpan,
    is_batch,
)


def test_published_sampling_parameters_are_taken_over() -> None:
    """The payload that the framework itself sends (published names)."""
    params = SamplingParams.from_payload(
        {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "max_new_tokens": 36,
            "stop": None,
            "stop_token_ids": [3, 4],
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
            "sampling_seed": 42,
        }
    )
    assert params == SamplingParams(
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=36,
        stop_token_ids=frozenset({3, 4}),
        skip_special_tokens=False,
        no_stop_trim=True,
        spaces_between_special_tokens=False,
        sampling_seed=42,
    )


def test_only_a_missing_max_new_tokens_is_fitted_to_the_context() -> None:
    assert SamplingParams.from_payload({}).fit_context
    assert not SamplingParams.from_payload({"max_new_tokens": 128}).fit_context
    assert SamplingParams.from_payload({"max_new_tokens": None}).max_new_tokens is None


BAD_SAMPLING = [
    ({"temprature": 1}, "unknown sampling parameter 'temprature'. Did you mean 'temperature'?"),
    ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
    ({"temperature": -1}, "temperature must be a finite number >= 0, got -1.0"),
    ({"temperature": float("nan")}, "temperature must be a finite number >= 0"),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0.0"),
    ({"top_k": 0}, "top_k must be -1 (all tokens) or >= 1, got 0"),
    ({"top_k": 1.5}, "top_k: expected a whole number, got 1.5"),
    ({"max_new_tokens": True}, "max_new_tokens: expected a whole number, got True"),
    ({"max_new_tokens": -3}, "max_new_tokens must be >= 0, got -3"),
    ({"min_new_tokens": 9, "max_new_tokens": 4}, "min_new_tokens must be in [0, max_new_tokens (4)], got 9"),
    ({"stop": [1]}, "stop: expected a string or a list of strings, got [1]"),
    ({"ignore_eos": 1}, "ignore_eos: expected true or false, got 1"),
    ({"n": 0}, "n must be >= 1, got 0"),
    ({"sampling_seed": 2**70}, "sampling_seed must fit into 64 bits"),
    ({"regex": "[0-9]+"}, "sampling parameter 'regex' is not built into this engine (got '[0-9]+')"),
    ([1], "sampling_params: expected an object, got [1]"),
]


@pytest.mark.parametrize(("payload", "message"), BAD_SAMPLING)
def test_wrong_sampling_parameters_are_named(payload: object, message: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        SamplingParams.from_payload(payload)
    assert message in str(caught.value)
    assert caught.value.status == 400


def test_neutral_values_of_parameters_that_are_not_built_in_pass() -> None:
    SamplingParams.from_payload({"frequency_penalty": 0.0, "repetition_penalty": 1.0, "regex": None, "min_p": None})
    GenerateRequest.from_payload({"input_ids": [1], "stream": False, "image_data": None, "top_logprobs_num": 0})


BAD_REQUESTS = [
    ({}, "expected exactly one of 'text' and 'input_ids'"),
    ({"text": "a", "input_ids": [1]}, "expected exactly one of 'text' and 'input_ids'"),
    ({"input_ids": []}, "input_ids: expected a list of token ids, at least one"),
    ({"input_ids": [1, "a"]}, "input_ids: expected whole numbers"),
    ({"input_ids": [[1], []]}, "input_ids: expected whole numbers, at least one per prompt, got []"),
    ({"text": 5}, "text: expected a string"),
    ({"input_ids": [1], "samplingparams": {}}, "Did you mean 'sampling_params'?"),
    ({"input_ids": [1], "image_data": ["x"]}, "'image_data' is not built into this engine"),
    ({"input_ids": [1], "stream": "yes"}, "stream: expected true or false, got 'yes'"),
    ({"input_ids": [[1], [2]], "rid": ["a"]}, "rid: expected 2 strings"),
    ({"input_ids": [[1], [2]], "return_logprob": [True]}, "return_logprob: 1 entries for 2 prompts"),
]


@pytest.mark.parametrize(("payload", "message"), BAD_REQUESTS)
def test_wrong_bodies_are_explained(payload: dict, message: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        GenerateRequest.from_payload(payload)
    assert message in str(caught.value)


def test_a_batch_spreads_lists_and_repeats_single_values() -> None:
    payload = {
        "input_ids": [[1], [2, 3]],
        "sampling_params": [{"temperature": 0}, {"n": 2}],
        "return_logprob": True,
        "logprob_start_len": [0, -1],
        "rid": ["a", "b"],
    }
    requests = GenerateRequest.from_payload(payload)
    assert is_batch(payload)
    assert [r.rid for r in requests] == ["a", "b_0", "b_1"]
    assert [r.input_ids for r in requests] == [[1], [2, 3], [2, 3]]
    assert [r.logprob_start_len for r in requests] == [0, -1, -1]
    assert all(r.return_logprob for r in requests)
    assert requests[0].sampling_params.greedy and not requests[1].sampling_params.greedy


def test_one_prompt_is_no_batch_unless_n_asks_for_more() -> None:
    assert not is_batch({"input_ids": [1, 2], "sampling_params": {"n": 1}})
    assert is_batch({"input_ids": [1, 2], "sampling_params": {"n": 2}})
    assert is_batch({"text": ["a"]})
    [request] = GenerateRequest.from_payload({"text": "a", "rid": "mine"})
    assert request.rid == "mine"


def test_a_result_reads_like_sglang() -> None:
    result = GenerateResult(
        rid="a1",
        text="13",
        output_ids=[4, 6],
        finish_reason=FinishReason("stop", matched=6),
        prompt_tokens=8,
        cached_tokens=7,
        output_logprobs=[-0.1, -0.2],
        weight_versions=[WeightVersionSpan("4", 0, 1), WeightVersionSpan("5", 1, 2)],
        e2e_latency_s=0.5,
    )
    assert result.to_json() == {
        "text": "13",
        "output_ids": [4, 6],
        "meta_info": {
            "id": "a1",
            "finish_reason": {"type": "stop", "matched": 6},
            "prompt_tokens": 8,
            "completion_tokens": 2,
            "cached_tokens": 7,
            "weight_version": "5",
            "weight_versions": [
                {"version": "4", "start": 0, "end": 1},
                {"version": "5", "start": 1, "end": 2},
            ],
            "e2e_latency": 0.5,
            "output_token_logprobs": [[-0.1, 4, None], [-0.2, 6, None]],
            "input_token_logprobs": [],
        },
    }
