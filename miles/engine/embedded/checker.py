"""`/weights_checker`: did a weight update change every parameter, and to the right values?

    snapshot -> reset_tensors (random numbers) -> the update under test -> compare
    checksum    a hash per parameter, to compare engines with each other

What is looked at are the tensors that the engine computes with (`DecoderModel.named`), not those that were sent to it.
Everything here runs in the engine's thread, between two steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.engine.embedded.model import DecoderModel
from miles.engine.protocol import BadRequestError

MAX_NAMED = 20
"""Parameters that an answer names; of others it says how many there are."""


@dataclass(frozen=True)
class Difference:
    """One parameter that is not what it was.

    Example: `Difference("model.norm.weight", largest=0.25, num=128, size=128)`
    """

    name: str
    largest: float  # of the absolute differences; nan where a number is none
    num: int  # elements that differ
    size: int

    def __str__(self) -> str:
        return f"{self.name} ({self.num} of {self.size} elements, largest difference {self.largest:.3g})"


class WeightsChecker:
    """Remembers one snapshot."""

    def __init__(self, model: DecoderModel) -> None:
        self._model = model
        self._snapshot: dict[str, Tensor] | None = None

    def snapshot(self) -> int:
        """Copy all parameters to the CPU; returns how many there are."""
        self._snapshot = {name: tensor.to("cpu", copy=True) for name, tensor in self._chosen(()).items()}
        return len(self._snapshot)

    def reset(self, skip: Collection[str] = ()) -> int:
        """Compute with random numbers from now on. The tensors in use are left alone: they may be a trainer's."""
        chosen = self._chosen(skip)
        random = {name: torch.rand_like(tensor) for name, tensor in chosen.items()}
        self._model.load({**self._model.named, **random})
        return len(random)

    def compare(self, skip: Collection[str] = ()) -> list[Difference]:
        """Parameters that differ from the snapshot, which is forgotten if there are none."""
        if self._snapshot is None:
            raise BadRequestError("weights_checker: there is nothing to compare with. Send action 'snapshot' first.")
        found = []
        for name, now in self._chosen(skip).items():
            then = self._snapshot[name].to(now.device)
            unequal = (now != then) & ~(now.isnan() & then.isnan())
            if num := int(unequal.sum()):
                largest = float((now.double() - then.double()).abs().max())
                found.append(Difference(name, largest, num, now.numel()))
        if not found:
            self._snapshot = None
        return sorted(found, key=lambda d: -d.largest)

    def checksums(self, skip: Collection[str] = ()) -> dict[str, str]:
        """Name -> the first 64 bits of SHA-256 over the bytes, in hexadecimal."""
        return {
            name: hashlib.sha256(tensor.contiguous().cpu().view(torch.uint8).numpy().data).hexdigest()[:16]
            for name, tensor in sorted(self._chosen(skip).items())
        }

    def _chosen(self, skip: Collection[str]) -> Mapping[str, Tensor]:
        named = self._model.named
        if not named:
            raise BadRequestError("weights_checker: this engine's weights are released.")
        return {name: tensor for name, tensor in named.items() if not any(part in name for part in skip)}


def overall(checksums: Mapping[str, str]) -> str:
    """One hash of many."""
    digest = hashlib.sha256()
    for name, checksum in sorted(checksums.items()):
        digest.update(f"{name}\0{checksum}\0".encode())
    return digest.hexdigest()


def shown(differences: Collection[Difference]) -> str:
    """A sentence that names the worst of them."""
    worst = "; ".join(str(d) for d in list(differences)[:MAX_NAMED])
    more = f"; and {len(differences) - MAX_NAMED} more" if len(differences) > MAX_NAMED else ""
    return f"{len(differences)} parameters differ from the snapshot: {worst}{more}."
