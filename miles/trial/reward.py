"""The reward on trial, and its lint: what a number must be so that training learns from it what was meant.

    called twice     gives the same value
    the label        given back in the usual ways scores at least as much as nothing
    nothing          an empty response does not score like the best one
    differences      different responses do not all score alike
    latency, range   a call under a second, numbers that float32 sums can hold
"""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from miles.hooks.card import sample_text
from miles.hooks.problems import at_place
from miles.trial.material import OTHER_RESPONSES, Material, Writer, answers, groups_of
from miles.trial.outcome import Failed, Outcome, Trial, changed_text, counted, excuse, failing, number_text, range_text
from miles.trial.watch import Watch, same
from miles.types import Sample

# `miles check` scores this many recorded samples, and stops earlier when the calls have taken this long.
MAX_SCORED, BUDGET_S = 32, 5.0
SLOW_S = 1.0
HUGE = 1e4
# Differences to recorded rewards that `miles replay` prints, the largest first.
MAX_SHOWN = 20
# The record keeps float64, a reward may have been computed in float32.
TOLERANCE = 1e-6
_CHARACTERS = 60


@dataclass
class Scores:
    """Samples that were scored, with their values in order; `failures` are calls that the run would tolerate."""

    samples: list[Sample] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    failures: list[Failed] = field(default_factory=list)

    def numbers(self, args: Namespace) -> list[float]:
        return [n for value in self.values if (n := number_of(value, args)) is not None]


def try_reward(trial: Trial) -> Outcome:
    """Score the material and, for the lint, made-up answers to its first prompt that has a label."""
    scorer = _Scorer(trial)
    scores = scorer.score_material()
    if not scores.samples and scores.failures and excuse(trial, scores.failures[0].error) is None:
        raise scores.failures[0]  # what fails every time exceeds any error budget
    outcome = Outcome("", values=scores.values if len(scores.values) == sum(map(len, trial.material.groups)) else None)
    numbers = scores.numbers(trial.args)
    unlike = _differences(trial, scores) if trial.material.recorded else []
    outcome.details = unlike[:MAX_SHOWN] if not _is_one(trial.material) else _one(trial, scores)
    numbers += scorer.lint(scores, outcome)
    if numbers:
        outcome.returned = f"{range_text(numbers)} over {counted(len(numbers), 'response')}"
    elif scores.values:
        outcome.returned = f"{counted(len(scores.values), 'reward')}, none of them one number"
    else:
        outcome.returned = "failed"
    if trial.material.recorded:
        what = f"{len(unlike)} score differently now" if unlike else "as recorded"
        outcome.returned += f", {len(scores.samples)} of them recorded: {what}"
    outcome.warnings += _failures(trial, scorer)
    outcome.warnings += _numbers(numbers, scorer)
    return outcome


class _Scorer:
    """Calls the reward on one sample after another, or on whole groups with `--group-rm`."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.failures: list[Failed] = []
        self.by_group = bool(vars(trial.args).get("group_rm"))
        self.changed: set[str] = set()
        self.tries = 0

    @property
    def is_late(self) -> bool:
        """Whether the calls so far have taken what a check may take."""
        return not self.trial.thorough and sum(self.trial.call.seconds) > BUDGET_S

    @property
    def seconds_per_call(self) -> float:
        seconds = sorted(self.trial.call.seconds)
        return seconds[len(seconds) // 2] if seconds else 0.0

    def score_material(self) -> Scores:
        material, scores = self.trial.material, Scores()
        for group in material.fresh():
            if not self.trial.thorough and len(scores.samples) >= MAX_SCORED:
                break
            for sample in group:
                sample.reward = None
            for part in [group] if self.by_group else [[sample] for sample in group]:
                if not (self.is_late and self.tries):
                    self.add(scores, part, len(part))
        return scores

    def add(self, scores: Scores, samples: list[Sample], group_size: int) -> None:
        """Score some samples one by one, or `group_size` at a time where groups are scored."""
        for part in groups_of(samples, group_size if self.by_group else 1):
            self.tries += 1
            try:
                values = self._values(part)
            except Failed as failed:
                if not self._is_tolerated(failed):
                    raise
                scores.failures.append(failed)
                self.failures.append(failed)
                continue
            scores.samples += part
            scores.values += values

    def _values(self, part: list[Sample]) -> list[Any]:
        watch = Watch(part)
        try:
            if self.by_group:
                return list(self._batch(part))
            return [self.trial.raw(self.trial.args, part[0])]
        finally:
            self.changed |= set(watch.changed())

    def _batch(self, part: list[Sample]) -> list[Any]:
        hook: Any = self.trial.hook
        with failing(self.trial, tuple(part)):
            values: list[Any] = self.trial.call(hook.raw_batch, self.trial.args, part)
        return values

    def _is_tolerated(self, failed: Failed) -> bool:
        return self.trial.hook.policy.action != "raise" or excuse(self.trial, failed.error) is not None

    # ---- lint ------------------------------------------------------------------------------------------------------

    def lint(self, scores: Scores, outcome: Outcome) -> list[float]:
        """Score made-up answers; what is odd goes to `outcome.warnings`. Returns the numbers of the made-up answers."""
        args, before = self.trial.args, scores.numbers(self.trial.args)
        asked = _question(self.trial.material)
        if not scores.samples or asked is None:
            return []
        outcome.warnings += self._again(scores.samples[0], scores.values[0])
        writer = Writer(args)
        texts = [] if self.is_late else answers(asked.label)
        right = self._score([writer.answer_to(asked, text) for text in texts])
        other = self._score([writer.answer_to(asked, OTHER_RESPONSES[0])])
        empty = self._score([writer.empty_answer_to(asked)])
        best = max([*before, *right, *other], default=None)
        if empty and best is not None:
            outcome.warnings += _empty_response(empty[0], before + other, right, best)
        everything = [*before, *right, *other, *empty]
        if len(everything) > 1 and len(set(everything)) == 1 and not self.failures:
            outcome.warnings.append(self._constant(everything, bool(right)))
        return [*right, *other, *empty]

    def _score(self, samples: list[Sample]) -> list[float]:
        """The numbers of some samples, in order; those of a group that is filled up are cut."""
        scores = Scores()
        self.add(scores, samples, max(1, self.trial.args.n_samples_per_prompt))
        return scores.numbers(self.trial.args)[: len(samples)]

    def _again(self, sample: Sample, value: Any) -> list[str]:
        """The same call once more. Of a group that is scored as a whole, the first group."""
        twin = copy.deepcopy(sample)
        twin.reward = None
        if self.by_group:
            groups = self.trial.material.fresh()
            for member in groups[0]:
                member.reward = None
            second = self._values(groups[0])[0]
        else:
            second = self._values([twin])[0]
        if same(second, value) or (isinstance(value, float) and value != value):
            return []
        return [f"called twice with the same response it returns {_short(value)} and {_short(second)}"]

    def _constant(self, numbers: list[float], with_label: bool) -> str:
        among = ", the label in the usual forms and nothing among them" if with_label else ""
        return (
            f"it returns {number_text(numbers[0])} for each of {len(numbers)} responses{among}: nothing is learned "
            f"from rewards that do not differ" + _try_on(self.trial.material)
        )


def _question(material: Material) -> Sample | None:
    """A sample whose prompt has a label, else any."""
    samples = material.flat()
    return next((s for s in samples if answers(s.label)), samples[0] if samples else None)


def _empty_response(empty: float, others: list[float], right: list[float], best: float) -> list[str]:
    if right and empty > max(right):
        return [
            f"an empty response scores {number_text(empty)}, more than the label itself in any usual form "
            f"({number_text(max(right))})"
        ]
    worst = min([*others, *right], default=best)
    if empty >= best > worst:
        return [f"an empty response scores {number_text(empty)}, as much as the best of the others"]
    return []


def _numbers(numbers: list[float], scorer: _Scorer) -> list[str]:
    """What the values, the clock and the samples say after all calls."""
    warnings = changed_text(sorted(scorer.changed))
    if any(abs(n) > HUGE for n in numbers):
        warnings.append(f"rewards reach {number_text(max(numbers, key=abs))}; scale them to about 1")
    if numbers and scorer.seconds_per_call > SLOW_S:
        what = "group" if scorer.by_group else "sample"
        warnings.append(f"a call takes {scorer.seconds_per_call:.1f} s: every {what} of a rollout waits that long")
    return warnings


def _failures(trial: Trial, scorer: _Scorer) -> list[str]:
    if not scorer.failures:
        return []
    error = scorer.failures[0].error
    text = at_place(error, trial.hook.source.file)
    tail = excuse(trial, error) or f"--hook-policy {trial.hook.point.key}={trial.hook.policy} leaves such samples out"
    return [f"{len(scorer.failures)} of {scorer.tries} calls failed: {text} ({tail})"]


def _try_on(material: Material) -> str:
    return "" if material.recorded else "; --on RUN_DIR tries it on a recorded rollout"


def _differences(trial: Trial, scores: Scores) -> list[str]:
    """One line per sample whose value is not the recorded one, the largest difference first."""
    recorded = {(s.group_index, s.index): s.reward for group in trial.material.groups for s in group}
    lines: list[tuple[float, str]] = []
    for sample, new in zip(scores.samples, scores.values, strict=True):
        before = recorded.get((sample.group_index, sample.index))
        a, b = number_of(before, trial.args), number_of(new, trial.args)
        equal = abs(a - b) <= TOLERANCE * max(1.0, abs(a)) if a is not None and b is not None else same(before, new)
        if not equal:
            size = abs(a - b) if a is not None and b is not None else float("inf")
            lines.append(
                (size, f"sample {sample.index}: {_short(before)} -> {_short(new)}  {_short(sample.response)}")
            )
    return [line for _, line in sorted(lines, key=lambda entry: -entry[0])]


def _is_one(material: Material) -> bool:
    return material.recorded and [len(group) for group in material.groups] == [1]


def _one(trial: Trial, scores: Scores) -> list[str]:
    (group,) = trial.material.groups
    recorded, now = group[0].reward, scores.values[0]
    return [f"sample {sample_text(group[0])}", f"recorded {_short(recorded)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS // 2]} ... {text[-_CHARACTERS // 2 :]}"


def number_of(value: Any, args: Namespace) -> float | None:
    """The one number of a reward; None where it has none."""
    key = vars(args).get("reward_key")
    if isinstance(value, dict):
        value = value.get(key) if key else None
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
