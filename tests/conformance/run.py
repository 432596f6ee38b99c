"""`make conformance`: real SGLang servers on this machine, the conformance tests against them, a dated result file.

    python tests/conformance/run.py --sglang-python .venv-sglang/bin/python [--results docs/conformance]

The servers are started as a run would start them (`miles/engine/sglang.py`), one per model. The table of SGLang's flags
is compared with this SGLang as well. Exit status 1 where a test fails or the table differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conformance_models import CONTEXT, write_all

from miles.config.machine import local_gpus
from miles.config.parse import parse
from miles.engine.process import ServerProcess, free_port, wait_until_it_answers
from miles.engine.sglang import find_python, server_command

ROOT = Path(__file__).resolve().parents[2]
START_S = 600.0
# What a run cannot do without and a server does not read.
FILLING = ["--prompt-data", "none", "--num-rollout", "1", "--rollout-batch-size", "1", "--n-samples-per-prompt", "1"]
FILLING += ["--global-batch-size", "1", "--debug-rollout-only", "--sglang-context-length", str(CONTEXT)]
# SGLang makes half precision of a float32 model unless it is told otherwise.
FILLING += ["--sglang-dtype", "float32"]


def server(model: str, models: Path, python: str, logs: Path, rank: int) -> ServerProcess:
    """SGLang with one of the models, as a run starts it."""
    flags = ["--hf-checkpoint", str(models / f"{model}0"), "--rollout-engine", "sglang", "--sglang-python", python]
    if model == "moe":
        flags += ["--use-rollout-routing-replay"]
    config, _ = parse([*FILLING, *flags])
    port = free_port()
    command = server_command(config, python=python, rank=rank, host="127.0.0.1", port=port, gpus=local_gpus())
    environment = {**command.env, "HF_HUB_OFFLINE": "1"}
    url = f"http://127.0.0.1:{port}"
    return ServerProcess(f"SGLang ({model})", command.argv, url, logs / f"sglang_{model}.log", environment)


def outcomes(report: Path) -> list[dict[str, str]]:
    """One row per test. Example: `{"test": "test_health[sglang-/health]", "result": "passed"}`"""
    rows = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        row = {"test": case.get("name", ""), "result": "passed"}
        if problem is not None:
            row |= {"result": problem.tag, "why": (problem.get("message") or "").splitlines()[0][:300]}
        rows.append(row)
    return rows


def version_of(python: str) -> str:
    code = "from importlib.metadata import version; print(version('sglang'), version('torch'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def write_result(folder: Path, rows: list[dict[str, str]], version: str, table_is_current: bool) -> Path:
    sglang, torch = version.split()
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        kind = "sglang" if "[sglang" in row["test"] else "embedded"
        per = counts.setdefault(kind, {})
        per[row["result"]] = per.get(row["result"], 0) + 1
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "sglang": sglang,
        "torch_of_sglang": torch,
        "python": platform.python_version(),
        "gpus": local_gpus(),
        "table_of_flags_is_current": table_is_current,
        "counts": counts,
        "tests": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date']}-sglang-{sglang}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sglang-python", required=True)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "conformance")
    options, rest = parser.parse_known_args()
    python = find_python(options.sglang_python)
    table = subprocess.run([python, str(ROOT / "benchmarks" / "sglang_flags.py"), "--check"], check=False)
    with tempfile.TemporaryDirectory(prefix="miles-conformance-") as work, ExitStack() as stack:
        models, began = write_all(Path(work) / "models"), time.monotonic()
        servers = {}
        for rank, model in enumerate(("dense", "moe")):
            servers[model] = server(model, models, python, Path(work), rank)
            stack.callback(servers[model].stop)
        for one in servers.values():
            wait_until_it_answers(one, START_S, pause_s=0.5)
        print(f"two SGLang servers answer after {time.monotonic() - began:.0f} s")
        named = {"models": str(models)} | {model: one.url for model, one in servers.items()}
        report = Path(work) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/conformance", f"--junitxml={report}", *rest]
        tests = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "MILES_CONFORMANCE_SGLANG": json.dumps(named)}, check=False
        )
        for one in servers.values():
            if one.has_ended:
                print(one.last_words())
        path = write_result(options.results, outcomes(report), version_of(python), table.returncode == 0)
    print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path} written")
    return tests.returncode or table.returncode


if __name__ == "__main__":
    raise SystemExit(main())
