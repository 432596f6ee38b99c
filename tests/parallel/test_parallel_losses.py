"""Losses over vocabularies and samples that are cut over ranks: values, metrics and gradients are those of one
process."""

from __future__ import annotations

import functools
from pathlib import Path

import loss_cases
import pytest
import torch
from loss_cases import CASES, LAYOUTS, VOCABULARY, Result
from rank_programs import run_ranks

# In bfloat16 each rank rounds its part of the gradient.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    for size in (2, 4):
        run_ranks(Path(loss_cases.__file__), size, folder)
    return folder


@functools.cache
def one_process(name: str) -> Result:
    return loss_cases.run(name, None)


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, c in CASES.items() for layout in c.layouts])
def test_every_layout_gives_what_one_process_gives(name: str, layout: str, results: Path) -> None:
    got, want = Result(**torch.load(results / f"{layout} {name}.pt")), one_process(name)
    bound = BOUNDS[CASES[name].dtype]
    values = dict(want.values)
    if "parts" in values:  # a number that every rank reports as its part
        values["parts"] = values["parts"] * LAYOUTS[layout][1]
    assert got.values.keys() == values.keys()
    for key, value in values.items():
        torch.testing.assert_close(got.values[key], value, rtol=bound, atol=bound, msg=lambda m, k=key: f"{k}: {m}")
    assert got.weight is not None and want.weight is not None
    torch.testing.assert_close(got.hidden, want.hidden, rtol=bound, atol=bound)
    torch.testing.assert_close(got.weight[:VOCABULARY], want.weight[:VOCABULARY], rtol=bound, atol=bound)
    assert not got.weight[VOCABULARY:].any(), "rows that are no token have no gradient"


@pytest.mark.parametrize("name", [name for name in CASES if name != "no token"])
def test_the_comparison_is_of_something(name: str) -> None:
    want = one_process(name)
    assert want.hidden is not None and want.hidden.any()


def test_every_kind_of_token_is_there() -> None:
    """Clipped and unclipped ones, rejected and kept ones, sequences that are masked out and others."""
    measured = {name: one_process(name).values for name in CASES if "pg_loss" in one_process(name).values}
    assert 0 < measured["ppo"]["pg_clipfrac"] < 4 and 0 < measured["opsm"]["opsm_clipfrac"] < 4
    assert 0 < measured["mis"]["mis_rejected"] < 4 and 0 < measured["mis"]["mis_vetoed"] < 4
    assert 0 < measured["icepop as a plug-in"]["tis_clipfrac"] < 4
    changed = [measured[name]["pg_loss"] for name in ("ppo", "dual clip", "tis", "icepop as a plug-in", "a reducer")]
    assert len({float(value) for value in changed}) == len(changed)


@pytest.mark.parametrize("layout", ["cp2", "cp4", "tp2 cp2"])
def test_ranks_that_report_other_metrics(layout: str, results: Path) -> None:
    tensor, context = LAYOUTS[layout]
    for rank in range(tensor * context):
        text = (results / f"{layout} error of rank {rank}").read_text()
        assert "expected the same metrics in the same order from every context-parallel rank" in text
        assert f"this one returned of rank {rank // tensor}." in text


@pytest.mark.parametrize("layout", loss_cases.TENSOR)
def test_large_vocabularies_never_exist_as_a_whole(layout: str, results: Path) -> None:
    for rank in range(LAYOUTS[layout][0]):
        assert int((results / f"{layout} largest tensor of rank {rank}").read_text()) == 40 * 2000


@pytest.mark.parametrize("rank", [0, 1])
def test_samples_are_cut_as_megatron_cuts_them(rank: int, results: Path) -> None:
    ours, theirs = torch.load(results / f"cut by Megatron for {rank}.pt")
    assert ours == theirs and len(set(ours)) > 10
