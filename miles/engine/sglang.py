"""SGLang servers of this machine: which Python runs them, and with which command line. SGLang is never imported here.

    --sglang-<flag>      goes to the server as --<flag> (`miles.config.sglang_flags`)
    what miles sets      model, address, sizes, seed, GPUs, and what the run needs of the server (`_set_by_miles`)

SGLang pins its own PyTorch and transformers, so that it usually lives in an environment of its own, which
`--sglang-python` names. Starting, watching and ending the process is left to `miles.engine.process` and the fleet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from miles.config import sglang_flags
from miles.config.draft import GIVEN
from miles.config.flags import flags_of
from miles.config.run_config import RunConfig
from miles.errors import FlagError

# How long a Python may take to say whether it has SGLang.
LOOK_S = 60.0

INSTALL = (
    "python3.11 -m venv sglang-env && sglang-env/bin/pip install sglang=={version}, and then "
    "--sglang-python sglang-env/bin/python"
)

# What a server must be told on a machine without a GPU, unless flags say something else.
ON_A_CPU: dict[str, Any] = {
    "sglang_device": "cpu",
    "sglang_attention_backend": "torch_native",
    "sglang_disable_cuda_graph": True,
    "sglang_disable_overlap_schedule": True,
    "sglang_max_total_tokens": 131072,
    "sglang_max_running_requests": 128,
}

# Flags of the section that are for miles and not for the server.
NOT_OF_THE_SERVER = ("sglang_python", "sglang_server_concurrency")


@dataclass(frozen=True)
class SglangCommand:
    """Example: `SglangCommand(["/env/bin/python", "-m", "sglang.launch_server", "--model-path", ...], {...})`"""

    argv: list[str]
    env: dict[str, str]


def find_python(python: str | None) -> str:
    """The interpreter of SGLang's servers: `--sglang-python`, else this one. FlagError where it has no SGLang."""
    install = INSTALL.format(version=sglang_flags.table()[0])
    if python is None:
        if find_spec("sglang") is None:
            raise FlagError(
                "--rollout-engine sglang",
                given="SGLang is not installed beside miles.",
                remedy=f"Install it into an environment of its own: {install}.",
            )
        return sys.executable
    # Not resolved: the link of a virtual environment is what tells Python where its packages are.
    path = os.path.abspath(os.path.expanduser(python))
    if not (os.path.isfile(path) and os.access(path, os.X_OK)):
        raise FlagError("--sglang-python", given=python, expected="a Python that can be executed")
    look = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('sglang') else 3)"
    try:
        status = subprocess.run(
            [path, "-c", look], timeout=LOOK_S, capture_output=True, stdin=subprocess.DEVNULL
        ).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FlagError("--sglang-python", given=python, expected=f"a Python ({error})") from error
    if status == 3:
        raise FlagError(
            "--sglang-python", given=python, expected="a Python with SGLang", remedy=f"It has none: {install}."
        )
    if status:
        raise FlagError("--sglang-python", given=python, expected="a Python; this one ended with an error at once")
    return path


def server_command(
    config: RunConfig, *, python: str, rank: int, host: str, port: int, gpus: int, threads: int = 1
) -> SglangCommand:
    """The command line and environment of engine `rank`.

    `gpus` is what this machine has; without any, the server computes with `threads` threads.
    """
    words = [python, "-m", "sglang.launch_server"]
    for name, value in _set_by_miles(config, rank, host, port, gpus).items():
        words += sglang_flags.argv(name, value)
    for name, value in passed(config, gpus).items():
        words += sglang_flags.argv(name, value)
    env = dict(os.environ)
    # /health then answers at once, also while the engine is paused; /health_generate still generates a token.
    env.setdefault("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "false")
    env["PYTHONUNBUFFERED"] = "1"
    if not gpus:
        env["SGLANG_USE_CPU_ENGINE"] = "1"
        env["OMP_NUM_THREADS"] = str(max(1, threads))
    return SglangCommand(words, env)


def passed(config: RunConfig, gpus: int) -> dict[str, Any]:
    """What the user's own `--sglang-<flag>` say, by attribute, and what a machine without a GPU needs beside them."""
    given: dict[str, Any] = {}
    for flag in flags_of(type(config.engine)):
        of_server = flag.name.startswith(sglang_flags.PREFIX) and not flag.name.startswith("sglang_router_")
        if of_server and flag.name not in NOT_OF_THE_SERVER and config.origins[flag.name] in GIVEN:
            given[flag.name] = getattr(config.engine, flag.name)
    extras = {k: v for k, v in config.extras.items() if k in config.passed and k.startswith(sglang_flags.PREFIX)}
    return ({} if gpus else ON_A_CPU) | given | extras


def first_gpu(config: RunConfig, rank: int) -> int:
    """Engines come after the trainer's GPUs, unless they share them or there is no trainer."""
    shared = config.cluster.colocate or config.debug.debug_rollout_only
    return (0 if shared else config.cluster.world_size) + rank * config.cluster.rollout_num_gpus_per_engine


def _set_by_miles(config: RunConfig, rank: int, host: str, port: int, gpus: int) -> dict[str, Any]:
    engine, cluster = config.engine, config.cluster
    stages = engine.sglang_pipeline_parallel_size
    flags: dict[str, Any] = {
        "sglang_model_path": config.rollout.hf_checkpoint,
        "sglang_trust_remote_code": True,
        "sglang_host": host,
        "sglang_port": port,
        "sglang_random_seed": config.run.seed + rank,
        "sglang_tp_size": cluster.rollout_num_gpus_per_engine // stages,
        "sglang_skip_server_warmup": True,
        "sglang_enable_memory_saver": bool(config.cluster.offload_rollout) and bool(gpus),
        "sglang_enable_return_routed_experts": config.algorithm.use_rollout_routing_replay,
        "sglang_enable_draft_weights_cpu_backup": engine.sglang_speculative_algorithm is not None,
    }
    if gpus:
        flags |= {"sglang_base_gpu_id": first_gpu(config, rank), "sglang_gpu_id_step": 1}
    return flags
