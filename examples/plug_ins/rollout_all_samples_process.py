"""A list of the problems that no answer solved, written while the run goes on.

    miles train --config examples/quickstart/carry.yaml \
        --rollout-all-samples-process-path examples/plug_ins/rollout_all_samples_process.py:note_unsolved

Dynamic filters throw such groups away; here they are seen nevertheless. The file is `unsolved.jsonl` in the run
directory, one problem a line.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from miles.types import Sample


def note_unsolved(
    args: Namespace,
    all_groups: list[list[Sample]],
    get_samples: Callable[[int], list[list[Sample]]],
) -> None:
    with (Path(args.run_dir) / "unsolved.jsonl").open("a", encoding="utf-8") as file:
        for group in all_groups:
            if all(sample.get_reward_value(args) < 1 for sample in group):
                answers = [sample.response for sample in group]
                row = {"prompt": group[0].prompt, "label": group[0].label, "answers": answers}
                file.write(json.dumps(row) + "\n")
