"""The built-in rewards by name, and what can be said about `--rm-type` before anything starts.

The table imports nothing: `--help`, `miles check` and the messages about misspelt names come from it. The functions
themselves are in `miles.rollout.rm_hub`, one per row (a test holds the two together).
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from miles.config.draft import Draft
from miles.config.evaluation import EvalDatasetConfig
from miles.errors import FlagError

BOXED = "boxed_"


@dataclass(frozen=True)
class RewardType:
    r"""One built-in reward.

    `keys` are those of the dict that it returns; empty for a number. `reads_box` says that it looks for `\\boxed{}` or
    another marker itself, and is wrong about a response that has been reduced to the content of its box.

    Example: `REWARD_TYPES["dapo"].keys == ("score", "acc", "pred")`
    """

    help: str
    keys: tuple[str, ...] = ()
    any_value: bool = False
    reads_box: bool = False


REWARD_TYPES: dict[str, RewardType] = {
    "math": RewardType(r"1 or 0: the last \boxed{} equals the label, as text or under sympy.", reads_box=True),
    "math_verify": RewardType("1 or 0: the library Math-Verify finds answer and label equal.", reads_box=True),
    "deepscaler": RewardType(r"1 or 0: as math, on the \boxed{} behind </think> or ###Response.", reads_box=True),
    "dapo": RewardType(
        "a dict with score 1.0 or -1.0: the last `Answer: ...` is the label, a whole number.",
        keys=("score", "acc", "pred"),
        reads_box=True,
    ),
    "f1": RewardType("0 to 1: overlap of the words of response and label."),
    "gpqa": RewardType("1.0 or 0.0: the letter of a multiple choice, or the text of the right choice."),
    "ifbench": RewardType("1.0 or 0.0: the response follows all instructions in the metadata (needs IFBench)."),
    "remote_rm": RewardType("what the server at --rm-url answers: a number or a dict.", any_value=True),
    "random": RewardType("0 or 1 by chance."),
    "deterministic_random": RewardType("0 or 1 by chance, the same whenever the same sample is scored again."),
}


def reward_type(name: str) -> RewardType | None:
    """The row of `--rm-type` `name`, with or without `boxed_`; None where there is none."""
    return REWARD_TYPES.get(name.strip().removeprefix(BOXED))


def known_names(name: str = "") -> str:
    """The sentence that helps whoever misspelt `name`."""
    prefix = BOXED if name.startswith(BOXED) else ""
    close = difflib.get_close_matches(name.removeprefix(BOXED), REWARD_TYPES, n=1)
    question = f"Did you mean {prefix}{close[0]}? " if close else ""
    return f"{question}Built in are {', '.join(REWARD_TYPES)}; {BOXED} may stand before each."


# ---- IFBench -------------------------------------------------------------------------------------------------------

IFBENCH_VARIABLE = "MILES_IFBENCH_DIR"
_IFBENCH_MODULES = ("evaluation_lib", "IFBench.evaluation_lib")


def ifbench_folder() -> str | None:
    """The folder that MILES_IFBENCH_DIR names. Raises FlagError where IFBench is not in it."""
    folder = os.environ.get(IFBENCH_VARIABLE)
    if not folder:
        return None
    folder = os.path.abspath(os.path.expanduser(folder))
    if not os.path.isfile(os.path.join(folder, "evaluation_lib.py")):
        raise FlagError("--rm-type ifbench", given=f"{IFBENCH_VARIABLE}={folder} has no evaluation_lib.py.")
    return folder


def ifbench_module() -> str:
    """The name under which IFBench's `evaluation_lib` can be imported. Raises FlagError with what to do."""
    if ifbench_folder() is not None:
        return _IFBENCH_MODULES[0]
    for name in _IFBENCH_MODULES:
        try:
            if importlib.util.find_spec(name) is not None:
                return name
        except ModuleNotFoundError:  # the package around it does not exist
            continue
    raise FlagError(
        "--rm-type ifbench",
        given="IFBench's evaluation_lib is not installed.",
        remedy="git clone https://github.com/allenai/IFBench, pip install -r IFBench/requirements.txt, and set "
        f"{IFBENCH_VARIABLE} to that folder.",
    )


# ---- before the start ----------------------------------------------------------------------------------------------


def resolve_reward(draft: Draft) -> None:
    """Names that do not exist, rewards that cannot work with the other flags, and a run without any reward."""
    if draft["custom_rm_path"] is not None:
        if draft.given("rm_type"):
            draft.notices.append("--rm-type: no meaning here, --custom-rm-path scores the samples.")
        return
    for option, name, key in _named(draft):
        _check_name(draft, option, name)
        _check_key(draft, option, name, key)
    _refuse_no_reward(draft)


def _named(draft: Draft) -> Iterator[tuple[str, str, str]]:
    """(where it stands, name, flag of the reward key) of every reward that the flags name."""
    if draft["rm_type"]:
        yield "--rm-type", draft["rm_type"].strip(), "reward_key"
    if draft["eval_interval"] is None:
        return
    for dataset in draft.eval_datasets:
        name = _name_of(dataset)
        if name:
            yield f"--eval-config, evaluation set {dataset.name!r}: rm_type", name, "eval_reward_key"
        elif draft["rm_type"]:
            yield "--rm-type", draft["rm_type"].strip(), "eval_reward_key"


def _name_of(dataset: EvalDatasetConfig) -> str:
    """The reward that the set names for its samples; empty where their rows or `--rm-type` do."""
    name = dataset.metadata_overrides.get("rm_type", dataset.rm_type)
    return name.strip() if isinstance(name, str) else ""


def _check_name(draft: Draft, option: str, name: str) -> None:
    found = reward_type(name)
    plain = name.removeprefix(BOXED)
    if found is None:
        raise FlagError(option, given=name, expected="the name of a built-in reward", remedy=known_names(name))
    if name != plain and found.reads_box:
        why = "it looks for the box or its own marker, and needs the whole response."
        raise FlagError(f"{option} {name}", given=why, remedy=f"Say {plain}.")
    if plain == "remote_rm" and not draft["rm_url"]:
        raise FlagError(f"{option} {name}", given="needs --rm-url, the address that prompt and response are sent to.")
    if plain == "ifbench":
        ifbench_module()


def _check_key(draft: Draft, option: str, name: str, flag: str) -> None:
    """A dict needs a key, a number cannot have one; whatever turns rewards into numbers later may want either."""
    found, key = reward_type(name), draft[flag]
    if found is None or found.any_value or any(draft.given(other) for other in _OWN_REWARDS):
        return
    given = next((n for n in (flag, "reward_key") if draft.given(n)), None)
    if found.keys and key is None:
        draft.fill("eval_reward_key", found.keys[0])
        draft.fill(flag, found.keys[0])
        assumed = f"{draft.option(flag)} {found.keys[0]}"
        draft.notices.append(f"{option} {name}: {assumed} is assumed; this reward is a dict.")
    elif found.keys and key not in found.keys[:2]:
        expected = f"one of {', '.join(found.keys[:2])}, because {option} is {name}"
        raise FlagError(draft.option(given or flag), given=key, expected=expected)
    elif not found.keys and key is not None:
        what = f"returns a number, which has no entry {key!r}."
        remedy = f"Leave {draft.option(given)} out." if given else "One run cannot mix it with rewards that are dicts."
        raise FlagError(f"{option} {name}", given=what, remedy=remedy)


_OWN_REWARDS = (
    *("rollout_function_path", "eval_function_path", "custom_generate_function_path"),
    *("custom_reward_post_process_path", "custom_convert_samples_to_train_data_path"),
)
"""Plug-ins that score for themselves, or take rewards that are no numbers."""


# ---- no reward at all ----------------------------------------------------------------------------------------------

# Larger files are not searched: the run says it at the first sample.
MAX_SEARCHED_BYTES = 256 << 20


def _refuse_no_reward(draft: Draft) -> None:
    """A run that would generate samples which nothing can score; only where that is certain."""
    if draft["rm_type"] or any(draft.given(name) or draft[name] for name in _MAY_SCORE):
        return
    if draft["num_rollout"] == 0 or draft["loss_type"] == "sft_loss" or draft["debug_train_only"]:
        return
    if draft.given("rollout_function_path") or draft.given("data_source_path"):
        return
    if draft["prompt_data"] and not _may_name_a_reward(draft["prompt_data"]):
        raise FlagError(
            "--rm-type",
            given="nothing scores the samples of this run.",
            remedy="Give --custom-rm-path your/file.py:function, or --rm-type with the name of a built-in reward (no "
            f"row of {draft['prompt_data']} names one, either). {known_names()}",
        )


_MAY_SCORE: tuple[str, ...] = (
    *("custom_generate_function_path", "load_debug_rollout_data", "custom_convert_samples_to_train_data_path"),
    *("custom_reward_post_process_path",),
)


def _may_name_a_reward(prompt_data: str) -> bool:
    """Whether a row of this data could have a metadata entry `rm_type`. True where it is not plain JSON lines."""
    path = Path(prompt_data.partition("@[")[0])
    try:
        if path.suffix != ".jsonl" or path.stat().st_size > MAX_SEARCHED_BYTES:
            return True
        with path.open("rb") as file:
            return any(b"rm_type" in line for line in file)
    except OSError:
        return True


