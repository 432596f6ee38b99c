"""For all tests: signals as a terminal delivers them, and logging that no run decides for the tests after it.

A shell that starts the tests in the background has them ignore SIGINT, and every process they start inherits that.
A run sets up logging once per process, and these processes see many runs; handlers of libraries write to the standard
error of the test that imported them, which is closed in the next.
"""

from __future__ import annotations

import logging
import signal

from miles.observe.logging import configure_logger

configure_logger(level=logging.WARNING)
logging.raiseExceptions = False
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
