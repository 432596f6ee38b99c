"""Checkpoint folders: complete or absent, whatever happens in between."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.config import CheckpointConfig
from miles.errors import CheckpointError
from miles.run import resume


def meta(rollout_id: int) -> resume.Meta:
    return resume.new_meta(rollout_id, steps=2 * (rollout_id + 1), weight_version=rollout_id + 2, world_size=1, seed=7)


def save(root: Path, rollout_id: int, text: str = "weights") -> Path:
    return resume.write(root, meta(rollout_id), lambda f: _write(f / "model.txt", text), lambda: None)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def test_latest_is_found_and_older_stays(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save(tmp_path, 9)
    found = resume.find(str(tmp_path))
    assert found is not None
    assert (found.folder.name, found.meta.next_rollout_id, found.meta.weight_version) == ("iter_0000010", 10, 11)
    assert (tmp_path / "iter_0000005" / "model.txt").exists()


@pytest.mark.parametrize("fails_in", ["model", "rollout"])
def test_a_save_that_fails_leaves_the_previous_one(tmp_path: Path, fails_in: str) -> None:
    save(tmp_path, 4)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        resume.write(
            tmp_path,
            meta(9),
            fail if fails_in == "model" else lambda f: _write(f / "model.txt", "half"),
            fail if fails_in == "rollout" else lambda: None,
        )
    found = resume.find(str(tmp_path))
    assert found is not None and found.meta.rollout_id == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", resume.TRACKER]


def test_saving_the_same_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4, "old")
    folder = save(tmp_path, 4, "new")
    assert (folder / "model.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", resume.TRACKER]


def test_what_a_crash_left_goes_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 4)
    (tmp_path / ".iter_0000010.4711").mkdir()
    (tmp_path / ".iter_0000010.4711" / "model.txt").write_text("half")
    save(tmp_path, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", "iter_0000010", resume.TRACKER]


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Saving an iteration anew first moves the old folder away; killed there, the old one is found again."""
    folder = save(tmp_path, 4, "old")
    folder.rename(tmp_path / ".iter_0000005.outdated")
    found = resume.find(str(tmp_path))
    assert found is not None and (found.folder / "model.txt").read_text() == "old"


def test_nothing_there_yet_is_no_error(tmp_path: Path) -> None:
    assert resume.find(None) is None
    assert resume.find(str(tmp_path / "absent"), str(tmp_path / "absent")) is None


def test_a_folder_without_a_checkpoint_is_a_mistake_where_nothing_is_saved_to_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--load .*absent: .*there is no such folder.*leave out --load"):
        resume.find(str(tmp_path / "absent"), str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"it has no latest_checkpointed_iteration.txt"):
        resume.find(str(tmp_path))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda root: (root / resume.TRACKER).write_text("latest\n"), "expected the number of a checkpoint"),
        (lambda root: (root / resume.TRACKER).write_text("77\n"), "iter_0000077/meta.json does not exist"),
        (lambda root: (root / "iter_0000005" / "meta.json").write_text("{"), "meta.json is damaged"),
    ],
)
def test_damage_is_named(tmp_path: Path, break_it: object, says: str) -> None:
    save(tmp_path, 4)
    break_it(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=says):
        resume.find(str(tmp_path))


def test_random_generators_come_back(tmp_path: Path) -> None:
    resume.seed_everything(3)
    random.gauss(0, 1), np.random.normal(), torch.randn(3)
    folder = save(tmp_path, 0)
    expected = (random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist())
    resume.seed_everything(99)
    resume.restore_rng(folder)
    assert (random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist()) == expected


def test_a_critic_that_is_missing_beside_an_actor_that_resumes(tmp_path: Path) -> None:
    save(tmp_path / "ck", 4)
    critics = str(tmp_path / "critics")
    actor = str(tmp_path / "ck")
    settings = CheckpointConfig(load=actor, save=actor, critic_load=critics, critic_save=critics)
    assert resume.critic_folder(settings, None) is None  # both start anew
    with pytest.raises(CheckpointError, match=r"--critic-load .*critics: no critic there for the actor that resumes"):
        resume.critic_folder(settings, resume.find(settings.load))
