"""Prompts and responses against the context of the model."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.quickstart import make_tokenizer
from miles.errors import DataError
from miles.hooks import bind
from miles.rollout import context, limits
from miles.rollout.dataset import Dataset
from miles.rollout.generate_utils.generate_endpoint_utils import compute_request_payload
from miles.types import Sample

TOKENIZER = make_tokenizer.tokenizer()
CONTEXT = 20


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    """Those of a run with the built-in generation."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT}))
    return Namespace(
        hf_checkpoint=str(tmp_path), sglang_context_length=None, custom_generate_function_path=None,
        rollout_function_path=limits.BUILT_IN_ROLLOUTS[0], debug_train_only=False, rollout_max_response_len=None,
        rollout_max_context_len=None, use_rollout_routing_replay=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def a_run() -> Iterator[None]:
    context.install(context.RunContext(bind(Namespace()), None))  # type: ignore[arg-type]
    yield
    context.install(None)


def test_context_length(args: Namespace) -> None:
    assert limits.context_length(args) == CONTEXT
    assert limits.context_length(Namespace(**{**vars(args), "sglang_context_length": 8})) == 8
    assert limits.context_length(Namespace(**{**vars(args), "sglang_context_length": 80})) == CONTEXT
    assert limits.context_length(Namespace(hf_checkpoint="org/model")) is None
    assert limits.context_length(Namespace()) is None


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, CONTEXT),
        ({"custom_generate_function_path": "my.generate"}, None),
        ({"rollout_function_path": "my.rollout"}, None),
        ({"debug_train_only": True}, None),
    ],
)
def test_plug_ins_decide_about_their_own_prompts(args: Namespace, changed: dict[str, object], expected: object) -> None:
    assert limits.for_prompts_of(Namespace(**(vars(args) | changed))) == expected


def test_a_response_ends_where_the_context_does(args: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    def most(prompt_tokens: int, wanted: int) -> object:
        payload, halt = compute_request_payload(args, [1] * prompt_tokens, {"max_new_tokens": wanted})
        return halt if payload is None else payload["sampling_params"]["max_new_tokens"]

    with caplog.at_level(logging.WARNING, logger="miles.rollout.limits"):
        assert most(5, 15) == 15
        assert most(20, 1) == Sample.Status.TRUNCATED
        assert not caplog.records
        assert most(5, 16) == 15
        assert most(19, 16) == 1
    (told,) = caplog.messages
    assert "a prompt of 5 tokens and a response of 16 do not fit the context of 20 tokens" in told
    assert "--rollout-max-response-len 15 leaves room" in told


def dataset(
    folder: Path, *prompts: object, context_length: int | None = CONTEXT, max_length: int | None = None
) -> Dataset:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
    return Dataset(str(path), TOKENIZER, None, max_length, context_length=context_length)


def test_prompts_that_leave_no_room(tmp_path: Path) -> None:
    """One token of the quickstart's tokenizer is one character."""
    fits, fills = "1" * 19, "1" * 20
    assert len(dataset(tmp_path, fits, fits)) == 2
    with pytest.raises(DataError, match=r"train\.jsonl:2: a prompt of 20 tokens .* context of 20, and 1 more prompts"):
        dataset(tmp_path, fits, fills, fills + "1")
    assert len(dataset(tmp_path, fits, fills, max_length=19)) == 1, "--rollout-max-prompt-len leaves it out"
    assert len(dataset(tmp_path, fits, fills, context_length=None)) == 2, "a plug-in decides"
    messages = [{"role": "user", "content": "1" * 30}]
    with pytest.raises(DataError, match=r"train\.jsonl:1: a prompt of \d+ tokens"):
        dataset(tmp_path, messages)


def test_prompts_without_a_token(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:2: the prompt is empty"):
        dataset(tmp_path, "1+1=?", "")


def test_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text in ('{"text": "a \\ud83d b"}\n', '{"text": [{"role": "user", "content": "\\ud83d"}]}\n'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"a\.jsonl:1: the prompt holds half of a character, '\\ud83d'"):
            Dataset(str(path), TOKENIZER, None, None)
