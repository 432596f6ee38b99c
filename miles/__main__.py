"""The command line. Parses first and imports heavy things after: `--help`, `hooks` and `check` never load torch.

miles train    train; also `python train.py`           miles new      write a plug-in that works, and its test
miles check    load and try every plug-in, no run      miles replay   a plug-in on a recorded rollout
miles hooks    the plug points and their signatures    miles serve    the embedded engine as a server
                                                       miles route    one address in front of several engines
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from miles import __version__
from miles.errors import MilesError, UsageError

# Command -> (module, function, one line of help). The function takes the remaining arguments, returns the exit status.
COMMANDS = {
    "train": ("miles.run.train", "main", "train a model (miles train --help)"),
    "check": ("miles.run.check", "main", "load, bind and try every plug-in of a run, without starting it"),
    "hooks": ("miles.run.check", "hooks_main", "list the plug points, or the forms that plug-ins were bound as"),
    "new": ("miles.hooks.new", "new_main", "write a plug-in that works and a passing test for it"),
    "replay": ("miles.trial.replay", "main", "run a plug-in on a recorded rollout, or a failed call again"),
    "route": ("miles.router.serve", "main", "one address in front of several engines"),
    "serve": ("miles.engine.embedded.command", "main", "serve a model over SGLang's HTTP API"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0 done, 1 failed, 2 wrong usage, 130 stopped by the user."""
    try:
        try:
            return run(list(sys.argv[1:] if argv is None else argv))
        finally:
            flush_stdout()
    except MilesError as error:
        print(f"miles: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("miles: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `miles hooks | head`
        forget_stdout()
        return 0
    except OSError as error:
        if can_print():
            raise
        forget_stdout()
        print(f"miles: standard output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def run(arguments: list[str]) -> int:
    """The command that `arguments` name. Raises UsageError where there is none."""
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"miles {__version__}")
        return 0
    if not arguments:
        raise UsageError(f"no command is given.\n\n{usage()}")
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean miles {close[0]}?" if close else ""
        raise UsageError(f"{command!r} is no command.{hint}\n\n{usage()}")
    # Plug-ins are named relative to where the command is run, as with `python script.py`.
    if working_directory() not in sys.path:
        sys.path.insert(0, working_directory())
    module, function, _ = COMMANDS[command]
    return int(getattr(importlib.import_module(module), function)(rest))


def working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the working directory does not exist any more. Change into another one.") from error


def flush_stdout() -> None:
    """Write what is still buffered while an error can still be told. Raises OSError."""
    if sys.stdout is not None and not sys.stdout.closed:  # both: without a standard output from the start
        sys.stdout.flush()


def can_print() -> bool:
    """Whether standard output takes another line: an error of its own looks like that of any other file."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def forget_stdout() -> None:
    """Let what is still buffered go nowhere, so that Python does not complain about it when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage() -> str:
    lines = [f"  {name:<8} {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(["usage: miles COMMAND [flags]", "", *lines, "", "First steps: make quickstart, then README.md."])


if __name__ == "__main__":
    sys.exit(main())
