"""Responses that were cut off are not trained, but still count as wrong in the statistics of their group.

    miles train --config examples/quickstart/carry.yaml \
        --rollout-sample-filter-path examples/plug_ins/rollout_sample_filter.py:leave_out_cut_off

The reward 0 of a response that ran out of tokens says nothing about its reasoning (overlong filtering in DAPO,
arXiv:2503.14476). With `remove_sample` its loss mask becomes zero; the advantages of the others do not change.
"""

from __future__ import annotations

from argparse import Namespace

from miles.types import Sample


def leave_out_cut_off(args: Namespace, samples: list[list[Sample]]) -> None:
    for group in samples:
        for sample in group:
            sample.remove_sample = sample.status == Sample.Status.TRUNCATED
