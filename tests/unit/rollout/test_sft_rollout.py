from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import carry, make_tokenizer
from miles.errors import FlagError
from miles.rollout import sft_rollout
from miles.types import Group, Sample


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
    ("change", "source", "evaluation", "said"),
    [
        ({}, Prompts(talk("1", "2"), size=2), False, "--n-samples-per-prompt: expected 1 for the SFT rollout, got 2"),
        ({}, Prompts("1+1=?"), False, "--input-key: expected a list of messages"),
        ({}, Prompts(), True, "--eval-interval"),
        ({"rollout_global_dataset": False}, Prompts(), False, "--disable-rollout-global-dataset"),
    ],
)
def test_settings_that_do_not_go_with_it(
    args: Namespace, change: dict[str, Any], source: Prompts, evaluation: bool, said: str
) -> None:
    vars(args).update(change)
    with pytest.raises(FlagError) as caught:
        sft_rollout.generate_rollout(args, 0, source, evaluation=evaluation)
    assert said in str(caught.value)
