"""`miles check` and `miles hooks`, as far as they take the flags of a run: everything that can be found wrong with its
plug-ins without starting anything.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from miles.config import RunSettings, parse
from miles.errors import FlagError, HookReport
from miles.hooks import CATALOG, Hook, bind, plug_point_named
from miles.hooks.bind import paths_of
from miles.hooks.check import bound_main, bound_table, list_main
from miles.trial.caller import InPlace
from miles.trial.check import LIMIT_S, check_hooks
from miles.trial.material import made_up, recorded
from miles.trial.recorded import require_record


def main(argv: Sequence[str]) -> int:
    """`miles check FLAGS`. 0 where the run could start, 2 with a report of all problems; `--strict` counts warnings."""
    if any(word in ("-h", "--help") for word in argv):
        _parser().print_help()
        return 0
    given, rest = _parser().parse_known_args(list(argv))
    if given.rollout is not None and given.on is None:
        raise FlagError("--rollout", given="belongs to --on, which names the run.")
    if given.limit_s <= 0:
        raise FlagError("--limit-s", given=given.limit_s, expected="a number of seconds > 0")
    config, args = parse(_with_recorded_flags(rest, given.on))
    hooks, problems = _bound(config.run, args)
    material = recorded(given.on, given.rollout) if given.on is not None else made_up(args)
    checked = check_hooks(hooks, args, material, limit_s=given.limit_s)
    if not problems:
        print("\n".join([*(f"note: {notice}" for notice in config.notices), checked.table()]))
        print("".join(f"warning: {warning}\n" for warning in checked.warnings), end="")
    if problems or checked.problems:
        sys.stdout.flush()
        report = HookReport([*problems, *checked.problems])
        if checked.num_stopped and _has_threads():
            print(f"miles: {report}", file=sys.stderr, flush=True)
            os._exit(report.exit_status)  # Python would wait for them
        raise report
    print(checked.closing())
    return 2 if given.strict and checked.warnings else 0


def _has_threads() -> bool:
    """Whether threads of plug-ins are left that Python waits for when it ends."""
    return any(not t.daemon and t is not threading.main_thread() for t in threading.enumerate())


def _bound(run: RunSettings, args: Namespace) -> tuple[Iterable[Hook], list[str]]:
    """The plug-ins of the run and [], or those that bind by themselves and what is wrong with the others."""
    try:
        return bind(args, run.hook_policy, run.hook_form, threads=InPlace()), []
    except HookReport as report:
        return list(_binding_alone(run, args)), report.problems


def _binding_alone(run: RunSettings, args: Namespace) -> Iterator[Hook]:
    for point, path in paths_of(args):
        own = {name: form for name, form in run.hook_form.items() if plug_point_named(name) is point}
        with contextlib.suppress(HookReport):
            alone = bind(Namespace(**{point.dest: [path] if point.plural else path}), {}, own, threads=InPlace())
            yield from (hook for hook in alone if hook.point is point)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles check",
        usage="miles check FLAGS OF THE RUN [--on RUN_DIR [--rollout N]] [--strict] [--limit-s SECONDS]",
        description="Load, bind and call the plug-ins of a run without starting it. Takes every flag of `miles train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--on", metavar="RUN_DIR", help="call them on a recorded rollout instead of made-up samples")
    parser.add_argument("--rollout", type=int, metavar="N", help="which one of that run; the newest by default")
    parser.add_argument("--strict", action="store_true", help="warnings make the exit status 2, too")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, metavar="SECONDS", help="longest call (%(default)s)")
    return parser


def _with_recorded_flags(flags: list[str], run_dir: str | None) -> list[str]:
    """The flags of the recorded run below those that are given, where these do not name a model themselves."""
    names = {word.partition("=")[0] for word in flags}
    if run_dir is None or names & {"--config", "--hf-checkpoint"}:
        return flags
    require_record(run_dir)
    return ["--config", str(Path(run_dir) / "config.yaml"), *flags]


# ---- miles hooks ---------------------------------------------------------------------------------------------------


def hooks_main(argv: Sequence[str]) -> int:
    """`miles hooks`: the catalogue; with plug-ins (flags or `--config`) the form that was chosen for each."""
    words = [word.partition("=")[0] for word in argv]
    if "--config" in words:
        return bound_main(*parse(list(argv)))
    paths = {point.flag for point in CATALOG.values()}
    if any(word in paths and _has_value(argv, i) for i, word in enumerate(words)):
        return _show_bound(argv)
    return list_main(argv)


def _has_value(argv: Sequence[str], position: int) -> bool:
    following = argv[position + 1 : position + 2]
    return "=" in argv[position] or bool(following and not following[0].startswith("--"))


def _show_bound(argv: Sequence[str]) -> int:
    """Plug-ins by themselves, without the other flags of a run."""
    parser = argparse.ArgumentParser(prog="miles hooks", allow_abbrev=False)
    for point in CATALOG.values():
        parser.add_argument(point.flag, dest=point.dest, nargs=point.nargs, default=None)
    parser.add_argument("--hook-form", nargs="+", action="extend", default=[], metavar="NAME=FORM")
    given = vars(parser.parse_args(list(argv)))
    forms = dict(entry.partition("=")[::2] for entry in given.pop("hook_form"))
    args = Namespace(**given)
    print(bound_table(bind(args, {}, forms), args))
    return 0
