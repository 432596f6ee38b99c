"""ReTool: programs of the model run while it generates, in the loop of the example and in the built-in one."""

from __future__ import annotations

import asyncio
from argparse import Namespace

import pytest
from tool_runs import NO_EVAL, SMALL, by_loss, check_samples, rewards_vary, trained, weights_changed

from examples.retool import generate_with_retool as example
from examples.retool import sandbox, tool
from examples.tiny_tools import lessons
from miles.types import Sample

RETOOL = "examples/retool/retool.yaml"
MULTI_TURN = "examples/retool/multi_turn.yaml"

pytestmark = pytest.mark.skipif(bool(sandbox.missing_layers()), reason="this machine lacks layers of the sandbox")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that really ran."""
    ran: list[str] = []
    whole = sandbox.Sandbox.run

    async def recorded(self: sandbox.Sandbox, source: str) -> sandbox.Result:
        ran.append(source)
        return await whole(self, source)

    monkeypatch.setattr(sandbox.Sandbox, "run", recorded)
    return ran


def check_conversations(samples: list[Sample]) -> int:
    """What the tool said carries no loss, what the model said does. Returns the number of tool answers."""
    count = 0
    for sample in samples:
        for learned, text in by_loss(sample):
            if learned:
                assert "<|tool|>" not in text
            else:
                assert text.startswith("<|tool|>") and text.endswith("<|end|><|assistant|>")
                count += 1
    return count


@pytest.mark.parametrize("config", [RETOOL, MULTI_TURN])
def test_a_run_executes_masks_and_learns(train, metrics, programs: list[str], config: str) -> None:
    run = train(config, *SMALL, *NO_EVAL, "--num-rollout", 2)
    samples = trained(run)
    assert len(samples) == 32
    check_samples(samples)
    answered = check_conversations(samples)
    assert answered == len(programs) > 16, "most conversations run a program"
    calculated = [s for s in samples if s.reward == 1.0]
    assert len(calculated) >= 5
    for sample in calculated:
        assert f"<answer>{sample.label}</answer>" in sample.response
    assert sum(f"<|tool|>{s.label}<|end|>" in s.response for s in calculated) > len(calculated) / 2
    assert rewards_vary(samples)
    assert {s.metadata["round_number"] for s in samples} >= {1, 2}
    assert max(metrics(run, "train/train_rollout_logprob_abs_diff")) < 0.05
    assert weights_changed(run)


def test_both_loops_make_the_same_samples(train) -> None:
    flags = ("--num-rollout", 1, "--rollout-batch-size", 2, "--n-samples-per-prompt", 4, *NO_EVAL)
    own, built_in = (trained(train(config, *flags)) for config in (RETOOL, MULTI_TURN))
    columns = ("tokens", "response", "loss_mask", "reward", "status")
    for a, b in zip(own, built_in, strict=True):
        assert [getattr(a, name) for name in columns] == [getattr(b, name) for name in columns]
        # Tools take their time, and what is decoded together rounds differently.
        assert a.rollout_log_probs == pytest.approx(b.rollout_log_probs, abs=1e-5)


def test_a_call_beyond_the_budget_is_refused_in_words(train, programs: list[str]) -> None:
    flags = ("--num-rollout", 1, "--rollout-batch-size", 2, "--n-samples-per-prompt", 4, *NO_EVAL)
    samples = trained(train(RETOOL, *flags, "--retool-max-tool-calls", 0))
    assert programs == []
    refused = [s for s in samples if "<|tool|>" in s.response]
    assert refused and all("<|tool|>error: no more calls, answer now<|end|>" in s.response for s in refused)
    assert {s.metadata["tool_calls"] for s in samples} == {0}


def test_the_lessons_of_the_model_show_this_tool() -> None:
    assert tool.SPECS == [lessons.PYTHON]


# ---- the tool and the reward ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("python", {"code": "print(37*48)"}, "1776"),
        ("python", {"code": "print(1)\nprint(2)"}, "1\n2"),
        ("python", {"code": "37*48"}, ""),
        ("python", {"code": "print(3); x"}, "3\nerror: NameError: name 'x' is not defined"),
        ("python", {}, 'error: the only tool is python, with {"code": "..."}'),
        ("python", {"code": 3}, 'error: the only tool is python, with {"code": "..."}'),
        ("shell", {"code": "ls"}, 'error: the only tool is python, with {"code": "..."}'),
    ],
)
def test_tool(name: str, params: dict[str, object], expected: str) -> None:
    assert asyncio.run(tool.execute(name, params)) == expected


CALL = (
    '<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call><|end|>'
    "<|tool|>8<|end|><|assistant|>"
)


@pytest.mark.parametrize(
    ("response", "rounds", "expected"),
    [
        ("<answer>8</answer><|end|>", 1, 1.0),
        (CALL + "<answer> 8 </answer><|end|>", 2, 1.0),
        (CALL + "<answer>9</answer><|end|>", 2, 0.1),
        ("<answer>9</answer><|end|>", 1, 0.0),
        ("<answer>8</answer>" + CALL, 2, 0.1),
        ("<answer>8</answer><answer>8</answer>", 1, 0.0),
        (CALL, 2, 0.1),
        ("8", 1, 0.0),
        ("", 1, 0.0),
    ],
)
def test_reward(response: str, rounds: int, expected: float) -> None:
    sample = Sample(response=response, label="8", metadata={"round_number": rounds})
    assert asyncio.run(example.reward_func(Namespace(retool_call_score=0.1), sample)) == expected
