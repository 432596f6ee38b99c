"""`GET /metrics`: the router's counters in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from miles.router.balance import WorkerTable
from miles.router.forward import Forwarder

Row = tuple[str, float]


def prometheus(table: WorkerTable, forwarder: Forwarder) -> str:
    """Example: `miles_router_requests_total{status="200"} 5120`"""
    gate = forwarder.gate
    lines: list[str] = []

    def add(name: str, kind: str, text: str, rows: Iterable[Row]) -> None:
        lines.extend((f"# HELP miles_router_{name} {text}", f"# TYPE miles_router_{name} {kind}"))
        lines.extend(f"miles_router_{name}{labels} {value:g}" for labels, value in rows)

    def per_worker(facts: dict[str, int]) -> list[Row]:
        return [(f'{{worker="{url}"}}', facts.get(url, 0)) for url in table.counts]

    answers = [(f'{{status="{status}"}}', count) for status, count in sorted(forwarder.answers.items())]
    add("requests_total", "counter", "Requests that were answered; 499: the client hung up.", answers)
    add("retries_total", "counter", "Requests sent again to another worker.", [("", forwarder.retries)])
    add("in_flight", "gauge", "Requests on their way.", [("", gate.inside)])
    add("waiting", "gauge", "Requests in line for a connection.", [("", gate.waiting)])
    serving = [(f'{{worker="{url}"}}', float(table.may_serve(url))) for url in table.counts]
    add("worker_serving", "gauge", "1 where the worker gets requests.", serving)
    add("worker_in_flight", "gauge", "Requests at the worker.", per_worker(table.counts))
    add("worker_requests_total", "counter", "Requests sent to the worker.", per_worker(table.requests))
    add("worker_failures_in_a_row", "gauge", "Failed checks and requests since the last success.",
        per_worker(table.failures))  # fmt: skip
    return "\n".join(lines) + "\n"
