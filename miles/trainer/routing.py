"""Routing replay: the experts of every token of a rollout, from the engine or from the log-prob pass.

    --use-routing-replay            the pass that computes the old log-probs records, training replays
    --use-rollout-routing-replay    the engine's experts are replayed in that pass and in training

Between two passes over the same tokens a router near a tie picks other experts, and the log-probs jump although the
weights hardly moved (arXiv:2507.18071, section 5.3; arXiv:2510.11370). With the choice fixed, the ratio of the policies
measures the weights alone.

A token that nobody has recorded routes freely. With recording these are the rows of a rollout's first optimizer step,
whose training pass *is* the log-prob pass; with the engine's experts it is each row's last token, which nothing reads.
The reference model always routes freely.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from miles.batch import PackedBatch, TrainBatch
from miles.errors import UsageError
from miles.trainer.backend import RoutingShape

FREE = -1

R3 = "--use-rollout-routing-replay"


class RoutingTape:
    """The experts of all tokens of one batch.

    Example, two tokens, one layer, two experts each: `experts = [[[3, 0]], [[-1, -1]]]`; the second routes freely.
    """

    def __init__(self, shard: TrainBatch, shape: RoutingShape) -> None:
        self.shape = shape
        self.experts: npt.NDArray[np.int16] = np.full(
            (len(shard.tokens), shape.num_layers, shape.top_k), FREE, dtype=np.int16
        )
        self.from_engine = False

    @classmethod
    def of_engine(cls, shard: TrainBatch, shape: RoutingShape) -> RoutingTape:
        """From the samples' `rollout_routed_experts`. UsageError names the flag and the sample that has none."""
        tape = cls(shard, shape)
        tape.from_engine = True
        for row, (start, end) in enumerate(zip(shard.token_offsets[:-1].tolist(), shard.token_offsets[1:].tolist())):
            given = None if shard.rollout_routed_experts is None else shard.rollout_routed_experts[row]
            if shard.failed[row] or end == start:
                continue
            if given is None:
                raise UsageError(
                    f"{R3}: {shard.name_of(row)} has no rollout_routed_experts. A generate function of your own "
                    "must send return_routed_experts to the engine and keep meta_info['routed_experts'] of its answer; "
                    "leave out the flag to train without."
                )
            tape._take(shard.name_of(row), start, end, np.asarray(given))
        return tape

    def _take(self, name: str, start: int, end: int, given: npt.NDArray[np.int32]) -> None:
        expected = (end - start - 1, self.shape.num_layers, self.shape.top_k)
        if given.shape != expected:
            raise UsageError(
                f"{R3}: rollout_routed_experts of {name} has shape {given.shape}, expected {expected}: tokens less the "
                "last one, layers, experts per token. Engine and trainer must run the same model."
            )
        if given.size and (given.min() < 0 or given.max() >= self.shape.num_experts):
            raise UsageError(
                f"{R3}: rollout_routed_experts of {name} names expert {int(given.max())} (lowest {int(given.min())}), "
                f"expected numbers from 0 to {self.shape.num_experts - 1}."
            )
        self.experts[start : end - 1] = given

    def record(self, micro: PackedBatch, taken: Tensor) -> None:
        """Note what a pass over `micro` took: [P, layers, top_k]; `FREE` where another rank knows."""
        rows = taken.index_select(0, micro.row_places).cpu().numpy()
        self.experts[micro.token_places] = np.where(rows == FREE, self.experts[micro.token_places], rows)
