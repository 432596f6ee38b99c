"""What the run tells while it goes and leaves at its end: display, clock, curve, summary. Decides nothing."""

from __future__ import annotations

import os
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NoReturn

from miles.config import RunConfig
from miles.hooks import Hooks
from miles.observe.display import Display
from miles.observe.lock import LOCK_NAME
from miles.observe.metric_checker import MetricChecker
from miles.observe.metrics import compute_rollout_step, reward_value
from miles.observe.plots import save_reward_png
from miles.observe.record import RunRecord, read_metrics, read_summary
from miles.observe.summary import RunClock, build_summary
from miles.observe.tracking import Tracker
from miles.run import resume
from miles.run.manager import EvalReport, RolloutReport
from miles.trainer.actor import TrainReport
from miles.types import Sample

# How long display and record may take to close once a run has to end at once.
STUCK_GRACE_S = 5.0
# A plug-in is worth a line at the end of a run when its calls took this share of it, and this many seconds.
SLOW_SHARE = 0.1
SLOW_S = 1.0


class Watch:
    """Told by the driver what happened, in order."""

    def __init__(
        self,
        config: RunConfig,
        args: Namespace,
        hooks: Hooks,
        tracker: Tracker,
        record: RunRecord,
        display: Display,
        clock: RunClock,
        total: int,
    ) -> None:
        self.config, self.args, self.hooks, self.tracker = config, args, hooks, tracker
        self.record, self.display, self.clock, self.total = record, display, clock, total
        ci = config.ci
        self.checker = (
            MetricChecker(ci.ci_metric_checker_key, ci.ci_metric_checker_threshold)
            if ci.ci_metric_checker_key
            else None
        )
        self.rewards: list[tuple[int, float]] = []
        self.evals: dict[str, list[tuple[float, float]]] = {}
        self.eval_before: dict[str, float] | None = None
        self.eval_after: dict[str, float] | None = None

    def recall(self) -> None:
        """What the record knows of the rollouts before a resume: rewards and evaluations for curve and summary."""
        sets = [dataset.name for dataset in self.config.eval.eval_datasets]
        names = [*sets, *(f"{name}-loss" for name in sets)]
        for line in read_metrics(self.record.path):
            rollout_id = line.get("_rollout_id", -1)
            if "rollout/raw_reward" in line and self.config.algorithm.loss_type != "sft_loss":
                self.rewards.append((rollout_id, line["rollout/raw_reward"]))
            scores = {name: line[f"eval/{name}"] for name in names if f"eval/{name}" in line}
            if scores:
                self._remember(rollout_id + 1, scores)
            if self.checker is not None and self.checker.key in line:
                self.checker.on_eval(line)

    def _remember(self, done: int, scores: dict[str, float]) -> None:
        if done == 0:
            self.eval_before = scores
        else:
            self.eval_after = scores
        for name, value in scores.items():
            self.evals.setdefault(name, []).append((done, value))

    def notice(self, text: str) -> None:
        self.display.notice(text)

    def stuck(self, card: str) -> NoReturn:
        """A plug-in call that nothing can end, told in `card`: ends the process, from whichever thread this is."""
        at_last = threading.Timer(STUCK_GRACE_S, os._exit, (1,))  # another thread may hold the display's lock
        at_last.daemon = True
        at_last.start()
        print(f"\nmiles: {card}\n  resume    {self._how_to_resume()}", file=sys.stderr, flush=True)
        self.display.close()
        self.record.flush()
        os._exit(1)

    def _how_to_resume(self) -> str:
        save = self.config.checkpoint.save
        if save is None:
            return "nothing was saved, because --save is not given"
        if resume.find(save, save) is None:
            return f"{save} holds no checkpoint yet"
        return f"the same command with --load {save} goes on from the last checkpoint"

    # ---- rollouts ------------------------------------------------------------------------------------------------

    def plug_ins_called(self, rollout_id: int) -> None:
        """The calls of a rollout, from its prompts to its last optimizer step."""
        step = compute_rollout_step(self.args, rollout_id)
        self.tracker.log({**self.hooks.rollout_stats(), "rollout/step": step}, step_key="rollout/step")

    def rollout_done(self, report: RolloutReport, trained: TrainReport | None, seconds: float) -> None:
        """One rollout from its first prompt to the new weights, in `seconds`."""
        self.clock.weights_updated()
        if report.mean_reward is not None:
            self.rewards.append((report.rollout_id, report.mean_reward))
        extra: dict[str, Any] = {}
        if report.mean_reward is None and trained is not None:
            extra["loss"] = trained.metrics.get("train/loss")
        if report.failed_scores:
            extra["failed scores"] = report.failed_scores
        speed = report.response_tokens / report.seconds if report.seconds > 0 else 0.0
        self.display.rollout(report.rollout_id, report.mean_reward, seconds, speed, **extra)

    # ---- evaluations ---------------------------------------------------------------------------------------------

    def evaluated(self, done: int, report: EvalReport) -> None:
        """The model after `done` rollouts; 0 is the model before training."""
        self._remember(done, report.scores)
        if self.checker is not None:
            self.checker.on_eval(report.metrics)
        title = "before training" if done == 0 else f"after rollout {done}"
        self.display.evaluation(title, report.scores)
        if report.example is not None and done in (0, self.total):
            self._show(title, report.example)

    def _show(self, title: str, sample: Sample) -> None:
        self.display.example(
            title, sample.prompt, sample.response, sample.label, reward_value(sample, self.config.reward.reward_key)
        )

    # ---- the end -------------------------------------------------------------------------------------------------

    def finished(self) -> None:
        """Summary, curve and picture. A resume that found everything done keeps the summary of the run that did it."""
        if self.clock.rollouts > 0 or read_summary(self.record.path) is None:
            self.record.write_summary(self._summary())
        if self.rewards:
            steps, rewards = [float(i) for i, _ in self.rewards], [r for _, r in self.rewards]
            self.display.curve(steps, rewards)
            save_reward_png(self.record.path / "reward.png", steps, rewards, evals=self.evals)
        names = [p.name + "/" * p.is_dir() for p in self.record.path.iterdir() if p.name != LOCK_NAME]
        self.display.notice(f"everything is in {self.config.run.run_dir}: {', '.join(sorted(names))}")
        for line in self._slow_plug_ins():
            self.display.notice(line)
        if self.checker is not None:
            self.checker.verdict()

    def _slow_plug_ins(self) -> Iterator[str]:
        """Example: `custom-rm my.rewards.grade: 640 calls took 41.0 s together (p50 0.052 s, p95 0.21 s, longest
        1.7 s); the rollouts took 30.2 s`"""
        wall_s = self.clock.wall_s or 0.0
        for hook in self.hooks:
            counts = hook.stats.run
            if hook.is_built_in or hook.point.may_be_async or counts.total_s < max(SLOW_S, SLOW_SHARE * wall_s):
                continue
            yield (
                f"{hook.point.key} {hook.path}: {counts.calls} calls took {counts.total_s:.1f} s together (p50 "
                f"{counts.percentile(0.5):.2g} s, p95 {counts.percentile(0.95):.2g} s, longest {counts.max_s:.2g} s); "
                f"the rollouts took {wall_s:.1f} s"
            )

    def _summary(self) -> dict[str, Any]:
        return build_summary(
            self.clock,
            seed=self.config.run.seed,
            eval_before=self.eval_before,
            eval_after=self.eval_after,
            hooks=by_plug_point(self.hooks.stats()),
            notices=self.config.notices,
        )


def by_plug_point(stats: dict[str, float]) -> dict[str, dict[str, float]]:
    """`{"hooks/custom_rm/calls": 8, ...}` -> `{"custom_rm": {"calls": 8, ...}}`"""
    nested: dict[str, dict[str, float]] = {}
    for key, value in stats.items():
        _, name, what = key.split("/")
        nested.setdefault(name, {})[what] = value
    return nested
