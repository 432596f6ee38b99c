"""What an engine is made from: the folder's tokenizer and end-of-sequence ids, the size of its cache, and a thread that
leaves nothing behind. Config and tensors are read in `model.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch

from miles.engine.embedded.model import DecoderModel
from miles.errors import CheckpointError

T = TypeVar("T")

CACHE_MEMORY_FRACTION = 0.25
"""Share of the memory that is free at start which keys and values may take, unless max_total_tokens says otherwise."""


def in_passing_thread(build: Callable[[], T]) -> T:
    """Run `build` in a thread that ends with it.

    OpenMP keeps a team of workers for every thread that has computed. A team too many and all of them sleep between
    operations; a thread that ends takes its team along, and the engine's stays the only one.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(build())
        except BaseException as error:
            done.set_exception(error)

    # A daemon: Ctrl-C while a large model loads need not wait for the rest of it.
    thread = threading.Thread(target=run, name="miles-load", daemon=True)
    thread.start()
    result = done.result()
    thread.join()
    return result


def affordable_tokens(model: DecoderModel, max_running_requests: int) -> int:
    """Tokens of keys and values that fit a share of the free memory, at most what the slots can hold."""
    shape = model.shape
    bytes_per_token = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * model.cache_dtype.itemsize
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        import psutil

        free = psutil.virtual_memory().available
    affordable = int(free * CACHE_MEMORY_FRACTION) // bytes_per_token
    return max(1, min(affordable, max_running_requests * shape.context_length))


def load_tokenizer(model_dir: str | Path) -> Any | None:
    """The folder's tokenizer, or None where it has none: such an engine takes token ids only."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((Path(model_dir) / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(model_dir))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{model_dir}: its tokenizer cannot be loaded: {error}") from error


def end_of_sequence_ids(hf_config: Any, tokenizer: Any | None, model_dir: str | Path | None = None) -> frozenset[int]:
    """Every id that ends a sequence: of the config, the generation config and the tokenizer."""
    found: list[Any] = [hf_config.eos_token_id]
    if tokenizer is not None:
        found.append(tokenizer.eos_token_id)
    if model_dir is not None and (Path(model_dir) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        found.append(GenerationConfig.from_pretrained(str(model_dir)).eos_token_id)
    flat = [token for entry in found for token in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return frozenset(token for token in flat if token is not None)
