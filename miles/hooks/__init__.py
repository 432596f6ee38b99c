"""Plug points: places where a run calls functions of the user's, named on the command line.

    point       what a plug point, an accepted form and a failure policy are
    catalog     the plug points themselves, each declared once
    load        a path -> the object it names
    adapt       an object -> which form it has; adapters: what the form means at the call site
    bind        all plug-ins of a run at once, with one report of all problems
    call        the one door: timing, policies, cards; guard, card, codec: what happens to a failed call
    watchdog    calls that do not come back: limits, threads, frozen: how each kind of them is ended
    check, replay, new    the commands `miles check`, `miles hooks`, `miles replay`, `miles new`

Nothing here imports torch. A plug-in may.
"""

from miles.hooks.bind import Hooks, bind, extend_parser
from miles.hooks.call import Hook, RewardHook, RolloutHook
from miles.hooks.call_special import ObjectHook
from miles.hooks.catalog import CATALOG, plug_point_named
from miles.hooks.load import FunctionRegistry, function_registry, load_function
from miles.hooks.point import Form, PlugPoint, Policy, Tell, parse_policy
from miles.hooks.stats import HookStats

__all__ = [
    "CATALOG",
    "Form",
    "FunctionRegistry",
    "Hook",
    "HookStats",
    "Hooks",
    "ObjectHook",
    "PlugPoint",
    "Policy",
    "RewardHook",
    "RolloutHook",
    "Tell",
    "bind",
    "extend_parser",
    "function_registry",
    "load_function",
    "parse_policy",
    "plug_point_named",
]
