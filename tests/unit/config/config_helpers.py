"""The smallest command line that is a run, and what a table of flags says to it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from miles.config import RunConfig, parse
from miles.errors import FlagError

REQUIRED = [
    *("--hf-checkpoint", "models/base", "--prompt-data", "train.jsonl", "--num-rollout", "3"),
    *("--rollout-batch-size", "16", "--n-samples-per-prompt", "8", "--global-batch-size", "64"),
]


def settings(*flags: str) -> RunConfig:
    return parse([*REQUIRED, *flags])[0]


def namespace(*flags: str) -> Namespace:
    return parse([*REQUIRED, *flags])[1]


def refusal(*flags: str) -> str:
    """The sentence with which these flags are refused."""
    with pytest.raises(FlagError) as caught:
        settings(*flags)
    return str(caught.value)


def value_of(config: RunConfig, name: str) -> object:
    """The value of a flag, in whichever section it stands."""
    from miles.config.sections import SECTIONS

    (found,) = [getattr(config.section(s), name) for s in SECTIONS if hasattr(config.section(s), name)]
    return found


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)
