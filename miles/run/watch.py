"""What the run tells while it goes and leaves at its end: display, clock, curve, summary. Decides nothing."""

from __future__ import annotations

from typing import Any

from miles.config import RunConfig
from miles.hooks import Hooks
from miles.observe.display import Display
from miles.observe.lock import LOCK_NAME
from miles.observe.metric_checker import MetricChecker
from miles.observe.metrics import reward_value
from miles.observe.plots import save_reward_png
from miles.observe.record import RunRecord, read_metrics, read_summary
from miles.observe.summary import RunClock, build_summary
from miles.run.manager import EvalReport, RolloutReport
from miles.trainer.actor import TrainReport
from miles.types import Sample


class Watch:
    """Told by the driver what happened, in order."""

    def __init__(
        self, config: RunConfig, hooks: Hooks, record: RunRecord, display: Display, clock: RunClock, total: int
    ) -> None:
        self.config, self.hooks, self.record, self.display, self.clock = config, hooks, record, display, clock
        self.total = total
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
        names = [dataset.name for dataset in self.config.eval.eval_datasets]
        for line in read_metrics(self.record.path):
            rollout_id = line.get("_rollout_id", -1)
            if "rollout/raw_reward" in line:
                self.rewards.append((rollout_id, line["rollout/raw_reward"]))
            accuracy = {name: line[f"eval/{name}"] for name in names if f"eval/{name}" in line}
            if accuracy:
                self._remember(rollout_id + 1, accuracy)
            if self.checker is not None and self.checker.key in line:
                self.checker.on_eval(line)

    def _remember(self, done: int, accuracy: dict[str, float]) -> None:
        if done == 0:
            self.eval_before = accuracy
        else:
            self.eval_after = accuracy
        for name, value in accuracy.items():
            self.evals.setdefault(name, []).append((done, value))

    def notice(self, text: str) -> None:
        self.display.notice(text)

    # ---- rollouts ------------------------------------------------------------------------------------------------

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
        self._remember(done, report.accuracy)
        if self.checker is not None:
            self.checker.on_eval(report.metrics)
        title = "before training" if done == 0 else f"after rollout {done}"
        self.display.evaluation(title, report.accuracy)
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
        if self.checker is not None:
            self.checker.verdict()

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
