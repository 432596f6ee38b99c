"""`miles replay`: one plug point on a recorded rollout, or a failed call from its bundle.

    miles replay runs/x/failures/000001-custom-rm            the call of an error card (`miles.hooks.replay`)
    miles replay custom-rm my/reward.py:grade --on runs/x    a plug-in on the newest rollout of a run, with its `args`

In one process, without engines or Ray. `--pdb` stops where the plug-in fails.
"""

from __future__ import annotations

import argparse
import copy
import os
import pdb
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from miles.errors import UsageError
from miles.hooks import Hook, PlugPoint, bind, plug_point_named
from miles.hooks.check import form_of, known_point
from miles.hooks.replay import replay_main
from miles.hooks.source import trimmed_traceback
from miles.hooks.values import BadReturn
from miles.trial.caller import Caller, InPlace
from miles.trial.material import Material, recorded
from miles.trial.outcome import Failed, Outcome, Trial, problem_text
from miles.trial.recorded import recorded_args, recorded_evaluation, require_record
from miles.trial.table import TRIALS, why_not_replayed

MAX_DETAILS = 40


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when the plug-in came through, 1 when it failed, 2 for what cannot be replayed."""
    parser = _parser()
    given = parser.parse_args([word.lstrip("-") if plug_point_named(word) else word for word in argv])
    if given.path is None:
        if given.on is not None or not _is_bundle(given.what):
            _refuse_without_path(given.what, given.on)
        return replay_main([given.what, *(["--pdb"] if given.pdb else [])])
    if given.on is None:
        raise UsageError(
            f"miles replay {given.what} {given.path}: on which run? Give --on RUN_DIR, a directory that a run has left."
        )
    return on_record(known_point(given.what), given.path, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles replay",
        description="Run a plug-in on a recorded rollout, or a failed call again from its bundle.",
        usage="miles replay PLUGPOINT PATH --on RUN_DIR [--rollout N] [--sample INDEX] [--pdb]\n"
        "       miles replay BUNDLE [--pdb]",
        allow_abbrev=False,
    )
    parser.add_argument("what", metavar="PLUGPOINT|BUNDLE", help="custom-rm, ...; or a folder under RUN_DIR/failures")
    parser.add_argument("path", nargs="?", metavar="PATH", help="the plug-in: my.rewards.grade, my/rewards.py:grade")
    parser.add_argument("--on", metavar="RUN_DIR", help="the run whose samples and args the plug-in gets")
    parser.add_argument("--rollout", type=int, metavar="N", help="which rollout; the newest by default")
    parser.add_argument("--sample", type=int, metavar="INDEX", help="only the sample with this index, or its group")
    parser.add_argument("--hook-form", metavar="FORM", help="the form, where the signature leaves it open")
    parser.add_argument("--pdb", action="store_true", help="stop in the debugger where it fails")
    return parser


def _is_bundle(text: str) -> bool:
    return os.sep in text or Path(text).exists() or plug_point_named(text) is None


def _refuse_without_path(what: str, run_dir: str | None) -> None:
    point = known_point(what)
    refuse_unreplayable(point)
    on = run_dir or "RUN_DIR"
    raise UsageError(f"miles replay {point.key}: which plug-in? For example: miles replay {point.key} {_example(on)}")


def _example(run_dir: str) -> str:
    return f"my/plug_in.py:function --on {run_dir}"


def refuse_unreplayable(point: PlugPoint) -> None:
    why = why_not_replayed(point)
    if why is not None:
        raise UsageError(f"{point.flag} cannot be replayed on a recorded rollout. {why}")


# ---- on a record ---------------------------------------------------------------------------------------------------


def on_record(point: PlugPoint, path: str, given: Namespace) -> int:
    """Bind `path`, call it on the samples that `given` names, and print what it did."""
    refuse_unreplayable(point)
    require_record(given.on)
    args = recorded_args(given.on)
    setattr(args, point.dest, [path] if point.plural else path)
    hook = bound(point, path, args, given.hook_form)
    trial = _trial(hook, args, given)
    print(f"{point.flag} {path} ({hook.source}), form {form_of(hook)}")
    print(f"on        {trial.material.name}")
    try:
        with trial.call:
            outcome = TRIALS[point.name](trial)
    except Failed as failed:
        print(problem_text(trial, failed).partition("\n")[2])
        if not isinstance(failed.error, (BadReturn, UsageError)):
            print(trimmed_traceback(failed.error), end="")
        if given.pdb:
            sys.stdout.flush()
            pdb.post_mortem(failed.error.__traceback__)
        return 1
    show(outcome)
    return 0


def bound(point: PlugPoint, path: str, args: Namespace, form: str | None) -> Hook:
    """That one plug-in, called in place. Raises HookReport."""
    alone = Namespace(**{point.dest: [path] if point.plural else path})
    forms = {point.name: form} if form is not None else vars(args).get("hook_form") or {}
    own = {name: value for name, value in forms.items() if plug_point_named(name) is point}
    return next(hook for hook in bind(alone, {}, own, None, threads=InPlace()) if hook.point is point)


def _trial(hook: Hook, args: Namespace, given: Namespace) -> Trial:
    call = Caller(None)
    if hook.point.name != "custom_eval_rollout_log_function":
        material = recorded(given.on, given.rollout)
        if given.sample is not None:
            material = with_sample(material, given.sample, hook.point)
        return Trial(hook, args, material, call, thorough=True)
    names = [dataset.name for dataset in args.eval_datasets]
    found = recorded_evaluation(given.on, given.rollout, names)
    if found is None:
        what = "no evaluation is recorded" if given.rollout is None else f"no evaluation after {given.rollout} rollouts"
        raise UsageError(f"--on {given.on}: {what} there.")
    done, data = found
    name = f"the evaluation after {done} rollouts of {given.on}: {', '.join(data)}"
    material = Material(name, [], rollout_id=max(done - 1, 0), recorded=True)
    return Trial(hook, args, material, call, thorough=True, evaluations=data)


# Plug points that judge a sample by itself; others get its whole group.
_BY_SAMPLE = ("custom_rm", "custom_loss_function", "custom_tis_function", "custom_pg_loss_reducer_function")


def with_sample(material: Material, index: int, point: PlugPoint) -> Material:
    """The material cut down to the sample `index` or to its group. Raises UsageError where there is none."""
    for group in material.groups:
        for sample in group:
            if sample.index == index:
                kept = [sample] if point.name in _BY_SAMPLE else group
                what = f"sample {index}" if len(kept) == 1 else f"the group of sample {index}"
                return replace(material, name=f"{what} of {material.name}", groups=[copy.deepcopy(kept)])
    indices = [s.index for group in material.groups for s in group if s.index is not None]
    raise UsageError(
        f"--sample {index}: {material.name} has the samples {min(indices, default='-')} to {max(indices, default='-')}."
    )


def show(outcome: Outcome) -> None:
    print(f"result    {outcome.returned}")
    for line in outcome.details[:MAX_DETAILS]:
        print(f"          {line}")
    if len(outcome.details) > MAX_DETAILS:
        print(f"          ... and {len(outcome.details) - MAX_DETAILS} more")
    for warning in outcome.warnings:
        print(f"warning   {warning}")
