"""`--sglang-<flag>` and `--router-<flag>` that are not declared here: they land on `args` as they are.

SGLang and its router have hundreds of flags that change with their versions. The ones that miles itself reads are
declared in `miles.config.sections.serving`; the others are taken as they are, and checked against a table of SGLang's
flags where its servers are started (`miles.config.engines`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any

from miles.errors import FlagError

PREFIXES = ("sglang_", "router_")

SET_BY_MILES = {
    "sglang_model_path": "--hf-checkpoint",
    "sglang_model": "--hf-checkpoint",
    "sglang_tp_size": "--rollout-num-gpus-per-engine",
    "sglang_tensor_parallel_size": "--rollout-num-gpus-per-engine",
    "sglang_random_seed": "--seed",
    "sglang_host": "",
    "sglang_port": "--sglang-router-port",
    "sglang_enable_memory_saver": "--offload-rollout",
    "sglang_enable_return_routed_experts": "--use-rollout-routing-replay",
    "sglang_trust_remote_code": "",
    "sglang_nnodes": "",
    "sglang_node_rank": "",
    "sglang_dist_init_addr": "",
    "sglang_gpu_id_step": "",
    "sglang_base_gpu_id": "",
    "sglang_nccl_port": "",
    "sglang_skip_server_warmup": "",
}
"""Server flags that follow from other settings -> the flag to use in their place, where there is one."""

_NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][+-]?\d+)?$")


def belongs(name: str) -> bool:
    """Whether an attribute name is of a pass-through family. Raises FlagError for what miles sets itself."""
    if name in SET_BY_MILES:
        instead = SET_BY_MILES[name]
        remedy = f"Use {instead}." if instead else ""
        raise FlagError("--" + name.replace("_", "-"), given="miles sets this itself.", remedy=remedy)
    return name.startswith(PREFIXES)


def split(argv: Sequence[str], known: Collection[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the pass-through flags out of a command line. `known` are the options that are declared.

    Example: `split(["--lr", "1", "--sglang-foo", "3"], {"--lr"}) == (["--lr", "1"], {"sglang_foo": 3})`
    """
    rest: list[str] = []
    passed: dict[str, Any] = {}
    position = 0
    while position < len(argv):
        option, equals, value = argv[position].partition("=")
        position += 1
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or option in known or not belongs(name):
            rest.append(argv[position - 1])
            continue
        values = [value] if equals else []
        while not equals and position < len(argv) and not _is_option(argv[position]):
            values.append(argv[position])
            position += 1
        passed[name] = _value(values)
    return rest, passed


def notice(name: str, known: Collection[str], engine: str) -> str:
    """One line about an undeclared flag that nobody reads here; names the one that it may have been meant to be."""
    option = "--" + name.replace("_", "-")
    close = difflib.get_close_matches(option, known, n=1, cutoff=0.9)
    hint = f" Did you mean {close[0]}?" if close else ""
    if name.startswith("router_"):
        return f"{option}: no meaning here, it belongs to a router that this run does not start.{hint}"
    return f"{option}: no meaning here, it belongs to SGLang's servers, and this run starts none ({engine}).{hint}"


def _is_option(text: str) -> bool:
    return text.startswith("-") and not _NUMBER.match(text)


def _value(texts: list[str]) -> Any:
    values = [_scalar(t) for t in texts]
    if not values:
        return True
    return values[0] if len(values) == 1 else values


def _scalar(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    if not _NUMBER.match(text):
        return text
    return float(text) if set(text) & set(".eE") else int(text)
