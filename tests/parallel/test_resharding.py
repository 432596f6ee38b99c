"""Checkpoints of any number of processes, loaded by any other: weights, moments and schedule are the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from parallel_cases import load
from safetensors import safe_open

from miles.errors import CheckpointError
from miles.trainer.ranks import Ranks

# Those that ran before a group of ranks have left the checkpoints that it loads.
LOADED_BY = {1: (1, 2, 4), 2: (1, 2), 4: (1, 2, 4)}


@pytest.mark.parametrize(("by", "source"), [(by, source) for by, sources in LOADED_BY.items() for source in sources])
def test_loading_gives_back_every_bit(source: int, by: int, layouts: Path) -> None:
    saved = torch.load(layouts / f"saved by {source}.pt")
    assert len(saved) > 40 and any(name.startswith("exp_avg_sq.") for name in saved) and saved["schedule"] == 3
    folder = layouts / f"from {source}"
    loaded = load(folder, layouts, Ranks.alone()) if by == 1 else torch.load(layouts / f"from {source} by {by}.pt")
    assert loaded.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []


@pytest.mark.parametrize("source", [2, 4])
def test_each_rank_writes_its_own_rows_and_no_pickle(source: int, layouts: Path) -> None:
    folder = layouts / f"from {source}"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}
    shards = sorted((folder / "model").iterdir())
    assert len(shards) == source
    rows = []
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            rows.append(file.get_slice("lm_head.weight").get_shape()[0])
    assert sum(rows) == 41 and max(rows) == -(-41 // source)


@pytest.mark.parametrize("shard", [0, 1, 3])
def test_a_shard_that_is_missing_is_missed(shard: int, layouts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(layouts / "from 4", tmp_path / "copy")
    sorted((copy / "model").iterdir())[shard].unlink()
    with pytest.raises(CheckpointError, match=r"are in none of its files|in the checkpoint"):
        load(copy, layouts, Ranks.alone())


def test_a_shard_that_is_cut_short_is_named(layouts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(layouts / "from 2", tmp_path / "copy")
    path = sorted((copy / "optimizer").iterdir())[1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="safetensors cannot be read"):
        load(copy, layouts, Ranks.alone())
