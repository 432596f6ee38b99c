"""Made-up samples are like those of the default rollout, and drawn logits say what they should."""

from __future__ import annotations

import copy
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from trial_helpers import FLAGS, ROOT

from miles.batch import pack
from miles.config import parse
from miles.hooks import bind
from miles.hooks.threads import Threads
from miles.loss import log_probs_from_logits
from miles.rollout.tokenizer import load_tokenizer
from miles.trial.caller import Caller, InPlace, TookTooLong
from miles.trial.material import Material, Writer, answers, made_up
from miles.trial.outcome import Trial
from miles.trial.training import MAX_LOGITS, drawn
from miles.trial.watch import Watch, same
from miles.types import Sample

BASE = ROOT / "examples/quickstart/base"


def args_of(*more: str) -> Namespace:
    return parse([*FLAGS, *more])[1]


def test_samples_are_those_of_the_runs_own_data() -> None:
    material = made_up(args_of())
    rows = [json.loads(line) for line in (ROOT / "examples/quickstart/data/train.jsonl").open()][:2]
    tokenizer = load_tokenizer(str(BASE), trust_remote_code=False)
    assert material.trusted and [len(group) for group in material.groups] == [4, 4]
    for group, row in zip(material.groups, rows, strict=True):
        for sample in group:
            sample.validate()
            assert (sample.prompt, sample.label) == (row["prompt"], row["label"])
            response = sample.tokens[len(sample.tokens) - sample.response_length :]
            assert sample.tokens == tokenizer.encode(sample.prompt + sample.response, add_special_tokens=False)
            assert response == tokenizer.encode(sample.response, add_special_tokens=False)
            assert sample.response.endswith("<eos>") == (sample.status == Sample.Status.COMPLETED)
            assert len(sample.rollout_log_probs or []) == sample.response_length
    assert [s.index for group in material.groups for s in group] == list(range(8))
    assert [s.group_index for group in material.groups for s in group] == [0] * 4 + [1] * 4


def test_metadata_tools_and_reward_keys(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    row = {"prompt": prompt, "label": {"a": 1}, "metadata": {"k": [1]}, "tools": [{"x": 1}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ("--prompt-data", str(tmp_path / "rows.jsonl"), "--reward-key", "acc", "--rm-type", "dapo")
    ((sample, *_),) = made_up(args_of(*flags)).groups
    assert sample.prompt == row["prompt"] and sample.label == {"a": 1}
    assert sample.metadata == {"k": [1], "tools": [{"x": 1}]}
    assert sample.reward == {"acc": 1.0} and sample.response == '{"a": 1}<eos>'
    rendered = made_up(args_of(*flags, "--apply-chat-template")).groups[0][0].prompt
    assert isinstance(rendered, str) and "hi" in rendered


def test_without_data_or_tokenizer(tmp_path: Path) -> None:
    """A miniature stands in, and its names say that it may not be like the run's samples."""
    material = made_up(Namespace(n_samples_per_prompt=1, hf_checkpoint="somebody/model", metadata_key="metadata"))
    assert not material.trusted and material.name == "2 made-up prompts, 1 made-up response each"
    for (sample,) in material.groups:
        sample.validate()
        assert sample.label in sample.response
    (tmp_path / "tokenizer.json").write_text("{")
    broken = Namespace(n_samples_per_prompt=1, hf_checkpoint=str(tmp_path), metadata_key="metadata")
    made_up(broken).groups[0][0].validate()


def test_an_empty_answer_has_no_token() -> None:
    args = args_of()
    sample = made_up(args).groups[0][0]
    empty = Writer(args).empty_answer_to(sample)
    empty.validate()
    assert (empty.response, empty.response_length, empty.rollout_log_probs) == ("", 0, [])
    assert empty.prompt == sample.prompt and empty.tokens == sample.tokens[: -sample.response_length]
    assert answers(None) == answers("") == []


def test_plug_ins_get_copies() -> None:
    material = made_up(args_of())
    before = copy.deepcopy(material.groups)
    material.flat()[0].metadata["changed"] = True
    material.fresh()[0].clear()
    assert material.groups == before
    again = material.with_rewards(range(8))
    assert [s.reward for s in again.flat()] == list(range(8)) and material.groups == before


# ---- logits --------------------------------------------------------------------------------------------------------


def trial(args: Namespace, material: Material) -> Trial:
    (hook,) = bind(Namespace(custom_rm_path=f"{ROOT}/examples/quickstart/carry.py:reward"))
    return Trial(hook, args, material, Caller(None))


@pytest.mark.parametrize("temperature", ["1.0", "0.7"])
def test_logits_give_the_log_probs_that_were_meant(temperature: str) -> None:
    args = args_of("--rollout-temperature", temperature)
    data = drawn(trial(args, made_up(args)), with_logits=True)
    for row, logits in enumerate(data.logits):
        micro = pack(data.batch, [row])
        found = log_probs_from_logits(logits[micro.predicting], micro.targets, temperature=float(temperature)).log_probs
        torch.testing.assert_close(found, micro.column(data.current), rtol=1e-4, atol=1e-4)
    sampled = torch.from_numpy(data.batch.rollout_log_probs)
    assert (data.current - sampled).abs().max() < 0.5
    assert data.batch.response_columns["advantages"].any()


def test_long_samples_of_a_large_vocabulary_are_cut(tmp_path: Path) -> None:
    """151936 entries and 4000 tokens a sample would be 19 GB of logits."""
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 151936}))
    args = args_of()
    args.hf_checkpoint = str(tmp_path)
    samples = [
        Sample(
            index=i, group_index=0, prompt="", tokens=list(range(1000, 5000)), response_length=3000, reward=float(i),
            loss_mask=[1] * 3000, rollout_log_probs=[-0.5] * 3000, status=Sample.Status.COMPLETED,
        )
        for i in range(6)
    ]  # fmt: skip
    begin = time.monotonic()
    data = drawn(trial(args, Material("long ones", [samples])), with_logits=True)
    assert time.monotonic() - begin < 10
    assert sum(logits.numel() for logits in data.logits) <= 1.1 * MAX_LOGITS
    assert len(data.batch) >= 2 and all(data.batch.response_lengths >= 8)
    assert data.batch.tokens[0] == 2000 - (data.batch.total_lengths[0] - data.batch.response_lengths[0])


# ---- clock and snapshots -------------------------------------------------------------------------------------------


def test_one_event_loop_for_all_calls() -> None:
    import asyncio

    async def loop(_: Any) -> Any:
        return asyncio.get_running_loop()

    with Caller(1.0) as call:
        assert call(loop, 1) is call(loop, 2)
    assert len(call.seconds) == 2


def test_the_clock_passes_catch_all_clauses() -> None:
    def swallows() -> None:
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    with Caller(0.1) as call, pytest.raises(TookTooLong):
        call(swallows)


def test_synchronous_ones_are_called_in_place() -> None:
    import asyncio
    import threading

    async def where(threads: Threads) -> int:
        return await threads.run(threading.get_ident)

    assert asyncio.run(where(InPlace())) == threading.get_ident()
    assert asyncio.run(where(Threads())) != threading.get_ident()


def test_watch_names_what_changed() -> None:
    sample = Sample(tokens=[1, 2], response_length=1, reward=torch.tensor([1.0, 2.0]))  # type: ignore[arg-type]
    watch = Watch([sample])
    assert watch.changed() == []
    sample.tokens.append(3)
    sample.reward[0] = 5.0  # type: ignore[index]
    sample.metadata["free"] = 1
    assert watch.changed() == ["tokens", "reward"]
    assert not same(torch.zeros(2), torch.zeros(3)) and same([float("inf")], [float("inf")])
