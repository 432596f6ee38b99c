"""What the rollout code of this process reaches beside its `args`: the run's plug-ins and the way to the engines.

Published helpers (`GenerateState(args)`, `generate_and_rm(args, ...)`) receive nothing but `args`, so a run installs
its context here, once per process; outside a run (a notebook, a plug-in's own test) one is made from `args` on first
use.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field

from miles.engine.client import EngineClient, HttpEngineClient
from miles.hooks import CATALOG, Hook, Hooks, bind

BUILT_IN_REWARD = "miles.rollout.rm_hub.built_in_rm"


@dataclass
class RunContext:
    """The plug-ins and the engine client of one run.

    `seeds_each_sample` is true where the engine honours `sampling_seed` per request at no cost (the embedded one):
    then every sample carries a seed made of the run's seed and its own index, and a resumed run repeats itself.
    """

    hooks: Hooks
    client: EngineClient
    seeds_each_sample: bool = False
    # What the run has been told once and need not hear again.
    told: set[str] = field(default_factory=set)
    _extra: dict[tuple[str, str], Hook] = field(default_factory=dict)

    def hook(self, name: str, args: Namespace) -> Hook | None:
        """The plug-in that `args` names for plug point `name`: the run's own, or another that a plug-in has set."""
        path = vars(args).get(CATALOG[name].dest)
        return None if path is None else self.hook_for_path(name, path)

    def reward(self, args: Namespace) -> Hook:
        """`--custom-rm-path`, else the built-in rewards, which take the same door."""
        return self.hook("custom_rm", args) or self.hook_for_path("custom_rm", BUILT_IN_REWARD)

    def hook_for_path(self, name: str, path: str) -> Hook:
        bound: Hook | None = getattr(self.hooks, name)
        if bound is not None and bound.path == path:
            return bound
        key = (name, path)
        if key not in self._extra:
            self._extra[key] = self.hooks.bind_path(name, path)
        return self._extra[key]


_current: RunContext | None = None


def install(context: RunContext | None) -> None:
    """Make `context` the one of this process; None forgets it."""
    global _current
    _current = context


def installed() -> RunContext | None:
    """The context of the run in this process; None outside a run."""
    return _current


def current(args: Namespace) -> RunContext:
    """The installed context, else a fresh one: plug-ins from `args`, engines behind the router that `args` names."""
    global _current
    if _current is None:
        address = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
        _current = RunContext(hooks=bind(args), client=HttpEngineClient(address))
    return _current
