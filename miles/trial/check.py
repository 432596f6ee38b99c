"""`miles check`: every pure plug-in of a run is called, and everything that is found wrong is told in one report."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from miles.hooks import Hook, Hooks
from miles.hooks.check import columns_text, form_of
from miles.hooks.problems import at_place
from miles.trial.caller import Caller
from miles.trial.material import Material
from miles.trial.outcome import Failed, Outcome, Trial, counted, excuse, problem_text
from miles.trial.table import TRIALS, why_not_called

LIMIT_S = 10.0


@dataclass
class Checked:
    """One line per plug-in, what is odd, and what is wrong.

    Example of a line: `("--custom-rm-path", "my.rewards.grade", "sample (in a thread)", "0.1 ms", "0.0 .. 1.0 over 12
    responses")`
    """

    material: Material
    rows: list[tuple[str, ...]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_called: int = 0
    # Calls that were stopped for taking too long.
    num_stopped: int = 0

    def table(self) -> str:
        head = ("flag", "path", "form", "time", "returned")
        return "\n".join(columns_text([head, *self.rows]))

    def closing(self) -> str:
        bound = f"{counted(len(self.rows), 'plug-in')} bound"
        found = counted(len(self.warnings), "warning") if self.warnings else "no problems"
        if not self.num_called:
            return f"{bound}, {found}."
        return f"{bound}, {self.num_called} called on {self.material.name}; {found}."


def check_hooks(
    hooks: Hooks | Iterable[Hook], args: Namespace, material: Material, *, limit_s: float = LIMIT_S
) -> Checked:
    """Call every pure plug-in once. Nothing is raised for what plug-ins do; see `Checked.problems`."""
    checked = Checked(material)
    with Caller(limit_s) as call:
        for hook in hooks:
            note = never_called(hook, args)
            if note is not None:
                checked.warnings.append(_about(hook, note))
            why_not = why_not_called(hook.point)
            if why_not is not None:
                checked.rows.append((hook.point.flag, hook.path, form_of(hook), "-", f"not called: {why_not}"))
            else:
                _check(Trial(hook, args, checked.material, call), checked)
        checked.num_stopped = call.num_stopped
    return checked


def _check(trial: Trial, checked: Checked) -> None:
    trial.call.seconds.clear()
    trial.call.about = f"{trial.hook.point.flag} {trial.hook.path}"
    checked.num_called += 1
    try:
        outcome = TRIALS[trial.hook.point.name](trial)
    except Failed as failed:
        why = excuse(trial, failed.error)
        if why is not None:
            outcome = Outcome("failed", [f"{at_place(failed.error, trial.hook.source.file)} ({why})"])
        else:
            outcome = Outcome("failed, see below")
            checked.problems.append(problem_text(trial, failed))
    checked.warnings += [_about(trial.hook, text) for text in outcome.warnings]
    if trial.hook.point.name == "custom_rm":
        checked.material = _scored(checked.material, outcome)
    row = (trial.hook.point.flag, trial.hook.path, form_of(trial.hook), _time(trial.call.seconds), outcome.returned)
    checked.rows.append(row)


def _scored(material: Material, outcome: Outcome) -> Material:
    """The samples with the rewards of the run's own reward, for the plug-ins after it.

    Numbers that are all the same keep the made-up ones, which show more of a filter.
    """
    values = outcome.values
    if values is None:
        return material if material.recorded else replace(material, trusted=False)
    plain = all(isinstance(value, (int, float)) for value in values)
    return material if plain and len(set(values)) == 1 else material.with_rewards(values)


def _about(hook: Hook, text: str) -> str:
    return f"{hook.point.flag} {hook.path} ({hook.source}): {text}"


def _time(seconds: list[float]) -> str:
    """The median call. Examples: `0.12 ms`, `1.4 s`."""
    if not seconds:
        return "-"
    middle = sorted(seconds)[len(seconds) // 2]
    if middle >= 1:
        return f"{middle:.1f} s"
    return f"{1000 * middle:.2f} ms" if middle < 0.1 else f"{1000 * middle:.0f} ms"


def never_called(hook: Hook, args: Namespace) -> str | None:
    """Why a run with these flags never calls this plug-in; None where it does."""
    settings = vars(args)
    backend, loss = settings.get("train_backend"), settings.get("loss_type")
    if backend is not None and backend not in hook.point.backends:
        return f"never called with --train-backend {backend}"
    if loss is None:
        return None
    name = hook.point.name
    if name == "custom_loss_function" and loss != "custom_loss":
        return f"never called with --loss-type {loss}; give --loss-type custom_loss"
    if name == "custom_tis_function" and not (settings["use_tis"] or settings["get_mismatch_metrics"]):
        return "never called without --use-tis or --get-mismatch-metrics"
    if name in ("custom_tis_function", "custom_pg_loss_reducer_function") and loss != "policy_loss":
        return f"never called with --loss-type {loss}"
    if name == "custom_reward_post_process" and settings["custom_convert_samples_to_train_data_path"]:
        return "never called with --custom-convert-samples-to-train-data-path, which replaces it"
    return None
