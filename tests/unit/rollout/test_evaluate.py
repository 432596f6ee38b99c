"""Evaluation: which prompts with which sampling parameters, what becomes of their scores, and pass@k of them."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_chat import TalkingEngine, chat_tokenizer, state_of

from miles.config import parse
from miles.errors import DataError, FlagError, HookError
from miles.observe.metrics import eval_metrics
from miles.rollout import context
from miles.rollout.evaluate import evaluate
from miles.rollout.generate_hub import single_turn
from miles.types import GenerateFnInput, GenerateFnOutput, Sample

TOKENIZER = chat_tokenizer()
HERE = "tests/unit/rollout/test_evaluate.py"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    context.install(None)


def prompts(folder: Path, name: str, count: int) -> str:
    rows = [{"input": f"{name}{i}", "label": str(i), "metadata": {"row": i}} for i in range(count)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


async def by_length(args: Namespace, sample: Sample) -> float:
    return float(len(sample.response))


async def fails_on_b(args: Namespace, sample: Sample) -> float:
    return 1 / (sample.response != "b")


async def several_scores(args: Namespace, sample: Sample) -> dict[str, float]:
    return {"train": 1.0} if sample.response == "b" else {"train": 1.0, "strict": 0.5}


async def aborts_b(input: GenerateFnInput) -> GenerateFnOutput:
    assert input.evaluation
    output = await single_turn.generate(input)
    assert isinstance(output.samples, Sample)
    if output.samples.response == "b":
        output.samples.status = Sample.Status.ABORTED
    return output


def run(
    says: list[Any], *flags: str, rm: str = "by_length", policies: dict[str, str] | None = None
) -> tuple[dict[str, dict[str, Any]], TalkingEngine]:
    async def go() -> tuple[dict[str, dict[str, Any]], TalkingEngine]:
        engine = TalkingEngine(TOKENIZER, says)
        more = ("--custom-rm-path", f"{HERE}:{rm}", "--eval-interval", "1", *flags)
        state = state_of(engine, *more, tokenizer=TOKENIZER, policies=policies)
        return (await evaluate(state, {})).data, engine

    return asyncio.run(go())


def test_each_set_has_its_own_parameters(tmp_path: Path) -> None:
    sets = tmp_path / "sets.yaml"
    sets.write_text(f"""
defaults: {{temperature: 0.5, stop: ["END"], min_new_tokens: 2}}
datasets:
  - name: a
    path: {prompts(tmp_path, "a", 1)}
    n_samples_per_eval_prompt: 2
    top_p: 0.9
    max_response_len: 7
    metadata_overrides: {{difficulty: hard}}
    rm_type: f1
  - name: b
    path: {prompts(tmp_path, "b", 3)}@[1:3]
    temperature: 0.0
    stop: "."
    stop_token_ids: [5, 6]
    min_new_tokens: 0
""")
    data, engine = run(
        ["x"] * 4, "--eval-config", str(sets), "--rollout-max-response-len", "9", "--rollout-stop", "S",
        "--eval-top-k", "4", "--label-key", "label",
    )  # fmt: skip
    given = {TOKENIZER.decode(r["input_ids"]): r["sampling_params"] for r in engine.requests}
    keys = ("temperature", "top_p", "top_k", "max_new_tokens", "stop", "stop_token_ids", "min_new_tokens")
    assert {prompt: [params.get(key) for key in keys] for prompt, params in given.items()} == {
        "a0": [0.5, 0.9, 4, 7, ["END"], None, 2],
        "b1": [0.0, 1.0, 4, 9, ".", [5, 6], 0],
        "b2": [0.0, 1.0, 4, 9, ".", [5, 6], 0],
    }
    assert [(s.index, s.group_index, s.label) for s in data["a"]["samples"]] == [(0, None, "0"), (1, None, "0")]
    assert data["a"]["samples"][0].metadata == {"row": 0, "difficulty": "hard", "rm_type": "f1"}
    assert data["b"]["samples"][0].metadata == {"row": 1}
    assert data["b"] | {"samples": None} == {
        "rewards": [1.0, 1.0], "truncated": [False, False], "prompt_indices": [0, 1], "samples": None,
    }  # fmt: skip
    assert data["a"]["prompt_indices"] == [0, 0]


def test_flags_without_a_file(tmp_path: Path) -> None:
    data, engine = run(
        [("x", "length")] * 3, "--eval-prompt-data", "a", prompts(tmp_path, "a", 1), "b", prompts(tmp_path, "b", 2),
        "--eval-min-new-tokens", "3", "--eval-temperature", "0.25", "--rollout-temperature", "0.75",
    )  # fmt: skip
    assert list(data) == ["a", "b"] and data["b"]["truncated"] == [True, True]
    for request in engine.requests:
        params = request["sampling_params"]
        assert (params["min_new_tokens"], params["temperature"]) == (3, 0.25)


def test_parameters_belong_to_one_sample_each(tmp_path: Path) -> None:
    """A generate function that changes its parameters changes nobody else's."""
    _, engine = run(["x"] * 2, "--eval-prompt-data", "a", prompts(tmp_path, "a", 2))
    assert len({id(request["sampling_params"]) for request in engine.requests}) == 2


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("stop: 5", "stop: expected a text or a list of texts, got 5"),
        ("stop: [5]", "stop: expected a text or a list of texts"),
        ("stop_token_ids: [x]", "stop_token_ids: expected a list of token ids"),
        ("min_new_tokens: -1", "min_new_tokens: expected a whole number >= 0, got -1"),
    ],
)
def test_wrong_entries_are_named(entry: str, problem: str, tmp_path: Path) -> None:
    sets = tmp_path / "sets.yaml"
    sets.write_text(f"datasets:\n  - name: a\n    path: p.jsonl\n    {entry}\n")
    with pytest.raises(DataError, match=rf"evaluation set 'a': {problem}".replace("[", r"\[")):
        parse(
            ["--hf-checkpoint", "m", "--prompt-data", "p", "--num-rollout", "1", "--rollout-batch-size", "2",
             "--num-steps-per-rollout", "1", "--eval-config", str(sets), "--eval-interval", "1"]
        )  # fmt: skip


def test_a_null_stands_for_no_value(tmp_path: Path) -> None:
    sets = tmp_path / "sets.yaml"
    path = prompts(tmp_path, "a", 1)
    sets.write_text(f"datasets: [{{name: a, path: {path}, n_samples_per_eval_prompt: null, temperature: null}}]")
    data, engine = run(["x"], "--eval-config", str(sets))
    assert len(data["a"]["rewards"]) == 1 and engine.requests[0]["sampling_params"]["temperature"] is None


# ---- scores that are not there -------------------------------------------------------------------------------------


def test_a_failed_score_is_no_zero_and_pass_at_k_does_without_it(tmp_path: Path) -> None:
    flags = ("--eval-prompt-data", "a", prompts(tmp_path, "a", 2), "--n-samples-per-eval-prompt", "2")
    with pytest.raises(HookError):
        run(["a", "b", "c", "d"], *flags, rm="fails_on_b")
    data, _ = run(["a", "b", "c", "d"], *flags, rm="fails_on_b", policies={"custom-rm": "drop"})
    entry = data["a"]
    assert (entry["rewards"], entry["prompt_indices"]) == ([1.0, 1.0, 1.0], [0, 1, 1])
    assert [s.response for s in entry["samples"]] == ["a", "c", "d"]
    metrics = eval_metrics(data, group_size=2, with_pass_rate=True)
    assert (metrics["eval/a"], metrics["eval/a-pass@1"], metrics["eval/a-pass@2"]) == (1.0, 1.0, 1.0)


def test_an_aborted_sample_has_no_score(tmp_path: Path) -> None:
    data, _ = run(
        ["a", "b"], "--eval-prompt-data", "a", prompts(tmp_path, "a", 2),
        "--custom-generate-function-path", f"{HERE}:aborts_b",
    )  # fmt: skip
    assert (data["a"]["rewards"], data["a"]["prompt_indices"]) == ([1.0], [0])


def test_the_reward_key_of_evaluation(tmp_path: Path) -> None:
    flags = ("--eval-prompt-data", "a", prompts(tmp_path, "a", 2), "--reward-key", "train")
    data, _ = run(["a", "a"], *flags, "--eval-reward-key", "strict", rm="several_scores")
    assert data["a"]["rewards"] == [0.5, 0.5]
    assert run(["a", "b"], *flags, rm="several_scores")[0]["a"]["rewards"] == [1.0, 1.0]
    with pytest.raises(HookError, match="returned no 'strict', which --eval-reward-key names, but 'train'") as caught:
        run(["a", "b"], *flags, "--eval-reward-key", "strict", rm="several_scores")
    assert caught.value.failure.flag == "--custom-rm-path"


def test_group_rewards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--group-rm"):
        run([], "--group-rm", "--eval-prompt-data", "a", prompts(tmp_path, "a", 1))


# ---- pass@k of evaluation functions --------------------------------------------------------------------------------


def test_pass_at_k_needs_whole_groups_or_numbers_of_problems() -> None:
    data = {"own": {"rewards": [1, 0, 1]}}
    with pytest.raises(FlagError, match="--log-passrate: 3 rewards of evaluation set 'own' are not groups of 2"):
        eval_metrics(data, group_size=2, with_pass_rate=True)
    data["own"]["prompt_indices"] = [7, 7, 9]
    metrics = eval_metrics(data, group_size=2, with_pass_rate=True)
    assert (metrics["eval/own-pass@1"], metrics["eval/own-pass@2"]) == (0.75, 1.0)


