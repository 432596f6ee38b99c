"""The quickstart's training beside TRL's GRPOTrainer: same model, data and settings, run in turn on one machine.

    python benchmarks/quickstart.py [--pairs 3] [--rollouts 40] [--threads 2] [--rival-env build/rival]

Quote the ratios: machines differ and drift, which is why the two run in turn. The rival's environment is made on first
use. `wall` is seconds per rollout (generation, reward, two optimizer steps, weight update), evaluation and saving
excluded; `first step` is from process start; `memory` is the peak resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "quickstart"
FIGURES = {"wall_s_per_rollout": "wall", "first_step_s": "first step", "peak_rss_gb": "memory"}
GOALS = {"wall_s_per_rollout": 0.5, "first_step_s": 1.0, "peak_rss_gb": 1.5}


def miles_once(rollouts: int, env: dict[str, str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--num-rollout", str(rollouts), "--eval-interval", "1000000", "--skip-eval-before-train"]
        flags += ["--run-dir", f"{folder}/run", "--quiet"]
        command = [sys.executable, "-m", "miles", "train", "--config", str(EXAMPLE / "carry.yaml"), *flags]
        subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "run", "summary.json").read_text())


def rival_once(python: Path, rollouts: int, lr: float, env: dict[str, str]) -> dict[str, float]:
    script = [str(python), str(ROOT / "benchmarks" / "rival_trl.py"), "--model", str(EXAMPLE / "base")]
    script += ["--data", str(EXAMPLE / "data" / "train.jsonl"), "--rollouts", str(rollouts), "--lr", str(lr)]
    done = subprocess.run(script, check=True, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def rival_python(folder: Path) -> Path:
    """The interpreter of the rival's environment, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"making the rival's environment in {folder} (once)")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "trl==1.16.0", "datasets"], check=True)
        (folder / ".installed").touch()
    return python


def learning_rate() -> float:
    import yaml

    return float(yaml.safe_load((EXAMPLE / "carry.yaml").read_text())["lr"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rival-env", type=Path, default=ROOT / "build" / "rival")
    given = parser.parse_args()
    env = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    python, lr = rival_python(given.rival_env), learning_rate()
    pairs = []
    for i in range(given.pairs):
        pairs.append((miles_once(given.rollouts, env), rival_once(python, given.rollouts, lr, env)))
        ours, theirs = pairs[-1]
        shown = (f"{name} {ours[key]:.3f} / {theirs[key]:.3f}" for key, name in FIGURES.items())
        print(f"pair {i + 1} (miles / TRL):  " + "   ".join(shown), flush=True)
    print(f"\n{given.rollouts} rollouts of 16 x 8, {given.threads} threads, median of {given.pairs} pairs")
    print(f"{'':<12}{'miles':>9}{'TRL':>9}{'ratio':>8}{'goal':>8}")
    for key, name in FIGURES.items():
        ratio = median(ours[key] / theirs[key] for ours, theirs in pairs)
        a, b = (median(pair[i][key] for pair in pairs) for i in (0, 1))
        print(f"{name:<12}{a:>9.3f}{b:>9.3f}{ratio:>8.2f}{'<= ' + str(GOALS[key]):>8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
