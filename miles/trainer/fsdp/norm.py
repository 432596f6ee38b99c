"""`miles.trainer.rms_norm` in Hugging Face models."""

from __future__ import annotations

import torch
from torch import Tensor

from miles.trainer.rms_norm import RMSNorm


def use_in(model: torch.nn.Module) -> int:
    """Give every plain RMS norm of a Hugging Face model this implementation; how many there were.

    Recognised by its class: `<Family>RMSNorm` with a `weight` and a `variance_epsilon`, which is how the Llama and Qwen
    families write it. Norms of another kind (Gemma's, which adds 1 to the weight, has no such attribute) stay as is.
    """
    found = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "variance_epsilon", None), float):
            module.forward = _Forward(module)  # type: ignore[assignment]
            found += 1
    return found


class _Forward:
    """The `forward` of one module. An object and not a closure, so that the model can still be copied and pickled."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight, eps = self.module.weight, self.module.variance_epsilon
        return RMSNorm.apply(hidden_states, weight, eps)  # type: ignore[no-any-return]
