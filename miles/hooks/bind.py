"""From `args` to bound plug-ins: every plug point of a run is loaded, recognised and adapted once, before it starts.

`bind` collects all problems of all plug-ins into one HookReport. `extend_parser` comes earlier: it lets plug-ins add
flags of their own while the command line is still being read.
"""

from __future__ import annotations

import difflib
import inspect
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.errors import HookReport, MilesError
from miles.hooks.adapt import Callee, Mismatch, callee_of, is_async, recognise
from miles.hooks.adapters import adapt
from miles.hooks.call import Hook, RewardHook, RolloutHook
from miles.hooks.call_special import AgentHook, GenerateHook, ObjectHook, ReducerHook
from miles.hooks.catalog import CATALOG, plug_point_named
from miles.hooks.guard import Guard
from miles.hooks.load import load_function
from miles.hooks.patience import told_when_slow
from miles.hooks.point import Form, PlugPoint, Policy, parse_policy
from miles.hooks.problems import at_place, described, expected_forms, load_problem, problem
from miles.hooks.source import source_of
from miles.hooks.stats import Counts
from miles.hooks.threads import Threads
from miles.hooks.values import BadReturn

DEFAULT_ERROR_BUDGET = 0.05

_SPECIAL: dict[str, type[Hook]] = {
    "custom_generate_function": GenerateHook,
    "custom_rm": RewardHook,
    "data_source": ObjectHook,
    "custom_pg_loss_reducer_function": ReducerHook,
    "custom_agent_function": AgentHook,
}


class Hooks:
    """The bound plug-ins of one run, one attribute per plug point; None (or an empty tuple) where there is none.

    Example::

        hooks = bind(args, policies={"custom-rm": "drop"})
        hooks.set_bundle_dir("runs/x/failures")
        hooks.begin_rollout()
        value = await hooks.custom_rm.call_async(args, sample)
        hooks.stats()  # {"hooks/custom_rm/calls": 1, "hooks/custom_rm/failures": 0, ...}
    """

    rollout_function: RolloutHook | None
    eval_function: RolloutHook | None
    custom_generate_function: GenerateHook | None
    custom_rm: RewardHook | None
    dynamic_sampling_filter: Hook | None
    buffer_filter: Hook | None
    rollout_sample_filter: Hook | None
    rollout_all_samples_process: Hook | None
    rollout_data_postprocess: Hook | None
    custom_loss_function: Hook | None
    custom_tis_function: Hook | None
    custom_pg_loss_reducer_function: Hook | None
    custom_reward_post_process: Hook | None
    custom_convert_samples_to_train_data: Hook | None
    custom_rollout_log_function: Hook | None
    custom_eval_rollout_log_function: Hook | None
    data_source: ObjectHook | None
    custom_megatron_init: Hook | None
    custom_megatron_before_log_prob_hook: Hook | None
    custom_megatron_before_train_step_hook: Hook | None
    custom_megatron_post_save_hook: Hook | None
    custom_model_provider: Hook | None
    miles_router_middleware: tuple[Hook, ...]
    custom_agent_function: AgentHook | None
    generate_tool_specs: Hook | None
    generate_execute_tool_function: Hook | None

    def __init__(self, binder: Binder, bound: Mapping[str, list[Hook]]) -> None:
        self._binder = binder
        # Of plug-ins that no flag names: the key of their state. Saved state of those that are not bound yet.
        self._keys: dict[int, str] = {}
        self._waiting_state: dict[str, Any] = {}
        self._all: list[Hook] = [hook for hooks in bound.values() for hook in hooks]
        for name, point in CATALOG.items():
            hooks = bound.get(name, [])
            setattr(self, name, tuple(hooks) if point.plural else hooks[0] if hooks else None)

    def __iter__(self) -> Iterator[Hook]:
        """Every bound plug-in, in the order of the catalogue."""
        return iter(self._all)

    def bind_path(self, name: str, path: str) -> Hook:
        """One more plug-in for plug point `name`, under the policies of this run. Raises HookReport.

        A run that resumes hands it the state that was saved of it, as `load_state_dict` does.
        """
        hook = self._binder.require(CATALOG[name], path)
        self._all.append(hook)
        self._keys[id(hook)] = f"{name} {path}"
        if self._waiting_state.get(self._key(hook)) is not None:
            hook.load_state(self._waiting_state.pop(self._key(hook)))
        return hook

    @property
    def guard(self) -> Guard:
        """Policies, error budget and bundles of this run."""
        return self._binder.guard

    @property
    def timeout_s(self) -> float | None:
        """Seconds that one call may take; None without a limit."""
        return self._binder.timeout_s

    def set_bundle_dir(self, path: str | Path | None) -> None:
        """Where failed calls are kept for `miles replay` (the run directory's `failures`); None keeps none."""
        self._binder.guard.bundle_dir = Path(path) if path is not None else None

    def begin_rollout(self) -> None:
        """Start counting anew against the error budget, and for the metrics of a rollout."""
        self.guard.over = None
        for hook in self._all:
            hook.stats.begin_rollout()

    def reject(self, message: str, *names: str) -> None:
        """Raise HookError where the user's own plug-ins among `names` may have made what `message` complains of.

        The first of them that is bound gets the card; the others are named in it. Returns where none is bound.
        """
        bound = [hook for name in names if (hook := getattr(self, name)) is not None and not hook.is_built_in]
        if not bound:
            return
        replaces_all = bound[0].point.name == "custom_convert_samples_to_train_data"
        others = "" if replaces_all else ", ".join(hook.point.flag for hook in bound[1:])
        bound[0].reject(BadReturn("type", message, f"the samples went through {others}, too" if others else ""))

    def stats(self) -> dict[str, float]:
        """`hooks/<name>/{calls,failures,p50_s,p95_s,max_s,total_s}` since the run began, for plug-ins that were called.

        Several plug-ins of one plug point count together.
        """
        return self._metrics(lambda hook: hook.stats.run)

    def rollout_stats(self) -> dict[str, float]:
        """The same since `begin_rollout`."""
        return self._metrics(lambda hook: hook.stats.rollout)

    def _metrics(self, counts_of: Callable[[Hook], Counts]) -> dict[str, float]:
        by_name: dict[str, Counts] = {}
        for hook in self._all:
            by_name.setdefault(hook.point.name, Counts()).merge(counts_of(hook))
        metrics: dict[str, float] = {}
        for name, counts in by_name.items():
            if counts.calls:
                metrics |= counts.metrics(f"hooks/{name}")
        return metrics

    def sources(self) -> dict[str, dict[str, Any]]:
        """Per flag: path, file, line, sha256 of the file, form. Several plug-ins of one flag are numbered from 0."""
        record: dict[str, dict[str, Any]] = {}
        for hook in self._all:
            flag = hook.point.flag
            if hook.point.plural:
                flag += f"[{sum(key.startswith(flag) for key in record)}]"
            source = hook.source
            record.setdefault(
                flag,
                {
                    "path": hook.path,
                    "file": source.file,
                    "line": source.line,
                    "sha256": source.sha256,
                    "form": hook.form,
                },
            )
        return record

    def state_dict(self) -> dict[str, Any]:
        """The state of every plug-in that is a class or an object with `state_dict`, by plug point.

        A further plug-in of a plug point (`bind_path`) has the key `<plug point> <path>`. Raises HookError where one of
        them fails.
        """
        saved = {self._key(hook): hook.save_state() for hook in self._all if hook.has_state}
        return {**self._waiting_state, **saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every plug-in its state back. Rollout classes and the data source must be built before.

        Raises HookReport where a saved state has no plug-in to go to, HookError where a plug-in fails on it.
        """
        hooks = {self._key(hook): hook for hook in self._all if hook.has_state}
        waiting = {key: value for key, value in state.items() if key not in hooks and " " in key}
        lost = [key for key in state if key not in hooks and key not in waiting]
        if lost:
            raise HookReport(
                [
                    f"{CATALOG[n].flag if n in CATALOG else n}\n  found     saved state in the checkpoint, but no "
                    "plug-in with load_state_dict\n  remedy    give the plug-in that the run was saved with"
                    for n in lost
                ]
            )
        self._waiting_state = waiting
        for key, hook in hooks.items():
            if key in state:
                hook.load_state(state[key])

    def _key(self, hook: Hook) -> str:
        """What a checkpoint calls the state of `hook`. Middlewares are numbered from the second on."""
        known = self._keys.get(id(hook))
        if known is not None:
            return known
        same = [h for h in self._all if h.point is hook.point and id(h) not in self._keys]
        number = next(i for i, h in enumerate(same) if h is hook)
        return f"{hook.point.name}[{number}]" if number else hook.point.name


class Binder:
    """Binds single paths under the settings of one run, and keeps the problems it meets."""

    def __init__(
        self,
        args: Namespace,
        policies: Mapping[str, Policy],
        forms: Mapping[str, str],
        timeout_s: float | None,
        guard: Guard,
        threads: Threads | None,
    ) -> None:
        self.args, self.policies, self.forms, self.timeout_s = args, policies, forms, timeout_s
        self.guard, self.threads = guard, threads
        self.problems: list[str] = []

    def take_problems(self) -> list[str]:
        problems, self.problems = self.problems, []
        return problems

    def require(self, point: PlugPoint, path: str) -> Hook:
        """`bind_one`, but problems are raised as a HookReport."""
        hook = self.bind_one(point, path)
        if hook is None:
            raise HookReport(self.take_problems())
        return hook

    def bind_one(self, point: PlugPoint, path: str) -> Hook | None:
        """None where there is a problem."""
        try:
            loaded = load_function(path)
        except (Exception, SystemExit) as error:
            self.problems.append(load_problem(point, path, error))
            return None
        before = len(self.problems)
        obj = self._instantiated(point, path, loaded)
        if len(self.problems) > before:
            return None
        callee = callee_of(obj, getattr(loaded, "__qualname__", path.replace(":", ".").rpartition(".")[2]))
        try:
            form = recognise(point, callee, self.forms.get(point.name))
        except Mismatch as mismatch:
            self.problems.append(
                problem(point, path, mismatch.found, expected=expected_forms(point), remedy=mismatch.remedy)
            )
            return None
        wrong = _wrong_kind(point, callee, form)
        if wrong is not None:
            found, remedy = wrong
            self.problems.append(problem(point, path, found, expected=expected_forms(point), remedy=remedy))
            return None
        return self._hook(point, path, loaded, callee, form)

    def _instantiated(self, point: PlugPoint, path: str, loaded: Any) -> Any:
        """The object that takes the calls: of a class that is to be instantiated, an instance."""
        if not (point.instantiates and inspect.isclass(loaded)) or hasattr(loaded, "__await__"):
            return loaded
        try:
            signature = inspect.signature(loaded)
            signature.bind()
        except (TypeError, ValueError) as error:
            self.problems.append(
                problem(
                    point, path,
                    f"{described(loaded, loaded.__qualname__)}, which cannot be made without arguments: {error}",
                    expected="a class whose __init__ needs no arguments",
                    remedy="give the parameters defaults; settings arrive in `args` with each call",
                )
            )  # fmt: skip
            return None
        try:
            with told_when_slow(f"making an object of {point.flag} {path}"):
                return loaded()
        except (Exception, SystemExit) as error:
            found = f"making an object of the class raised {at_place(error, source_of(loaded).file)}"
            self.problems.append(problem(point, path, found, remedy="mend that line"))
            return None

    def _hook(self, point: PlugPoint, path: str, loaded: Any, callee: Callee, form: Form) -> Hook:
        adapted, policy = adapt(point, callee, form, self.threads), self.policies.get(point.name, Policy())
        given = (
            point, path, loaded, form.name, source_of(loaded), adapted, self.guard, policy, self.timeout_s,
        )  # fmt: skip
        if point.may_be_async:
            return RolloutHook(*given, threads=self.threads)
        hook = _SPECIAL.get(point.name, Hook)(*given)
        if not callee.is_class:
            hook.state_holder = callee.obj.__self__ if inspect.ismethod(callee.obj) else callee.obj
        hook.in_thread = point.awaited and not is_async(callee.obj)
        return hook


def _wrong_kind(point: PlugPoint, callee: Callee, form: Form) -> tuple[str, str] | None:
    """What a fitting signature does not say: async where the core cannot await, methods that a class lacks."""
    what = described(callee.obj, callee.name)
    if not (point.awaited or point.may_be_async) and is_async(callee.obj) and not callee.is_class:
        return f"{what}, which is async; this plug point is called synchronously", "write `def` instead of `async def`"
    cls = callee.obj if callee.is_class else type(callee.obj)
    missing = [m for m in point.methods if callee.is_class and not callable(getattr(cls, m, None))]
    if missing:
        return f"{what}, without {', '.join(missing)}", f"add the method{'s' if len(missing) > 1 else ''}"
    for name in point.methods if callee.is_class else ():
        method = inspect.getattr_static(cls, name)
        if not inspect.isfunction(method):
            continue
        if inspect.iscoroutinefunction(method):
            return f"{what}, whose {name} is async; it is called synchronously", f"write `def {name}`"
        try:
            inspect.signature(method).bind(None, None)
        except TypeError as error:
            return f"{what}, whose {name} cannot take one argument: {error}", f"make it `def {name}(self, ...)`"
    if point.may_be_async and callee.is_class:
        call = next((vars(k)["__call__"] for k in cls.__mro__ if "__call__" in vars(k)), None)
        if call is None:
            return f"{what}, without __call__", "add `def __call__(self, input)`"
        try:
            inspect.signature(call).bind(None, None)
        except TypeError as error:
            return f"{what}, whose __call__ cannot take one input: {error}", "make it `def __call__(self, input)`"
    has_state = callable(getattr(cls, "state_dict", None)) and not inspect.isroutine(callee.obj)
    if has_state and not callable(getattr(cls, "load_state_dict", None)):
        return f"{what}, with state_dict but without load_state_dict", "add load_state_dict(state)"
    return None


def bind(
    args: Namespace,
    policies: Mapping[str, str] | None = None,
    forms: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    error_budget: float = DEFAULT_ERROR_BUDGET,
    *,
    threads: Threads | None = None,
) -> Hooks:
    """Load, recognise and adapt every plug point that `args` names. Raises HookReport with all problems.

    `policies` and `forms` are keyed by plug point (`custom-rm`, `--custom-rm-path` or `custom_rm`). `timeout_s` limits
    one call (0 or None: no limit); those that do not await are interrupted by a `watchdog.Watchdog` alone. `threads`
    run the synchronous plug-ins of awaited plug points; a pool of their own by default.
    """
    problems: list[str] = []
    known_policies = {p.name: _policy(p, text, problems) for p, text in _known("--hook-policy", policies, problems)}
    known_forms = {p.name: text for p, text in _known("--hook-form", forms, problems)}
    binder = Binder(args, known_policies, known_forms, timeout_s or None, Guard(error_budget), threads or Threads())
    bound: dict[str, list[Hook]] = {}
    for point, path in paths_of(args):
        hook = binder.bind_one(point, path)
        if hook is not None:
            bound.setdefault(point.name, []).append(hook)
        elif point.name == "eval_function" and vars(args).get(point.dest) is None and "rollout_function" not in bound:
            binder.problems.pop()  # said of the flag that was given
    problems += binder.take_problems()
    if problems:
        raise HookReport(list(dict.fromkeys(problems)))
    return Hooks(binder, bound)


def paths_of(args: Namespace) -> list[tuple[PlugPoint, str]]:
    """The plug points that `args` names, with their paths. Evaluation falls back to the rollout function."""
    settings = vars(args)
    found: list[tuple[PlugPoint, str]] = []
    for point in CATALOG.values():
        given = settings.get(point.dest)
        if given is None and point.name == "eval_function":
            given = settings.get(CATALOG["rollout_function"].dest)
        found += [(point, path) for path in _as_list(given, point)]
    return found


def _as_list(given: str | Sequence[str] | None, point: PlugPoint) -> list[str]:
    """The paths; an empty text is none where several may be given (a published default), and a mistake elsewhere."""
    if given is None or (point.plural and not given):
        return []
    return [given] if isinstance(given, str) else list(given)


def _known(flag: str, given: Mapping[str, str] | None, problems: list[str]) -> list[tuple[PlugPoint, str]]:
    """The entries of a `--hook-*` flag by plug point; a name that is none is a problem."""
    found = []
    for name, value in (given or {}).items():
        point = plug_point_named(name)
        if point is not None:
            found.append((point, value))
            continue
        keys = [p.key for p in CATALOG.values()]
        close = difflib.get_close_matches(name.strip().lstrip("-"), keys, n=1)
        remedy = f"did you mean {close[0]}?" if close else "`miles hooks` lists them"
        problems.append(f"{flag} {name}={value}\n  found     no plug point {name!r}\n  remedy    {remedy}")
    return found


def _policy(point: PlugPoint, text: str, problems: list[str]) -> Policy:
    try:
        return parse_policy(text, point)
    except ValueError as error:
        problems.append(f"--hook-policy {point.key}={text}\n  found     {error}\n  remedy    choose one of these")
        return Policy()


def extend_parser(parser: ArgumentParser, paths: Namespace | Mapping[str, str | Sequence[str] | None]) -> None:
    """Let every plug-in that has a callable `add_arguments` add its flags. `paths`: `args`, or its entries.

    Rollout and generate functions come first, as published. What cannot be loaded is skipped: `bind` reports it. May
    run more than once per process, each time on a fresh parser. Raises HookReport where `add_arguments` itself fails.
    """
    first = ("rollout_function", "custom_generate_function")
    points = [CATALOG[name] for name in first] + [p for n, p in CATALOG.items() if n not in first]
    given: Mapping[str, Any] = vars(paths) if isinstance(paths, Namespace) else paths
    done: list[Any] = []
    for point in points:
        for path in _as_list(given.get(point.dest), point):
            try:
                obj = load_function(path)
            except (Exception, SystemExit):
                continue
            add = getattr(obj, "add_arguments", None)
            if not callable(add) or any(obj is seen for seen in done):
                continue
            done.append(obj)
            try:
                add(parser)
            except MilesError:
                raise
            except (Exception, SystemExit) as error:
                found = f"its add_arguments raised {at_place(error, source_of(obj).file)}"
                raise HookReport([problem(point, path, found, remedy="a flag must have a name of its own")]) from error
