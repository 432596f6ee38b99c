"""The last resort: C code of a plug-in keeps the interpreter, so that no Python of this process runs any more.

A regular expression that explodes does that. `faulthandler` has a timer in C, which prints the lines of all threads and
exits with status 1. It prints into a small process beside this one, which is this file run as a script: it turns the
lines into a message with the user's own, and does nothing in a run that ends otherwise.

    watchdog ── sets the timer anew, again and again ──► faulthandler ── lines of all threads ──► this file, as a script
"""

from __future__ import annotations

import faulthandler
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

# Threads that a message names.
_MAX_PLACES = 3


class FrozenAlarm:
    """Ends the process unless `postpone` is called every `seconds`; used as a context."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> FrozenAlarm:
        reading, self._writing = os.pipe()
        names = ("stdlib", "platstdlib", "purelib", "platlib")
        not_users = {os.path.realpath(sysconfig.get_path(name)) for name in names}
        not_users.add(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
        command = [sys.executable, "-I", "-S", __file__, f"{self.seconds:g}", *sorted(not_users)]
        # A session of its own: Ctrl-C is for the run alone.
        self._teller = subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL, start_new_session=True)
        os.close(reading)
        self.postpone()
        return self

    def postpone(self) -> None:
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self._writing)

    def suspend(self) -> None:
        """Until `postpone` is called."""
        faulthandler.cancel_dump_traceback_later()

    def __exit__(self, *error: object) -> None:
        self.suspend()
        self._teller.kill()
        self._teller.wait()
        os.close(self._writing)


def message(dump: str, seconds: float, not_users: list[str]) -> str:
    """What is told of a dump of faulthandler; the dump itself where no line in it is the user's."""
    places = list(dict.fromkeys(_places(dump, not_users)))[:_MAX_PLACES]
    if not places:
        return f"miles: no Python code has run for {seconds:g} s.\n{dump}"
    return (
        f"\nmiles: a plug-in has kept the Python interpreter for {seconds:g} s, far more than --hook-timeout-s, at "
        f"{', or at '.join(places)}\n"
        "  C code there does not release it: a regular expression that explodes, for example. Run it in a process of "
        "its own, with a time limit.\n"
        "  Nothing else could run, so the run has ended as if it had been killed: the last checkpoint is intact."
    )


def _places(dump: str, not_users: list[str]) -> Iterator[str]:
    """Of each thread the innermost line of the user's, as `file:line (in function)`."""
    for thread in dump.split("\n\n"):
        for file, line, function in re.findall(r'^  File "(.+)", line (\d+) in (.+)$', thread, re.MULTILINE):
            real = os.path.realpath(file)
            packaged = f"{os.sep}site-packages{os.sep}" in real or any(real.startswith(p + os.sep) for p in not_users)
            if not packaged and not file.startswith("<"):
                if function != "<module>":  # the script that has started the run waits
                    yield f"{file}:{line} (in {function})"
                break


def main() -> None:
    dump = sys.stdin.read()  # ends with the run
    if dump:
        print(message(dump, float(sys.argv[1]), sys.argv[2:]), file=sys.stderr)


if __name__ == "__main__":
    main()
