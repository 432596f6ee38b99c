"""Mixtures of experts in a Hugging Face model: which experts a forward pass takes, and how to make it take given ones.

    with routers.following(experts):      int [P, layers, top_k], -1 = free; None = all free
        output = model(...)               each router takes the given experts, with its own weights for them
        taken = routers.taken()           int32 [P, layers, top_k], what the pass took
        loss.backward()                   inside as well: activation checkpointing runs the routers again

A replayed expert keeps its gradient: only the choice is fixed, the weights are the router's probabilities at the chosen
places, normalised as the model normalises its own choice. A pass that follows what another one took is that pass bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from miles.trainer.backend import RoutingShape


@dataclass(frozen=True)
class Arithmetic:
    """How a router computes: logits [P, E] of hidden states and weight, probabilities, the top k, weights of sum 1."""

    linear: Callable[[Tensor, Tensor], Tensor]
    softmax: Callable[[Tensor], Tensor]
    top: Callable[[Tensor, int], Tensor]
    normalized: Callable[[Tensor], Tensor]


PLAIN = Arithmetic(
    linear=F.linear,
    softmax=lambda logits: torch.softmax(logits, dim=-1, dtype=torch.float),
    top=lambda probs, k: probs.topk(k, dim=-1).indices,
    normalized=lambda weights: weights / weights.sum(dim=-1, keepdim=True),
)


class Routers:
    """The routers of one model, and what they follow at the moment."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.arithmetic = PLAIN
        layers = model.base_model.layers
        self.modules = {i: layer.mlp.gate for i, layer in enumerate(layers) if _is_router(layer.mlp)}
        some = next(iter(self.modules.values()))
        self.shape = RoutingShape(num_layers=len(layers), top_k=some.top_k, num_experts=some.num_experts)
        self._known: Tensor | None = None
        self._taken: dict[int, Tensor] = {}
        for i, module in self.modules.items():
            module.forward = _Forward(self, module, i)  # type: ignore[assignment]

    @contextmanager
    def following(self, known: Tensor | None) -> Iterator[None]:
        self._known, self._taken = known, {}
        try:
            yield
        finally:
            self._known, self._taken = None, {}

    def taken(self) -> Tensor:
        """int32 [P, layers, top_k] of the pass inside `following`; 0 in layers without experts."""
        some = next(iter(self._taken.values()))
        taken = torch.zeros(len(some), self.shape.num_layers, self.shape.top_k, dtype=torch.int32, device=some.device)
        for layer, chosen in self._taken.items():
            taken[:, layer] = chosen.to(torch.int32)
        return taken

    def choose(self, layer: int, probs: Tensor) -> Tensor:
        """Experts int64 [P, top_k] for router probabilities [P, E]."""
        chosen = self.arithmetic.top(probs, self.shape.top_k)
        if self._known is not None:
            known = self._known[:, layer].long()
            chosen = torch.where(known >= 0, known, chosen)
        self._taken[layer] = chosen
        return chosen


def use_in(model: PreTrainedModel) -> Routers | None:
    """Take over the routers of a Qwen-like mixture of experts; None for a dense model."""
    layers = getattr(model.base_model, "layers", ())
    return Routers(model) if any(_is_router(layer.mlp) for layer in layers if hasattr(layer, "mlp")) else None


def _is_router(mlp: torch.nn.Module) -> bool:
    """`<Family>TopKRouter` with the numbers of the Qwen family's: softmax first, then the top k."""
    gate = getattr(mlp, "gate", None)
    return type(gate).__name__.endswith("TopKRouter") and hasattr(gate, "norm_topk_prob")


class _Forward:
    """The `forward` of one router. An object and not a closure, so that the model can still be copied and pickled."""

    def __init__(self, routers: Routers, module: torch.nn.Module, layer: int) -> None:
        self.routers, self.module, self.layer = routers, module, layer

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., C] -> logits [P, E], weights [P, top_k], experts int64 [P, top_k]."""
        module, arithmetic = self.module, self.routers.arithmetic
        logits = arithmetic.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), module.weight)
        probs = arithmetic.softmax(logits)
        chosen = self.routers.choose(self.layer, probs.detach())
        weights = probs.gather(-1, chosen)
        if module.norm_topk_prob:
            weights = arithmetic.normalized(weights)
        return logits, weights.to(logits.dtype), chosen
