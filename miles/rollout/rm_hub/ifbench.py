"""The grader of `--rm-type ifbench`: whether a response follows every instruction of its prompt, by IFBench's checks.

IFBench (Pyatkin et al. 2025, github.com/allenai/IFBench) is a folder of Python files, not a package. They are used as
they are: `evaluation_lib` is imported from the folder that `MILES_IFBENCH_DIR` names, else from the import path, where
it may also be `IFBench.evaluation_lib`. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

from miles.config.rewards import ifbench_folder, ifbench_module

JsonDict = dict[str, Any]
KwargsDict = dict[str, str | int | float | None]


@functools.cache
def _load_evaluation_lib() -> ModuleType:
    name, folder = ifbench_module(), ifbench_folder()
    if folder is not None:
        sys.path.insert(0, folder)  # its files import each other by their bare names
    return importlib.import_module(name)


def __getattr__(name: str) -> Any:
    """The published module attributes, imported on first use."""
    if name == "evaluation_lib":
        return _load_evaluation_lib()
    if name == "InputExample":
        return _load_evaluation_lib().InputExample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def compute_ifbench_reward(response: str | None, label: Any, metadata: JsonDict | None = None) -> float:
    """1.0 if the response follows all instructions, else 0.0; `label` is not used.

    `metadata` holds `instruction_id_list`, `kwargs` (a dict per instruction, or one for all), `prompt_text` and
    `record_id`. Raises ValueError where it names no instruction: such a row cannot be scored.
    """
    if response is None:
        return 0.0
    library = _load_evaluation_lib()
    example = library.InputExample(**input_example(metadata))
    verdict = library.test_instruction_following_strict(example, {example.prompt: str(response)})
    return float(bool(verdict.follow_all_instructions))


def input_example(metadata: JsonDict | None) -> JsonDict:
    """What IFBench's InputExample is made of. Values of None are left out of the kwargs, as in its own data."""
    known = metadata or {}
    instructions = [text for entry in known.get("instruction_id_list") or [] if (text := str(entry or "").strip())]
    if not instructions:
        have = ", ".join(map(str, known)) or "no metadata"
        raise ValueError(f"--rm-type ifbench needs metadata with an instruction_id_list; this row has {have}")
    return {
        "key": int(known.get("record_id") or 0),
        "instruction_id_list": instructions,
        "prompt": str(known.get("prompt_text") or ""),
        "kwargs": _kwargs_per_instruction(known.get("kwargs"), len(instructions)),
    }


def _kwargs_per_instruction(raw: Any, count: int) -> list[KwargsDict]:
    """One dict per instruction: a single dict stands for all, a short list is continued with its last entry."""
    if isinstance(raw, dict):
        entries = [raw]
    else:
        entries = [entry if isinstance(entry, dict) else {} for entry in (raw if raw is not None else [])]
    entries = entries or [{}]
    padded = entries[:count] + [entries[-1]] * (count - len(entries))
    return [{name: value for name, value in entry.items() if value is not None} for entry in padded]
