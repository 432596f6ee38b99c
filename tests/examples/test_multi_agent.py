"""Solvers and a selector: a list of samples per conversation, rewards per role, a rollout function of its own."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import pytest
from tool_runs import NO_EVAL, SMALL, rewards_vary, trained, weights_changed

from examples.multi_agent import rollout_with_multi_agents as example
from miles.types import Sample

CONFIG = "examples/multi_agent/multi_agent.yaml"
GENERATE = "examples.multi_agent.rollout_with_multi_agents.generate_with_multi_agents"
DEFAULT = "miles.rollout.sglang_rollout.generate_rollout"
FORMS = {
    "rollout function": (),
    "generate function": ("--rollout-function-path", DEFAULT, "--custom-generate-function-path", GENERATE),
}


def teams(samples: list[Sample]) -> list[list[Sample]]:
    """The samples of each conversation, in order."""
    found: dict[object, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.index, []).append(sample)
    return list(found.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_run_trains_all_agents(train, metrics, form: str) -> None:
    run = train(CONFIG, *SMALL, *NO_EVAL, *FORMS[form])
    samples = trained(run)
    assert len(samples) == 3 * 3 * 16
    differ = 0
    for team in teams(samples):
        assert [s.metadata["role"] for s in team] == ["solver", "solver", "selector"]
        *solvers, selector = team
        problem = solvers[0].prompt[0]["content"]
        proposals = [example.answer(s) or "?" for s in solvers]
        assert selector.prompt[0]["content"] == f"{problem} A {proposals[0]} B {proposals[1]}"
        differ += proposals[0] != proposals[1]
        chosen = dict(zip("AB", proposals, strict=True)).get(example.answer(selector) or "")
        assert selector.reward == float(chosen == selector.label)
        for solver, said in zip(solvers, proposals, strict=True):
            assert solver.reward == float(said == solver.label)
        for sample in team:
            sample.validate()
            assert sample.rollout_log_probs is not None and len(sample.rollout_log_probs) == sample.response_length
    assert differ > 10, "two solvers with the same prompt say different things"
    assert rewards_vary(samples)
    assert len(metrics(run, "train/grad_norm")) == 3, "all samples of a rollout make one step"
    assert max(metrics(run, "train/train_rollout_logprob_abs_diff")) < 0.05
    assert weights_changed(run)
    told = metrics(run, "agent/solver_right")
    if form == "rollout function":
        right = [s.reward for s in samples if s.metadata["role"] == "solver"]
        assert sum(told) / 3 == pytest.approx(sum(right) / len(right))
    else:
        assert told == []


def test_both_forms_generate_the_same(train) -> None:
    flags = (*SMALL[2:], "--num-rollout", 1, *NO_EVAL)
    one, other = (trained(train(CONFIG, *flags, *form)) for form in FORMS.values())
    assert [s.tokens for s in one] == [s.tokens for s in other]


def test_evaluation_scores_the_team(train, metrics) -> None:
    run = train(CONFIG, "--eval-interval", 1, "--num-rollout", 0)
    assert 0.0 < metrics(run, "eval/heldout")[0] < 1.0
    from miles.observe.record import read_rollouts

    roles = Counter(s.metadata["role"] for s in read_rollouts(run, 0, evaluation="heldout"))
    assert roles == {"selector": 17 * 4}


def test_more_solvers(train) -> None:
    run = train(CONFIG, *SMALL[2:], "--num-rollout", 1, *NO_EVAL, "--multi-agent-solvers", 3)
    samples = trained(run)
    assert len(samples) == 4 * 16
    assert " C " in samples[3].prompt[0]["content"]


def test_too_many_solvers_are_refused(train, capsys: pytest.CaptureFixture[str]) -> None:
    train(CONFIG, *SMALL, "--multi-agent-solvers", 9, status=2)
    assert "--multi-agent-solvers" in capsys.readouterr().err


def test_roles_are_compared_with_themselves() -> None:
    def of(role: str, *rewards: float) -> list[Sample]:
        return [Sample(group_index=0, reward=r, metadata={"role": role}) for r in rewards]

    other = Sample(group_index=1, reward=5.0, metadata={"role": "solver"})
    samples = [*of("solver", 1.0, 0.0), *of("selector", 1.0, 1.0), other]
    raw, rewards = example.normalise_by_role(Namespace(reward_key=None), samples)
    assert raw == [1.0, 0.0, 1.0, 1.0, 5.0]
    assert rewards == pytest.approx([0.7071, -0.7071, 0.0, 0.0, 0.0], abs=1e-4)
