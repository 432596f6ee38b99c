"""The table of engines: how many requests each has, which of them may get the next one, and why others may not.

    serving       gets requests
    quarantined   failed `threshold` times in a row; comes back when it is healthy and current (`health`)
    stale         healthy, but does not report the weight version that the run has asked for

Requests go to the engine with the fewest in flight, ties to the one that was added first. Requests with the same
affinity key (a session, a prefix) go where the last one went, unless that engine has much more to do than the others.
The table opens no sockets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from typing import Any
from urllib.parse import urlsplit

AFFINITY_KEYS = 65536
"""Keys whose engine is remembered; the ones that were not used for longest are forgotten."""

MUCH_MORE = 16
"""An engine with so many requests more than the least loaded one, and ..."""

MUCH_MORE_RATIO = 1.5
"""... this many times as many, gets no request for the sake of affinity."""


class WorkerUrlError(ValueError):
    """An address that cannot be a worker's, with a sentence for the person who sent it."""


def worker_url(given: object) -> str:
    """The address as the table knows it, `http://host:port[/prefix]`. Raises WorkerUrlError.

    Example: `worker_url("http://10.0.0.7:30001/")` -> `"http://10.0.0.7:30001"`
    """
    if not isinstance(given, str):
        raise WorkerUrlError(f"url: expected a text such as http://10.0.0.7:30001, got {given!r:.100}.")
    text = given.strip()
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise WorkerUrlError(f"url: expected http://HOST:PORT, got {given!r:.200} ({error}).") from error
    if parts.scheme != "http":
        raise WorkerUrlError(
            f"url: expected http://HOST:PORT, got {given!r:.200}. Workers speak plain HTTP inside a cluster."
        )
    plain = text.isascii() and not any(c.isspace() or not c.isprintable() for c in text)
    if not parts.hostname or port == 0 or not plain or parts.query or parts.fragment or parts.username is not None:
        raise WorkerUrlError(f"url: expected http://HOST:PORT, got {given!r:.200}.")
    return text.rstrip("/")


class WorkerTable:
    """The engines by address. `counts`, `failures` and `dead` are published as attributes of MilesRouter.

    Example: `table.counts == {"http://127.0.0.1:30001": 12}` is twelve requests in flight at the only engine.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.failures: dict[str, int] = {}  # in a row
        self.dead: set[str] = set()
        self.stale: set[str] = set()
        self.versions: dict[str, str | None] = {}  # as last reported
        self.errors: dict[str, str] = {}  # the last one
        self.requests: dict[str, int] = {}  # since it was added
        self.required_version: str | None = None
        self._affinity: OrderedDict[bytes, str] = OrderedDict()

    def add(self, url: str) -> bool:
        """Whether it is new. A new engine gets requests at once, unless a weight version is asked for."""
        if url in self.counts:
            return False
        self.counts[url] = 0
        self.failures[url] = 0
        if self.required_version is not None:
            self.stale.add(url)
        return True

    def remove(self, url: str) -> bool:
        """Whether it was there. Requests that it has go on."""
        known = self.counts.pop(url, None) is not None
        for facts in (self.failures, self.versions, self.errors, self.requests):
            facts.pop(url, None)
        self.dead.discard(url)
        self.stale.discard(url)
        return known

    def may_serve(self, url: str) -> bool:
        return url in self.counts and url not in self.dead and url not in self.stale

    @property
    def serving(self) -> list[str]:
        return [url for url in self.counts if url not in self.dead and url not in self.stale]

    @property
    def held(self) -> list[str]:
        return [url for url in self.counts if url in self.dead or url in self.stale]

    def pick(self, key: bytes | None = None, *, tried: Container[str] = ()) -> str | None:
        """The engine of the next request, which now has one more in flight; None where no other one may serve."""
        best, least = None, 0
        dead, stale = self.dead, self.stale
        for url, count in self.counts.items():
            if (best is None or count < least) and url not in dead and url not in stale and url not in tried:
                best, least = url, count
        if best is None:
            return None
        if key is not None:
            best = self._by_affinity(key, best, least, tried)
        self.counts[best] += 1
        self.requests[best] = self.requests.get(best, 0) + 1
        return best

    def _by_affinity(self, key: bytes, best: str, least: int, tried: Container[str]) -> str:
        known = self._affinity.get(key)
        if known is not None and self.may_serve(known) and known not in tried:
            count = self.counts[known]
            if count <= least + MUCH_MORE or count <= least * MUCH_MORE_RATIO:
                best = known
        self._affinity[key] = best
        self._affinity.move_to_end(key)
        if len(self._affinity) > AFFINITY_KEYS:
            self._affinity.popitem(last=False)
        return best

    def finish(self, url: str) -> None:
        """One request less in flight. The engine may have been removed, or removed and added, in the meantime."""
        count = self.counts.get(url)
        if count:
            self.counts[url] = count - 1

    def succeeded(self, url: str) -> None:
        if self.failures.get(url):
            self.failures[url] = 0

    def failed(self, url: str, error: str, threshold: int) -> bool:
        """Count a failure; whether the engine is quarantined by it."""
        if url not in self.counts:
            return False
        self.errors[url] = error
        self.failures[url] = self.failures.get(url, 0) + 1
        if self.failures[url] < threshold or url in self.dead:
            return False
        self.dead.add(url)
        return True

    def readmit(self, url: str) -> None:
        self.dead.discard(url)
        self.stale.discard(url)
        self.failures[url] = 0

    def require(self, version: str) -> None:
        """From now on only engines that report `version` are given requests."""
        self.required_version = version
        self.stale = {url for url in self.counts if self.versions.get(url) != version}

    def expected_version(self) -> str | None:
        """What an engine has to report to come back: the version asked for, else the newest of the serving ones."""
        if self.required_version is not None:
            return self.required_version
        known = [version for url in self.serving if (version := self.versions.get(url)) is not None]
        if known and all(version.isdecimal() for version in known):
            return max(known, key=int)
        return max(known, key=known.count, default=None)

    def state(self, url: str) -> str:
        return "quarantined" if url in self.dead else "stale" if url in self.stale else "serving"

    def describe(self, url: str) -> dict[str, Any]:
        """One entry of `GET /workers`."""
        return {
            "url": url,
            "worker_type": "regular",
            "is_healthy": self.may_serve(url),
            "state": self.state(url),
            "in_flight": self.counts[url],
            "requests": self.requests.get(url, 0),
            "failures_in_a_row": self.failures.get(url, 0),
            "last_error": self.errors.get(url),
            "weight_version": self.versions.get(url),
        }
