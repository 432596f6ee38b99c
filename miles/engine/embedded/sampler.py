"""From logits to the next tokens, each request by its own parameters and its own random numbers.

Random numbers are counted, not drawn: token number p of a request with seed s uses `uniform(s, p)`, so that a seeded
request samples the same tokens whatever else is in the batch, and a resumed one goes on where it stopped. The engine
gives seeds to requests without one.

Log-probs follow SGLang: log-softmax of logits / temperature, before top-k, top-p and min-p cut tokens off; greedy
requests report log-softmax of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from miles.engine.protocol import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float32 [N] in [0, 1) from uint64 [N] seeds and positions, on a grid of 2**-24.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied to the seed and then to seed and position.
    """
    with np.errstate(over="ignore"):
        x = _mix(_mix(seeds * _GOLDEN + _GOLDEN) + positions * _GOLDEN)
    return (x >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


class BatchSampler:
    """The sampling parameters of the running requests in slot order; rebuilt when a request comes or goes.

    `positions` are the places in the sequence that the next tokens will take; each `sample` moves them on by one.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        positions: Sequence[int],
        device: torch.device,
        log_softmax: Callable[[Tensor], Tensor],
    ) -> None:
        self._log_softmax = log_softmax
        self._seeds = np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64)
        self._positions = np.array(positions, dtype=np.uint64)
        self._device = device
        temperatures = [1.0 if p.greedy else p.temperature for p in params]
        self._temperature = None
        if any(t != 1.0 for t in temperatures):
            self._temperature = torch.tensor(temperatures, device=device).unsqueeze(1)
        self._greedy = torch.tensor([p.greedy for p in params], device=device)
        self._any_greedy, self._all_greedy = any(p.greedy for p in params), all(p.greedy for p in params)
        cut = [i for i, p in enumerate(params) if p.truncates and not p.greedy]
        self._cut_rows = torch.tensor(cut, device=device) if cut else None
        if cut:
            self._cuts = _Cuts([params[i] for i in cut], device)

    def sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [N, V] logits (overwritten) -> int64 [N] tokens and their float32 [N] log-probs."""
        if self._temperature is not None:
            logits.div_(self._temperature)
        logprobs = self._log_softmax(logits)
        tokens = logprobs.argmax(-1) if self._all_greedy else self._draw(logprobs)
        self._positions += np.uint64(1)
        return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)

    def _draw(self, logprobs: Tensor) -> Tensor:
        noise = torch.from_numpy(uniform(self._seeds, self._positions)).to(self._device)
        probs = logprobs.exp()
        tokens = inverse_cdf(probs, noise)
        if self._cut_rows is not None:
            rows = self._cut_rows
            tokens[rows] = self._cuts.draw(probs[rows], noise[rows])
        if self._any_greedy:
            tokens = torch.where(self._greedy, logprobs.argmax(-1), tokens)
        return tokens


class _Cuts:
    """Top-k, top-p and min-p of the rows that cut their distribution, all three judged on the whole distribution."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        far = 2**62
        self._top_k = torch.tensor([far if p.top_k == -1 else p.top_k for p in params], device=device).unsqueeze(1)
        self._top_p = torch.tensor([p.top_p for p in params], device=device).unsqueeze(1)
        self._min_p = torch.tensor([p.min_p for p in params], device=device).unsqueeze(1)

    def draw(self, probs: Tensor, noise: Tensor) -> Tensor:
        """[R, V] probabilities and [R] uniform numbers -> [R] tokens among those that stay."""
        ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        gone = (torch.arange(ordered.shape[1], device=probs.device) >= self._top_k) | (before > self._top_p)
        gone |= ordered < ordered[:, :1] * self._min_p
        picked = inverse_cdf(ordered.masked_fill_(gone, 0.0), noise)
        return order.gather(1, picked.unsqueeze(1)).squeeze(1)


def inverse_cdf(weights: Tensor, noise: Tensor) -> Tensor:
    """The first column whose running sum exceeds noise * total: never one of weight 0. [R, V], [R] -> int64 [R]."""
    running = weights.cumsum(-1)
    return (
        torch.searchsorted(running, noise.unsqueeze(1) * running[:, -1:], right=True)
        .squeeze(1)
        .clamp_(max=weights.shape[1] - 1)
    )
