from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import carry, make_tokenizer
from miles.config import parse
from miles.errors import FlagError, UsageError
from miles.hooks.values import BadReturn, evaluation_data
from miles.rollout import sft_rollout
from miles.rollout.singleton import SingletonMeta
from miles.types import Group, RolloutFnEvalOutput, Sample

BASE = Path(carry.__file__).parent / "base"


class Prompts:
    """A data source of given conversations."""

    def __init__(self, *conversations: Any, size: int = 1) -> None:
        self.groups = [[Sample(index=i, prompt=c) for _ in range(size)] for i, c in enumerate(conversations)]

    def get_samples(self, n: int) -> list[Group]:
        taken, self.groups = self.groups[:n], self.groups[n:]
        return taken


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    make_tokenizer.save(tmp_path)
    return Namespace(
        rollout_global_dataset=True, hf_checkpoint=str(tmp_path), loss_mask_type="template", rollout_batch_size=2
    )


def talk(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_conversations_become_finished_samples(args: Namespace) -> None:
    source = Prompts(talk("1+1=?", "2"), talk("1?", "2", "3?", "45"), talk("6", "7"))
    groups = sft_rollout.generate_rollout(args, 0, source)
    encode = make_tokenizer.tokenizer().encode
    got = [(s.tokens, s.response_length, s.loss_mask, s.reward, s.status) for (s,) in groups]
    assert got == [
        (encode("1+1=?2<eos>"), 2, [1, 1], 0, Sample.Status.PENDING),
        (encode("1?2<eos>3?45<eos>"), 7, [1, 1, 0, 0, 1, 1, 1], 0, Sample.Status.PENDING),
    ]
    assert len(source.groups) == 1, "takes rollout_batch_size groups"
    for (sample,) in groups:
        sample.validate()


def test_demonstrations_are_learned_from_the_answer_on(args: Namespace) -> None:
    rows = carry.demonstrations(2)
    groups = sft_rollout.generate_rollout(args, 0, Prompts(*(row["messages"] for row in rows)))
    for (sample,), row in zip(groups, rows, strict=True):
        question, answer = (message["content"] for message in row["messages"])
        learned = make_tokenizer.tokenizer().decode(sample.tokens[-sample.response_length :])
        assert learned == answer + "<eos>"
        assert len(sample.tokens) - sample.response_length == len(question)
        assert set(sample.loss_mask) == {1}


def test_nothing_to_learn_keeps_its_place_without_loss(args: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    silent = [*talk("1?"), {"role": "assistant", "content": "2", "step_loss_mask": 0}]
    groups = sft_rollout.generate_rollout(args, 0, Prompts(talk("1?"), silent))
    assert [(s.response_length, s.loss_mask) for (s,) in groups] == [(1, [0]), (1, [0])]
    assert "conversation 0 has nothing to learn" in caplog.text


def test_the_very_first_token_is_never_learned(args: Namespace) -> None:
    ((sample,),) = sft_rollout.generate_rollout(args, 0, Prompts([{"role": "assistant", "content": "12"}]))
    assert (len(sample.tokens), sample.response_length, sample.loss_mask) == (3, 2, [1, 1])


def test_another_model_gets_its_own_tokenizer(args: Namespace, tmp_path: Path) -> None:
    sft_rollout.generate_rollout(args, 0, Prompts(talk("1?", "2")))
    first = sft_rollout.TOKENIZER
    other = tmp_path / "other"
    make_tokenizer.save(other)
    args.hf_checkpoint = str(other)
    sft_rollout.generate_rollout(args, 0, Prompts(talk("1?", "2")))
    assert sft_rollout.TOKENIZER is not first


@pytest.mark.parametrize(
    ("change", "source", "said"),
    [
        ({}, Prompts(talk("1", "2"), size=2), "--n-samples-per-prompt: expected 1 for the SFT rollout, got 2"),
        ({}, Prompts("1+1=?"), "--input-key: expected a list of messages"),
        ({"rollout_global_dataset": False}, Prompts(), "--disable-rollout-global-dataset"),
    ],
)
def test_settings_that_do_not_go_with_it(args: Namespace, change: dict[str, Any], source: Prompts, said: str) -> None:
    vars(args).update(change)
    with pytest.raises(FlagError) as caught:
        sft_rollout.generate_rollout(args, 0, source)
    assert said in str(caught.value)


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluating(tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """`evaluating(conversation, ...)`: what an evaluation on a file of them returns."""

    def call(*conversations: Any) -> dict[str, Any]:
        SingletonMeta.clear_all_instances()
        file = tmp_path / "held.jsonl"
        file.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
        _config, parsed = parse(
            [
                *("--hf-checkpoint", str(BASE), "--prompt-data", str(file), "--input-key", "messages"),
                *("--eval-prompt-data", "held", str(file), "--eval-interval", "1", "--loss-type", "sft_loss"),
                *("--rollout-function-path", "miles.rollout.sft_rollout.generate_rollout", "--num-rollout", "1"),
                *("--loss-mask-type", "template", "--debug-train-only", "--train-backend", "fsdp"),
                *("--rollout-batch-size", "1", "--global-batch-size", "1", "--n-samples-per-prompt", "1"),
            ]
        )
        output = sft_rollout.generate_rollout(parsed, 0, Prompts(), evaluation=True)
        assert isinstance(output, RolloutFnEvalOutput)
        return output.data

    yield call
    SingletonMeta.clear_all_instances()


def test_an_evaluation_is_every_conversation_of_every_set(evaluating: Callable[..., dict[str, Any]]) -> None:
    data = evaluating(talk("1+1=?", "2"), talk("1?", "2", "3?", "45"))
    assert data.keys() == {"held"} and data["held"].keys() == {"conversations"}
    got = [(s.index, s.response_length, s.loss_mask) for s in data["held"]["conversations"]]
    assert got == [(0, 2, [1, 1]), (1, 7, [1, 1, 0, 0, 1, 1, 1])]
    evaluation_data(data)


def test_a_conversation_without_a_second_token_is_named(evaluating: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="conversation 1 has 1 tokens, expected at least 2"):
        evaluating(talk("1", "2"), [{"role": "user", "content": "1"}])


@pytest.mark.parametrize("given", [[], None, "text", [1]])
def test_conversations_that_are_none(given: Any) -> None:
    with pytest.raises(BadReturn, match=r"conversations of data set 'held': got .*, expected a list of Samples"):
        evaluation_data({"held": {"conversations": given}})
