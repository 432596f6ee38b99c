"""Trials of the plug points that see whole groups or rollouts: filters, conversions, logging."""

from __future__ import annotations

from collections import Counter
from typing import Any

from miles.hooks.values import BadReturn
from miles.trial.outcome import Failed, Outcome, Trial, changed_text, counted, failing, range_text
from miles.trial.watch import Watch
from miles.types import Group, Sample


def try_dynamic_filter(trial: Trial) -> Outcome:
    """Every group gets a verdict, as each of them does in a run."""
    kept, reasons, details = 0, Counter[str](), []
    groups = trial.material.fresh()
    watch = Watch(s for group in groups for s in group)
    for group in groups:
        verdict = trial.raw(trial.args, group)
        kept += verdict.keep
        if not verdict.keep:
            reasons[verdict.reason or "without a reason"] += 1
        details.append(f"group {_number(group)}: {'kept' if verdict.keep else 'dropped'}, reason {verdict.reason}")
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    returned = f"keeps {kept} of {counted(len(groups), 'group')}" + (f"; dropped: {why}" if why else "")
    warnings = changed_text(watch.changed())
    if groups and set(reasons) == {"returned_none"} and not kept:
        warnings.append("it returns None, which drops a group; does every branch return a value?")
    elif groups and not kept:
        warnings.append("it drops every group: a run whose groups are all like these samples on without end")
    return Outcome(returned, warnings, details)


def try_buffer_filter(trial: Trial) -> Outcome:
    """One request for half of the groups; whether what is returned has left the buffer is checked at every call."""
    buffer = trial.material.fresh()
    everything, wanted = list(buffer), max(1, len(buffer) // 2)
    watch = Watch(s for group in buffer for s in group)
    taken = trial.raw(trial.args, None, buffer, wanted)
    warnings = changed_text(watch.changed())
    lost = len(everything) - len(taken) - len(buffer)
    if lost > 0:
        warnings.append(f"{counted(lost, 'group')} of {len(everything)} left the buffer without being returned")
    if not taken:
        warnings.append(f"it returns none of {len(everything)} groups: new prompts take their place")
    returned = f"{len(taken)} of {counted(len(everything), 'group')} asked for {wanted}, {len(buffer)} left"
    return Outcome(returned, warnings, [f"takes group {_number(group)}" for group in taken])


def _number(group: Group) -> Any:
    return group[0].group_index if group and isinstance(group[0], Sample) else None


def try_sample_filter(trial: Trial) -> Outcome:
    """Which samples are marked. Marks of the recorded run are taken off before."""
    groups = trial.material.fresh()
    samples = [s for group in groups for s in group]
    for sample in samples:
        sample.remove_sample = False
    watch = Watch(samples, allowed=("remove_sample",))
    value = trial.raw(trial.args, groups)
    removed = [s for s in samples if s.remove_sample]
    warnings = changed_text(watch.changed())
    if value is not None:
        warnings.append(f"its {type(value).__name__} is ignored; set sample.remove_sample = True instead")
    if sum(map(len, groups)) != len(samples):
        warnings.append("it takes samples out of their groups; set sample.remove_sample = True instead")
    if samples and len(removed) == len(samples):
        warnings.append("it removes every sample: nothing is left to train")
    details = [f"sample {s.index} (group {s.group_index}): removed" for s in removed]
    return Outcome(f"removes {len(removed)} of {counted(len(samples), 'sample')}", warnings, details)


def try_all_samples(trial: Trial) -> Outcome:
    def get_samples(count: int) -> list[Group]:
        raise LookupError("a record holds no data source: get_samples cannot be called in a replay")

    groups = trial.material.fresh()
    trial.raw(trial.args, groups, get_samples)
    return Outcome(f"returned, after {counted(len(groups), 'group')}")


def try_reward_post_process(trial: Trial) -> Outcome:
    samples = trial.material.flat()
    watch = Watch(samples, allowed=("reward",))
    raw, rewards = trial.raw(trial.args, samples)
    shown = []
    for name, values in (("raw", raw), ("trained", rewards)):
        numbers = [n for value in values if (n := _number_or_none(value)) is not None]
        shown.append(f"{name} {range_text(numbers)}" if numbers else f"{name} {type(values).__name__} of tensors")
    details = [f"sample {s.index}: {_shown(a)} -> {_shown(b)}" for s, a, b in zip(samples, raw, rewards, strict=True)]
    warnings = changed_text(watch.changed())
    if len(rewards) > 1 and all(_number_or_none(value) == 0 for value in rewards):
        warnings.append("every reward that is trained on is 0: nothing is learned from this rollout")
    return Outcome(f"{', '.join(shown)} over {counted(len(samples), 'sample')}", warnings, details)


def _shown(value: Any) -> str:
    number = _number_or_none(value)
    return f"{type(value).__name__}" if number is None else range_text([number])


def _number_or_none(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def try_convert(trial: Trial) -> Outcome:
    """The dict must make a batch: `miles.batch` reads it as a run would."""
    from miles.batch import from_published_dict

    samples = trial.material.flat()
    watch = Watch(samples)
    data = trial.raw(trial.args, samples)
    with failing(trial):
        batch = from_published_dict(data)
    columns = [*data]
    details = [f"{name}: {_column(value, len(batch))}" for name, value in data.items()]
    warnings = changed_text(watch.changed())
    if len(batch) != len(samples):
        warnings.append(f"{len(samples)} samples became {len(batch)} rows: optimizer steps count rows")
    if batch.rewards is None and trial.args.compute_advantages_and_returns:
        warnings.append("no column 'rewards', from which advantages are computed")
    return Outcome(f"{counted(len(batch), 'row')}: {', '.join(map(str, columns))}", warnings, details)


def _column(value: Any, rows: int) -> str:
    return f"one {type(value[0]).__name__} per row" if isinstance(value, list) and len(value) == rows and rows else (
        f"{type(value).__name__} for the whole batch"
    )


def try_rollout_log(trial: Trial) -> Outcome:
    samples = trial.material.flat()
    skips = trial.raw(trial.material.rollout_id, trial.args, samples, None, 1.0)
    return Outcome(_log_text(skips))


def try_eval_log(trial: Trial) -> Outcome:
    """The newest evaluation of the record."""
    evaluations = trial.evaluations or {}
    key = vars(trial.args).get("eval_reward_key") or vars(trial.args).get("reward_key")
    data = {
        name: {
            "rewards": [s.reward[key] if key and isinstance(s.reward, dict) else s.reward for s in samples],
            "truncated": [s.status == Sample.Status.TRUNCATED for s in samples],
            "samples": samples,
        }
        for name, samples in evaluations.items()
    }
    return Outcome(_log_text(trial.raw(trial.material.rollout_id, trial.args, data, None)))


def _log_text(skips: bool) -> str:
    return "True: the default logging is skipped" if skips else "False: the default logging runs, too"


def try_tool_specs(trial: Trial) -> Outcome:
    """A list of OpenAI tool specifications: `{"type": "function", "function": {"name": ...}}`."""
    specs = trial.raw()
    if not isinstance(specs, list):
        raise Failed(BadReturn("type", f"is a {type(specs).__name__}, expected a list of tool specifications"))
    names = []
    for position, spec in enumerate(specs):
        function = spec.get("function") if isinstance(spec, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            hint = '{"type": "function", "function": {"name": "search", "parameters": {...}}}'
            raise Failed(BadReturn("type", f"entry {position} is no tool specification", f"expected {hint}"))
        names.append(function["name"])
    warnings = [] if names else ["it is empty: the model is told of no tool"]
    return Outcome(f"{counted(len(names), 'tool')}: {', '.join(names)}" if names else "no tools", warnings)
