"""A second attempt where the first one was cut off, with a lower temperature.

    miles train --config examples/quickstart/carry.yaml --use-tis \
        --custom-generate-function-path examples/plug_ins/custom_generate_function.py:with_second_attempt

What the sample keeps of the first attempt is its number in the metadata. The second one starts from a copy of the
prompt, so no token of a response that nobody will see is trained. Its log-probabilities are those of the lower
temperature; `--use-tis` weights its tokens by how likely they are without.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from miles.rollout.sglang_rollout import generate
from miles.types import Sample


async def with_second_attempt(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    untouched = copy.deepcopy(sample)
    first = await generate(args, sample, dict(sampling_params))
    if first.status != Sample.Status.TRUNCATED:
        return first
    cooler = {**sampling_params, "temperature": sampling_params["temperature"] / 2}
    second = await generate(args, untouched, cooler)
    second.metadata["attempts"] = 2
    return second
