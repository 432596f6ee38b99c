"""How well a model predicts text that it is not trained on: the loss of held-out conversations, without gradients.

An evaluation that generates nothing leaves finished samples behind (`RolloutFnEvalOutput`, key `conversations`). The
trainer has the weights, so the trainer computes their loss; no engine takes part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.batch import TrainBatch


@dataclass(frozen=True)
class LossSums:
    """Over the trained tokens of one evaluation set, all ranks together: what `loss` and `perplexity` are made of.

    Example: `LossSums(negative_log_likelihood=69.3, tokens=100)` has the loss 0.693 and the perplexity 2.0.
    """

    negative_log_likelihood: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean over tokens, each counting the same whatever conversation it stands in; NaN without tokens."""
        return self.negative_log_likelihood / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity where that is too large for a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @staticmethod
    def tensor_of(shard: TrainBatch, log_probs: Tensor) -> Tensor:
        """float64 [2] of one rank: the sums over `shard`, whose response tokens have `log_probs` [R]."""
        trained = torch.from_numpy(shard.loss_masks) != 0
        # float64: the sum of a million float32 log-probs would keep four digits.
        likelihood = log_probs.double().masked_fill(~trained, 0.0).sum()
        return torch.stack([-likelihood, trained.sum().double()])

    @staticmethod
    def from_tensor(sums: Tensor) -> LossSums:
        return LossSums(float(sums[0]), int(sums[1]))
