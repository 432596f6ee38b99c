"""reasoning-gym: a data source that repeats itself exactly, and the library's scorers under a time limit."""

from __future__ import annotations

import builtins
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("reasoning_gym")

from examples.reasoning_gym.procedural import ReasoningGymSource, answer_of
from examples.reasoning_gym.scorer import score
from miles.hooks import load_function
from miles.observe.record import read_rollouts, recorded_rollouts
from miles.rollout.rm_hub import pool
from miles.types import Sample

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/reasoning_gym/reasoning_gym.yaml"
SMALL = ("--rollout-batch-size", 4, "--n-samples-per-prompt", 4, "--num-steps-per-rollout", 1)
# Scores that nobody waits for any more are still worked off, one killed process after the other.
ONE_PAIR = ("--rollout-batch-size", 1, "--n-samples-per-prompt", 2, "--num-steps-per-rollout", 1)
SUMS = {"dataset": "chain_sum", "prompt": "{expression}=?", "remove": " ", "config": {"min_terms": 2, "max_terms": 2}}


def args(*datasets: dict[str, Any], **more: Any) -> Namespace:
    defaults: dict[str, Any] = {"rollout_seed": 7, "n_samples_per_prompt": 2, "apply_chat_template": False}
    return Namespace(**{**defaults, "reasoning_gym": list(datasets), "save": None, "load": None, **more})


def prompts(groups: list[list[Sample]]) -> list[Any]:
    return [group[0].prompt for group in groups]


# ---- the source ----------------------------------------------------------------------------------------------------


def test_groups_are_numbered_and_do_not_share() -> None:
    first, second = ReasoningGymSource(args(SUMS)).get_samples(2)
    assert [s.index for s in first + second] == [0, 1, 2, 3]
    assert [s.group_index for s in first + second] == [0, 0, 1, 1]
    assert first[0].prompt == first[1].prompt != second[0].prompt
    left, right = first[0].prompt.removesuffix("=?").replace("-", "+-").split("+", 1)
    assert int(first[0].label) == int(left) + int(right.replace("+", ""))
    first[0].metadata["reasoning_gym"]["index"] = 99
    assert first[1].metadata["reasoning_gym"]["index"] == 0


def test_the_same_seed_repeats_and_another_does_not() -> None:
    mixture = [SUMS, {**SUMS, "dataset": "products", "weight": 2}]
    draw = prompts(ReasoningGymSource(args(*mixture)).get_samples(20))
    assert draw == prompts(ReasoningGymSource(args(*mixture)).get_samples(20))
    assert draw != prompts(ReasoningGymSource(args(*mixture, rollout_seed=8)).get_samples(20))
    source = ReasoningGymSource(args(*mixture))
    assert draw == [p for _ in range(4) for p in prompts(source.get_samples(5))], "however it is asked for"
    assert any("*" in p for p in draw) and any("*" not in p for p in draw), "both data sets take part"


def test_a_data_set_starts_again_at_its_end() -> None:
    source = ReasoningGymSource(args({**SUMS, "config": {**SUMS["config"], "size": 3}}))
    drawn = prompts(source.get_samples(7))
    assert drawn[:3] == drawn[3:6] and drawn[6] == drawn[0]


def test_what_comes_back_is_given_out_first_and_saved(tmp_path: Path) -> None:
    source = ReasoningGymSource(args(SUMS, save=str(tmp_path)))
    groups = source.get_samples(4)
    source.add_samples([])
    groups[1][0].tokens, groups[1][0].status = [1, 2], Sample.Status.ABORTED
    source.add_samples(groups[1:3])
    assert [g[0].group_index for g in source.get_samples(1)] == [1]
    source.save(5)

    resumed = ReasoningGymSource(args(SUMS, load=str(tmp_path)))
    resumed.load(5)
    again = resumed.get_samples(3)
    assert [g[0].group_index for g in again] == [2, 4, 5]
    assert prompts(again) == prompts(source.get_samples(3))
    fresh = ReasoningGymSource(args(SUMS, load=str(tmp_path)))
    fresh.load(-1)
    assert fresh.position == 0


def test_conversations() -> None:
    (group,) = ReasoningGymSource(args({"dataset": "chain_sum"}, apply_chat_template=True)).get_samples(1)
    system, user = group[0].prompt
    assert (system["role"], user["role"]) == ("system", "user")
    assert "<answer>" in system["content"] and "arithmetic problem" in user["content"]


@pytest.mark.parametrize(
    ("datasets", "says"),
    [
        ([], "expected a list of data sets in --custom-config-path"),
        ([{"name": "chain_sum"}], "has other keys than dataset, weight, config, prompt, remove"),
        ([{"dataset": "chain_sums"}], "the library has no data set 'chain_sums'"),
        ([{"dataset": "chain_sum", "weight": 0}], "expected a weight > 0, got 0"),
        ([{"dataset": "chain_sum", "prompt": "{expresion}"}], "Expected only names in braces of these: "),
    ],
)
def test_wrong_settings_are_named(datasets: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        ReasoningGymSource(args(*datasets))
    assert says in str(caught.value)


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("reasoning_gym"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *rest)

    copy = tmp_path / "procedural_without.py"
    copy.write_text((ROOT / "examples/reasoning_gym/procedural.py").read_text())
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        load_function(f"{copy}:reward")


# ---- the reward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>1</think>42<eos>", "42"),
        ("<think>1</think> 42 ", "42"),
        ("<think>x</think> so <answer> 7 </answer> or <answer>8</answer>", "8"),
        ("no end of thinking", None),
        ("</think>1</think>2", None),
        ("", None),
    ],
)
def test_the_final_answer(response: str, answer: str | None) -> None:
    assert answer_of(response) == answer


def test_the_library_scores() -> None:
    sample = ReasoningGymSource(args(SUMS)).get_samples(4)[3][0]
    origin = sample.metadata["reasoning_gym"]
    assert score(*origin.values(), sample.label) == 1.0
    assert score(*origin.values(), "no number") < 0.1
    assert score(*origin.values(), None) == 0.0


def test_a_scorer_that_never_ends_is_ended(train, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_function("examples/reasoning_gym/procedural.py:reward").__globals__
    plug_in = tmp_path / "hangs.py"
    plug_in.write_text("def forever(*given):\n    while True:\n        pass\n")
    monkeypatch.setitem(module, "SCORER", f"{plug_in}:forever")
    monkeypatch.setattr(pool.shared(), "limit_s", 0.3)
    train(CONFIG, *ONE_PAIR, "--num-rollout", 1, status=1)
    said = capfd.readouterr().err
    assert "gave no verdict within 0.3 s" in said and "procedural.py:" in said


def test_runs_are_scored_and_resume_exactly(train, tmp_path: Path) -> None:
    """A resumed run draws what a source that was never stopped would have drawn next."""
    save = ("--save", tmp_path / "ck")
    first = train(CONFIG, *SMALL, *save, "--num-rollout", 2)
    resumed = train(CONFIG, *SMALL, *save, "--load", tmp_path / "ck", "--num-rollout", 3)
    assert (recorded_rollouts(first), recorded_rollouts(resumed)) == ([0, 1], [2])

    (datasets,) = yaml.safe_load((ROOT / "examples/reasoning_gym/gym.yaml").read_text()).values()
    expected = ReasoningGymSource(args(*datasets, rollout_seed=42, n_samples_per_prompt=4)).get_samples(12)
    drawn = [s for run, i in ((first, 0), (first, 1), (resumed, 2)) for s in read_rollouts(run, i)]
    assert [(s.index, s.prompt, s.label) for s in drawn] == [(s.index, s.prompt, s.label) for g in expected for s in g]
    assert {s.reward for s in drawn} >= {0.0, 1.0}
    assert all((s.reward == 1.0) == (answer_of(s.response) == s.label) for s in drawn)
