"""Where metrics go: the run record and the log always, W&B and TensorBoard when their flags ask for them.

One `Tracker` per process, installed by the run; plug-ins reach it through the published functions `init_tracking` and
`log` (`miles.utils.tracking_utils`). The W&B and TensorBoard packages are imported only when they are used. Leaves the
numbers to `metrics` and the files of the record to `record`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from miles.errors import FlagError
from miles.observe.jsonable import as_number, to_jsonable, without_secrets

if TYPE_CHECKING:
    from miles.observe.record import RunRecord

logger = logging.getLogger(__name__)

# Step axis -> the metrics that are drawn over it.
STEP_KEYS: dict[str, tuple[str, ...]] = {
    "train/step": ("train/*",),
    "rollout/step": ("rollout/*", "multi_turn/*", "passrate/*", "perf/*"),
    "eval/step": ("eval/*",),
}


class TrackingSettings(Protocol):
    """The settings that trackers read: the config section `tracking`, and any `args` of a plug-in."""

    @property
    def use_wandb(self) -> bool: ...
    @property
    def wandb_mode(self) -> str | None: ...
    @property
    def wandb_dir(self) -> str | None: ...
    @property
    def wandb_key(self) -> str | None: ...
    @property
    def wandb_host(self) -> str | None: ...
    @property
    def wandb_team(self) -> str | None: ...
    @property
    def wandb_group(self) -> str | None: ...
    @property
    def wandb_project(self) -> str | None: ...
    @property
    def wandb_random_suffix(self) -> bool: ...
    @property
    def wandb_run_id(self) -> str | None: ...
    @property
    def use_tensorboard(self) -> bool: ...
    @property
    def tb_project_name(self) -> str | None: ...
    @property
    def tb_experiment_name(self) -> str | None: ...


class Sink(Protocol):
    """One place that metrics go to beside the record."""

    def log(self, metrics: Mapping[str, Any], step_key: str | None) -> None: ...

    def close(self) -> None: ...


# ---- W&B -------------------------------------------------------------------------------------------------------


class WandbSink:
    """Metrics to Weights & Biases. The first process of a run starts the W&B run, others attach by its id.

    Raises FlagError when the package is missing or W&B refuses to start.
    """

    def __init__(self, settings: TrackingSettings, config: Mapping[str, Any], *, primary: bool = True) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise FlagError(
                "--use-wandb", given="the package wandb is not installed.", remedy="Run: pip install 'miles[wandb]'"
            )
        import wandb

        if settings.wandb_mode:
            os.environ["WANDB_MODE"] = settings.wandb_mode
        self._online = os.environ.get("WANDB_MODE", "online") == "online"
        if not self._online:  # nothing goes out then, not even reports of W&B's own errors
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            if settings.wandb_key is not None and self._online:
                wandb.login(key=settings.wandb_key, host=settings.wandb_host)
            start = self._primary_options(settings, wandb) if primary else self._secondary_options(settings, wandb)
            self._run = wandb.init(config=to_jsonable(without_secrets(config)), dir=self._directory(settings), **start)
        except wandb.Error as error:
            raise FlagError(
                "--use-wandb",
                given=f"W&B did not start: {str(error).rstrip(chr(46))}.",
                remedy="Check --wandb-key and --wandb-host, or keep the data here with --wandb-mode offline.",
            ) from error
        for step_key, patterns in STEP_KEYS.items():
            self._run.define_metric(step_key)
            for pattern in patterns:
                self._run.define_metric(pattern, step_metric=step_key)

    @staticmethod
    def _directory(settings: TrackingSettings) -> str | None:
        if settings.wandb_dir:
            os.makedirs(settings.wandb_dir, exist_ok=True)
        return settings.wandb_dir

    def _primary_options(self, settings: TrackingSettings, wandb: Any) -> dict[str, Any]:
        group = settings.wandb_group
        if group and settings.wandb_random_suffix:
            group = f"{group}_{secrets.token_hex(4)}"
        options = {
            "entity": settings.wandb_team,
            "project": settings.wandb_project,
            "group": group,
            "name": f"{group}-RANK_0" if group else None,
        }
        if self._online:
            options["settings"] = wandb.Settings(mode="shared", x_primary=True)
        return options

    def _secondary_options(self, settings: TrackingSettings, wandb: Any) -> dict[str, Any]:
        options: dict[str, Any] = {
            "id": settings.wandb_run_id,
            "entity": settings.wandb_team,
            "project": settings.wandb_project,
            "resume": "allow",
            "reinit": True,
        }
        if self._online:
            options["settings"] = wandb.Settings(mode="shared", x_primary=False, x_update_finish_state=False)
        return options

    @property
    def run_id(self) -> str:
        return str(self._run.id)

    def log(self, metrics: Mapping[str, Any], step_key: str | None) -> None:
        self._run.log(dict(metrics))

    def close(self) -> None:
        self._run.finish()


# ---- TensorBoard -----------------------------------------------------------------------------------------------


def tensorboard_directory(settings: TrackingSettings) -> str:
    """$TENSORBOARD_DIR, else `tensorboard_log/<project>/<experiment or the time>`. FlagError without a project."""
    from_environment = os.environ.get("TENSORBOARD_DIR")
    if from_environment:
        return from_environment
    if not settings.tb_project_name:
        raise FlagError(
            "--use-tensorboard",
            given="no directory to write to.",
            remedy="Give --tb-project-name, or set the environment variable TENSORBOARD_DIR.",
        )
    experiment = settings.tb_experiment_name or time.strftime("%Y%m%d_%H%M%S")
    return str(Path("tensorboard_log", settings.tb_project_name, experiment))


class TensorBoardSink:
    """Every number of a call as one scalar, at the step that the call names. What is no number is left out.

    Raises FlagError when the package is missing or no directory is given.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        directory = tensorboard_directory(settings)
        if importlib.util.find_spec("tensorboard") is None:
            raise FlagError(
                "--use-tensorboard",
                given="the package tensorboard is not installed.",
                remedy="Run: pip install 'miles[tensorboard]'",
            )
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory)

    def log(self, metrics: Mapping[str, Any], step_key: str | None) -> None:
        if step_key is None or step_key not in metrics:
            raise KeyError(f"TensorBoard needs the step: metrics have no {step_key!r}, only {sorted(metrics)}")
        step = metrics[step_key]
        for key, value in metrics.items():
            number = as_number(value)
            if key != step_key and number is not None:
                self._writer.add_scalar(key, number, int(step))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


# ---- the console -----------------------------------------------------------------------------------------------


def in_one_line(metrics: Mapping[str, Any], step_key: str | None = None) -> str:
    """The metrics as a log line, which a run without progress display (--progress none) prints.

    Example: `{"train/step": 3, "train/loss": 0.271828}` over `"train/step"` is `train/step 3: train/loss 0.2718`.
    """
    shown = [f"{key} {_short(value)}" for key, value in metrics.items() if key != step_key]
    head = f"{step_key} {metrics[step_key]}: " if step_key in metrics else ""
    return head + ", ".join(shown)


def _short(value: Any) -> str:
    number = as_number(value)
    return f"{number:.4g}" if isinstance(number, float) else str(value if number is None else number)


# ---- the tracker of a process ----------------------------------------------------------------------------------


class Tracker:
    """Hands metrics to the record and to every sink.

    Each line of the record notes the rollout that it belongs to, for `RunRecord.rewind`: callers that know it say so
    (training may lag behind generation); for plug-ins it is `rollout_id`, the rollout being generated, which the run
    advances.

    Example::

        tracker = Tracker.open(config.tracking, record, config=resolved)
        tracker.rollout_id = 1
        tracker.log({"train/step": 0, "train/loss": 0.27}, "train/step", rollout_id=0)
    """

    def __init__(self, record: RunRecord | None = None, sinks: Sequence[Sink] = ()) -> None:
        self.record = record
        self.sinks = list(sinks)
        self.rollout_id: int | None = None
        self._skipped_steps = 0

    @classmethod
    def open(
        cls,
        settings: TrackingSettings,
        record: RunRecord | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        primary: bool = True,
    ) -> Tracker:
        """The trackers that the settings ask for. Raises FlagError when one of them cannot start."""
        sinks: list[Sink] = []
        if settings.use_tensorboard and primary:
            sinks.append(TensorBoardSink(settings))
        if settings.use_wandb and (primary or settings.wandb_run_id):
            sinks.append(WandbSink(settings, config or {}, primary=primary))
        return cls(record, sinks)

    @property
    def wandb_run_id(self) -> str | None:
        """The id by which other processes attach to the W&B run; None without W&B."""
        return next((sink.run_id for sink in self.sinks if isinstance(sink, WandbSink)), None)

    def log(self, metrics: Mapping[str, Any], step_key: str | None = None, *, rollout_id: int | None = None) -> None:
        """Hand `metrics` on; `step_key` names the entry that holds their step, e.g. `"rollout/step"`.

        Raises RunDirError when the record cannot be written.
        """
        of_rollout = self.rollout_id if rollout_id is None else rollout_id
        if as_number(metrics.get("train/skipped_step")):
            self._tell_skipped(metrics, of_rollout)
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", in_one_line(metrics, step_key))
        if self.record is not None:
            self.record.log(metrics, rollout_id=of_rollout)
        for sink in self.sinks:
            sink.log(metrics, step_key)

    def _tell_skipped(self, metrics: Mapping[str, Any], rollout_id: int | None) -> None:
        """Warn of the first, second, fourth, eighth ... skipped step: a run that learns nothing must say so."""
        self._skipped_steps += 1
        if self._skipped_steps & (self._skipped_steps - 1) == 0:
            logger.warning(
                "rollout %s: the gradient is not finite (norm %s, loss %s). The optimizer step was skipped and the "
                "weights stay as they were; %d skipped so far. Look at the rewards, --lr and any loss of your own.",
                rollout_id, metrics.get("train/grad_norm"), metrics.get("train/loss"), self._skipped_steps,
            )  # fmt: skip

    def close(self) -> None:
        """Finish all sinks; the record belongs to the run and stays open."""
        while self.sinks:
            self.sinks.pop().close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


_current: Tracker | None = None


def install(tracker: Tracker | None) -> None:
    """Make `tracker` the one that the published functions of this process reach; None forgets it."""
    global _current
    _current = tracker


def current() -> Tracker | None:
    """The tracker of this process."""
    return _current


def init_tracking(args: Namespace, primary: bool = True, **kwargs: Any) -> None:
    """Published: make sure that this process has a tracker, and note its W&B id as `args.wandb_run_id`.

    Inside a run the run's own tracker stays. Further keywords of other versions (`router_addr`) are accepted.
    """
    if _current is None:
        install(Tracker.open(args, config=vars(args), primary=primary))
    if _current is not None:
        args.wandb_run_id = _current.wandb_run_id


def log(args: Namespace, metrics: Mapping[str, Any], step_key: str) -> None:
    """Published: log `metrics` through the tracker of this process; without one (a plug-in's own test) as a line."""
    if _current is None:
        logger.info("metrics outside a run: %s", to_jsonable(metrics))
    else:
        _current.log(metrics, step_key)
