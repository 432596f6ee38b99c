"""One piece of memory of this machine that holds a model's weights, for every process that inherits its descriptor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from miles.weights.shared_memory import Layout, layout_to_json, views


@dataclass(frozen=True)
class Memory:
    """`fd` is open in this process as long as the weights are needed; `size` in bytes."""

    fd: int
    layout: Layout
    size: int

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The weights themselves, by their Hugging Face names. Whoever writes them must have stopped their readers."""
        return views(self.fd, self.layout, self.size)

    def write_layout(self, folder: Path) -> Path:
        """Say in a JSON file where each tensor lies, for a server that inherits the descriptor."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "weights.json"
        path.write_text(json.dumps(layout_to_json(self.layout, self.size)))
        return path
