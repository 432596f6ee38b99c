"""The command line. Parses first and imports heavy things after: `--help`, `hooks` and `check` never load torch.

miles train    train; also `python train.py`           miles new      write a plug-in skeleton with its test
miles check    load and bind every plug-in, no run     miles replay   run a failed plug-in call again
miles hooks    the plug points and their signatures    miles serve    the embedded engine as a server
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from miles import __version__
from miles.errors import MilesError, UsageError

# Command -> (module, function, one line of help). The function takes the remaining arguments, returns the exit status.
COMMANDS = {
    "train": ("miles.run.train", "main", "train a model (miles train --help)"),
    "check": ("miles.run.check", "main", "load and bind every plug-in of a run, without starting it"),
    "hooks": ("miles.hooks.check", "list_main", "list the plug points, or show one with its signature"),
    "new": ("miles.hooks.new", "new_main", "write a plug-in skeleton and a passing test for it"),
    "replay": ("miles.hooks.replay", "replay_main", "run a failed plug-in call again from its bundle"),
    "serve": ("miles.engine.embedded.server", "main", "serve a model over SGLang's HTTP API"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0 done, 1 failed, 2 wrong usage, 130 stopped by the user."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"miles {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    # Plug-ins are named relative to where the command is run, as with `python script.py`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if command not in COMMANDS:
            raise UsageError(f"miles {command}: there is no such command.\n\n{usage()}")
        module, function, _ = COMMANDS[command]
        return int(getattr(importlib.import_module(module), function)(rest))
    except MilesError as error:
        print(f"miles: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `miles hooks | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def usage() -> str:
    lines = [f"  {name:<8} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(["usage: miles COMMAND [flags]", "", *lines, "", "First steps: make quickstart, then README.md."])


if __name__ == "__main__":
    sys.exit(main())
