"""Problems without a file: made on the fly, with one more digit when the run has seen enough of the shorter ones.

    miles train --config examples/quickstart/carry.yaml \
        --data-source-path examples/plug_ins/data_source.py:GrowingSums

The counter is all that a resumed run needs: `state_dict` is saved with every checkpoint and given back by
`load_state_dict`. Groups that a rollout returns are taken again first.
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

from miles.rollout.data_source import DataSource
from miles.types import Sample

GROUPS_PER_LENGTH = 16
LONGEST = 3


class GrowingSums(DataSource):
    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.num_groups = 0
        self.returned: list[list[Sample]] = []

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        again, self.returned = self.returned[:num_samples], self.returned[num_samples:]
        return again + [self.new_group() for _ in range(num_samples - len(again))]

    def new_group(self) -> list[Sample]:
        number, size = self.num_groups, self.args.n_samples_per_prompt
        self.num_groups += 1
        rng = random.Random(f"{self.args.rollout_seed}/{number}")
        digits = min(LONGEST, 1 + number // GROUPS_PER_LENGTH)
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        return [
            Sample(
                group_index=number,
                index=number * size + i,
                prompt=f"{a}+{b}=?",
                label=str(a + b),
                metadata={"digits": digits},
            )
            for i in range(size)
        ]

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.returned += samples

    def save(self, rollout_id: int) -> None:
        """Nothing: `state_dict` is in the checkpoint."""

    def load(self, rollout_id: int | None = None) -> None:
        """Nothing, as above."""

    def state_dict(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_groups = state["num_groups"]
