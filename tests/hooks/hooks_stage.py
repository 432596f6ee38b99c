"""The real call sites around a set of plug-ins: manager and trainer of a run, over an engine that answers at once.

    with Stage(tmp_path, ["--group-rm"], custom_rm=my_function) as stage:
        report = stage.rollout(0)          # data source, rollout, generate, reward, filters, logging, conversion
        stage.train(report)                # post-process, loss, importance sampling, reducer
        stage.evaluate(1)

Two prompts, two samples each, one optimizer step. What is missing of a run: the model that generates, the threads of
the roles, checkpoints.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from miles.config import parse
from miles.hooks import CATALOG, bind, function_registry
from miles.observe.record import RunRecord, read_metrics
from miles.observe.tracking import Tracker
from miles.rollout import context
from miles.rollout.singleton import SingletonMeta
from miles.run.manager import EvalReport, RolloutManager, RolloutReport
from miles.trainer.actor import TrainActor, TrainReport
from miles.trainer.fsdp.backend import FsdpBackend
from miles.types import Sample

ROOT = Path(__file__).resolve().parents[2]
BASE = str(ROOT / "examples" / "quickstart" / "base")

PROMPTS = 2
PER_PROMPT = 2
SAMPLES = PROMPTS * PER_PROMPT
FLAGS = {
    "--hf-checkpoint": BASE,
    "--num-rollout": "3",
    "--rollout-batch-size": str(PROMPTS),
    "--n-samples-per-prompt": str(PER_PROMPT),
    "--num-steps-per-rollout": "1",
    "--input-key": "prompt",
    "--label-key": "label",
    "--lr": "1e-3",
}


class Engine:
    """Answers request number i (from 0) with 1 + i % 3 tokens.

    `delay_s`: prompt number -> seconds that its answers take; `abort_all` cuts them short.
    """

    base_url = "stage"

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.delay_s: dict[int, float] = {}
        self.stop = asyncio.Event()

    async def generate(self, payload: dict[str, Any]) -> dict[str, Any]:
        number = len(self.requests)
        self.requests.append(payload)
        finish = "stop"
        delay = self.delay_s.get(number // PER_PROMPT)
        if delay is not None:
            try:
                await asyncio.wait_for(self.stop.wait(), delay)
                finish = "abort"
            except TimeoutError:
                pass
        else:
            await asyncio.sleep(0)
        scored = [[-0.5, 6 + (number + i) % 5, None] for i in range(1 + number % 3)]
        meta = {"finish_reason": {"type": finish}, "weight_version": "1", "output_token_logprobs": scored}
        return {"text": f"answer {number}", "meta_info": meta}

    async def abort_all(self) -> None:
        self.stop.set()

    async def flush_cache(self) -> None: ...


@lru_cache(maxsize=1)
def _loaded() -> tuple[FsdpBackend, dict[str, Tensor]]:
    config, _ = parse(_argv(FLAGS) + ["--prompt-data", "none"])
    backend = FsdpBackend(BASE, config.train, config.optimizer)
    return backend, {name: tensor.clone() for name, tensor in backend.model.state_dict().items()}


def _backend() -> FsdpBackend:
    """One for all stages, because loading takes a while; each stage begins with the same weights."""
    backend, weights = _loaded()
    backend.model.load_state_dict(weights)
    backend.reset_optimizer()
    return backend


def _argv(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


async def by_index(args: Any, sample: Sample) -> float:
    """The reward of a stage that is given none: it differs inside each group."""
    assert sample.index is not None
    return float(sample.index % PER_PROMPT)


class Stage:
    """See above. Plug-ins are named by plug point: objects, or the path that a flag would take."""

    def __init__(self, folder: Path, flags: Sequence[object] = (), **plug_ins: Any) -> None:
        self.folder, self._stack = folder, ExitStack()
        self.plug_ins = {"custom_rm": by_index, **plug_ins}
        self.flags = [str(flag) for flag in flags]
        self.engine = Engine()
        self._actor: TrainActor | None = None

    def __enter__(self) -> Stage:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *failed: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        argv = _argv(FLAGS) + ["--prompt-data", str(self._prompts("train", 8))]
        for name, plug_in in self.plug_ins.items():
            if plug_in is not None:
                argv += [CATALOG[name].flag, self._path(name, plug_in)]
        self.config, self.args = parse([*argv, "--run-dir", str(self.folder / "run"), *self.flags])
        run = self.config.run
        self.hooks = bind(
            self.args,
            policies=run.hook_policy,
            forms=run.hook_form,
            timeout_s=run.hook_timeout_s,
            error_budget=run.hook_error_budget,
        )
        self.record = self._stack.enter_context(RunRecord(self.folder / "run"))
        self.hooks.set_bundle_dir(self.record.path / "failures")
        self.tracker = Tracker(self.record)
        context.install(context.RunContext(self.hooks, self.engine, seeds_each_sample=True))  # type: ignore[arg-type]
        self._stack.callback(context.install, None)
        self._stack.callback(SingletonMeta.clear_all_instances)
        self.manager = RolloutManager(
            self.config, self.args, self.hooks, self.engine, self.tracker, self.record, dp_size=lambda: 1
        )  # type: ignore[arg-type]
        self.manager.load(-1)

    def _path(self, name: str, plug_in: Any) -> str:
        if isinstance(plug_in, str):
            return plug_in
        self._stack.enter_context(function_registry.temporary(f"test:{name}", plug_in))
        return f"test:{name}"

    def _prompts(self, name: str, count: int) -> Path:
        path = self.folder / f"{name}.jsonl"
        rows = [{"prompt": f"{10 + i}+1=?", "label": str(11 + i), "metadata": {"row": i}} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    @staticmethod
    def evaluating(folder: Path, prompts: int = 3) -> list[str]:
        """Flags for an evaluation of `prompts` prompts, called `held`."""
        path = folder / "held.jsonl"
        rows = [{"prompt": f"{20 + i}+1=?", "label": str(21 + i)} for i in range(prompts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["--eval-prompt-data", "held", str(path), "--eval-interval", "1", "--n-samples-per-eval-prompt", "1"]

    # ---- what a run does -----------------------------------------------------------------------------------------

    def rollout(self, rollout_id: int = 0) -> RolloutReport:
        return self.manager.generate(rollout_id)

    def evaluate(self, done: int = 1) -> EvalReport | None:
        return self.manager.eval(done)

    @property
    def actor(self) -> TrainActor:
        if self._actor is None:
            self._actor = TrainActor(
                _backend(), self.config, self.args, self.hooks, self.tracker, transport=None, on_step=lambda: None
            )
        return self._actor

    def train(self, report: RolloutReport, rollout_id: int = 0) -> TrainReport:
        return self.actor.train(rollout_id, report.shards[0], report.global_batch_size)

    def metrics(self) -> dict[str, Any]:
        """Everything that was logged, later values over earlier ones."""
        self.record.flush()
        return {key: value for line in read_metrics(self.record.path) for key, value in line.items()}
