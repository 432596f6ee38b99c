"""A reward in parts: mostly the answer, a little the form, all of them kept with the sample.

    miles train --config examples/quickstart/carry.yaml \
        --custom-rm-path examples/plug_ins/custom_rm.py:graded --reward-key score \
        --eval-reward-key right

Where a reward is a dict, `--reward-key` names the number that is trained and `--eval-reward-key` the one that is
evaluated. The others stay in the record of the run and can be logged.
"""

from __future__ import annotations

import re
from argparse import Namespace

from miles.types import Sample

FORM = re.compile(r"<think>[^<]+</think>\d+<eos>")
SHARE_OF_FORM = 0.1


async def graded(args: Namespace, sample: Sample) -> dict[str, float]:
    answer = sample.response.rpartition("</think>")[2].removesuffix("<eos>")
    right, form = float(answer == sample.label), float(FORM.fullmatch(sample.response) is not None)
    return {"score": (1 - SHARE_OF_FORM) * right + SHARE_OF_FORM * form, "right": right, "form": form}
