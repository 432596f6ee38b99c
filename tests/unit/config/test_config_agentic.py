"""What generation with an agent needs of the other flags."""

from __future__ import annotations

import pytest
from config_helpers import refusal, settings

AGENTIC = "miles.rollout.generate_hub.agentic_tool_call.generate"
GENERATE = ("--custom-generate-function-path", AGENTIC)
AGENT = ("--custom-agent-function-path", "my.agent")


def test_whole() -> None:
    config = settings(*GENERATE, *AGENT, "--use-miles-router")
    assert config.hooks.custom_agent_function_path == "my.agent" and config.router.use_miles_router


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        (GENERATE, "--custom-agent-function-path and --use-miles-router (agents talk to its sessions)"),
        ((*GENERATE, *AGENT), "--use-miles-router (agents talk to its sessions)"),
        ((*GENERATE, "--use-miles-router"), "--custom-agent-function-path"),
    ],
)
def test_what_is_missing_is_named(flags: tuple[str, ...], missing: str) -> None:
    assert refusal(*flags) == f"--custom-generate-function-path {AGENTIC}: needs {missing}."


def test_an_agent_cannot_be_continued() -> None:
    text = refusal(*GENERATE, *AGENT, "--use-miles-router", "--partial-rollout")
    assert text.startswith("--partial-rollout: ") and "cut short" in text


def test_an_agent_that_nobody_calls_is_told_of() -> None:
    (notice,) = [n for n in settings(*AGENT).notices if n.startswith("--custom-agent-function-path")]
    assert "no meaning here" in notice and AGENTIC in notice
