"""Groups of ranks for the tests of this folder, each started once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_programs import run_ranks

from miles.trainer.ranks import Ranks


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two and four ranks have left a trace of every case, and everybody a checkpoint."""
    from parallel_cases import keep, make_model, save

    folder = tmp_path_factory.mktemp("layouts")
    for tied in (True, False):
        for seed in (0, 1):
            make_model(folder, tied=tied, seed=seed)
    torch.set_num_threads(1)
    keep(save(folder, Ranks.alone()), folder / "saved by 1.pt", 0)
    for size in (2, 4):
        run_ranks(Path(__file__).with_name("parallel_cases.py"), size, folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
