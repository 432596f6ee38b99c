"""Published import path of what launch scripts call (`import ... command_utils as U`), on one machine.

`execute_train` starts `miles train`, which reads every model from its Hugging Face folder: there is nothing to convert
before, and the functions that did so answer with a sentence. Data sets are given as files.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.errors import UsageError
from miles.utils.misc import exec_command
from miles.utils.typer_utils import dataclass_cli

__all__ = [
    "GENERATION_HARDWARE",
    "NUM_GPUS_OF_HARDWARE",
    "ExecuteTrainConfig",
    "check_has_nvlink",
    "convert_checkpoint",
    "create_run_id",
    "dataclass_cli",
    "exec_command",
    "execute_train",
    "fp8_cast_bf16",
    "get_bool_env_var",
    "get_default_wandb_args",
    "get_env_enable_infinite_run",
    "hf_download_dataset",
    "repo_base_dir",
    "rsync_simple",
    "save_to_temp_file",
]

repo_base_dir = Path(__file__).resolve().parents[3]
"""The folder that holds the package `miles`."""

# GPUs of one node, and the generation of their architecture.
NUM_GPUS_OF_HARDWARE = {"H100": 8, "GB200": 4, "GB300": 4}
GENERATION_HARDWARE = {"H100": "Hopper", "GB200": "Blackwell", "GB300": "Blackwell"}

TRAIN_SCRIPT = "train.py"
LINE_END = "\n"  # flags are written over several lines


# ---- starting a run --------------------------------------------------------------------------------------------------


@dataclass
class ExecuteTrainConfig:
    """What a launch script lets its user choose about the start of a run."""

    cuda_core_dump: bool = field(default=False, metadata={"help": "Dump the GPU state when a kernel fails."})
    num_nodes: int = field(
        default_factory=lambda: int(os.environ.get("SLURM_JOB_NUM_NODES", "1")), metadata={"help": "Machines."}
    )
    extra_env_vars: str = field(default="", metadata={"help": "Further variables: NAME=value NAME=value"})


def execute_train(
    train_args: str,
    num_gpus_per_node: int,
    megatron_model_type: str | None,
    train_script: str = TRAIN_SCRIPT,
    before_ray_job_submit: Callable[[], Any] | None = None,
    extra_env_vars: dict[str, str] | None = None,
    config: ExecuteTrainConfig | None = None,
) -> None:
    """Run `miles train <train_args>` and wait for it. CalledProcessError where it fails.

    `before_ray_job_submit` is called first. `megatron_model_type` names the model of a run with --train-backend
    megatron; its sizes come from config.json of --hf-checkpoint. UsageError for what one machine cannot do (several
    nodes), and for a model type beside --train-backend fsdp.
    """
    config = config or ExecuteTrainConfig()
    if megatron_model_type is not None and re.search(r"--train-backend[=\s]\s*fsdp\b", train_args):
        raise UsageError(
            f"execute_train: megatron_model_type {megatron_model_type!r} beside --train-backend fsdp. Give None for "
            "fsdp, or --train-backend megatron."
        )
    if config.num_nodes != 1:
        raise UsageError(f"execute_train: expected one node, got num_nodes={config.num_nodes}.")
    program = [sys.executable, "-m", "miles", "train"]
    if train_script != TRAIN_SCRIPT:
        if not Path(train_script).is_file():
            raise UsageError(f"execute_train: train_script {train_script}: no such file. Expected {TRAIN_SCRIPT}.")
        program = [sys.executable, train_script]
    variables = {
        **dict(pair.split("=", 1) for pair in shlex.split(config.extra_env_vars)),
        **(extra_env_vars or {}),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(repo_base_dir), os.environ.get("PYTHONPATH")])),
    }
    if config.cuda_core_dump:
        variables["CUDA_ENABLE_COREDUMP_ON_EXCEPTION"] = "1"
    if before_ray_job_submit is not None:
        before_ray_job_submit()
    setting = shlex.join(["env", *(f"{name}={value}" for name, value in variables.items())])
    exec_command(f"{setting} {shlex.join(program)} {train_args.replace(LINE_END, ' ')}")


def get_default_wandb_args(test_file: str, run_name_prefix: str | None = None, run_id: str | None = None) -> str:
    """Flags that log to W&B under the name of a script; nothing without WANDB_API_KEY.

    Example: `--use-wandb --wandb-project miles-run_tiny --wandb-group 261123-101500-042
    --disable-wandb-random-suffix`
    """
    if not os.environ.get("WANDB_API_KEY"):
        return ""
    group = "_".join(filter(None, [run_name_prefix, run_id or create_run_id()]))
    project = f"miles-{Path(test_file).stem}"
    return f"--use-wandb --wandb-project {project} --wandb-group {group} --disable-wandb-random-suffix "


def create_run_id() -> str:
    """A name for a run that sorts by time: `261123-101500-042`."""
    return f"{time.strftime('%y%m%d-%H%M%S', time.gmtime())}-{random.randint(0, 999):03d}"


# ---- small helpers ---------------------------------------------------------------------------------------------------


def get_bool_env_var(name: str, default: str = "false") -> bool:
    """Whether an environment variable says true, 1, yes or on."""
    return os.environ.get(name, default).strip().lower() in ("true", "1", "yes", "on")


def get_env_enable_infinite_run() -> bool:
    return get_bool_env_var("MILES_TEST_ENABLE_INFINITE_RUN")


def save_to_temp_file(text: str, ext: str) -> str:
    """Write `text` to a new temporary file `*.<ext>` and return its path. Nobody deletes it."""
    with tempfile.NamedTemporaryFile("w", suffix=f".{ext.removeprefix('.')}", delete=False, encoding="utf-8") as file:
        file.write(text)
    return file.name


def check_has_nvlink() -> bool:
    """Whether GPUs of this machine are joined by NVLink; False without GPUs."""
    if shutil.which("nvidia-smi") is None:
        return False
    topology = exec_command("nvidia-smi topo -m || true", capture_output=True) or ""
    return any(word.startswith("NV") and word[2:].isdigit() for word in topology.split())


def rsync_simple(path_src: str, path_dst: str) -> None:
    """Make `path_dst` hold what `path_src` holds."""
    exec_command(f"mkdir -p {shlex.quote(path_dst)} && rsync -a {shlex.quote(path_src)}/ {shlex.quote(path_dst)}")


# ---- what needs more than one machine's own files --------------------------------------------------------------------


def convert_checkpoint(
    model_name: str,
    megatron_model_type: str,
    num_gpus_per_node: int,
    multinode: bool = False,
    extra_args: str = "",
    dir_dst: str = "/root",
    hf_checkpoint: str | None = None,
) -> None:
    """UsageError: nothing has to be converted."""
    raise UsageError(
        f"convert_checkpoint {model_name}: both trainers read Hugging Face folders. Give the folder with "
        "--hf-checkpoint (and --ref-load) in the place of the converted one, and leave this call out."
    )


def fp8_cast_bf16(path_src: str, path_dst: str) -> None:
    """UsageError: float8 checkpoints are not read."""
    raise UsageError(
        f"fp8_cast_bf16 {path_src}: float8 checkpoints are not supported. Give a bfloat16 folder with --hf-checkpoint."
    )


def hf_download_dataset(full_name: str) -> None:
    """UsageError: data sets are files of this machine."""
    raise UsageError(
        f"hf_download_dataset {full_name}: data sets are not downloaded here. Run `hf download {full_name} --repo-type "
        "dataset --local-dir DIR`, and give a JSON-lines or Parquet file of it with --prompt-data."
    )
