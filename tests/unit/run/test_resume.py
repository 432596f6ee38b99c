"""Checkpoint folders: complete or absent, whatever happens in between."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.config import CheckpointConfig
from miles.errors import CheckpointError
from miles.run import resume
from miles.trainer.checkpoints import weights_folder


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


def test_a_hugging_face_folder_is_a_start_only_where_a_bridge_reads_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resume.find(str(tmp_path), backend="megatron", or_hf=True) is None
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        resume.find(str(tmp_path), backend="megatron")


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


def test_megatron_counts_from_the_rollout_itself(tmp_path: Path) -> None:
    """iter_<rollout_id>, as Megatron's own iterations; fsdp counts rollouts that are done."""
    own = resume.new_meta(4, steps=10, weight_version=6, world_size=1, seed=7, backend="megatron")
    folder = resume.write(tmp_path, own, lambda f: _write(f / "model.txt", "weights"), lambda: None)
    assert folder.name == "iter_0000004" and (tmp_path / resume.TRACKER).read_text() == "4\n"
    found = resume.find(str(tmp_path), backend="megatron")
    assert found is not None and found.meta == own and found.next_rollout_id == 5


@pytest.mark.parametrize(("theirs", "ours"), [("fsdp", "megatron"), ("megatron", "fsdp")])
def test_a_checkpoint_of_the_other_backend_is_refused(theirs: str, ours: str, tmp_path: Path) -> None:
    own = resume.new_meta(4, steps=10, weight_version=6, world_size=1, seed=7, backend=theirs)
    resume.write(tmp_path, own, lambda f: _write(f / "model.txt", "weights"), lambda: None)
    says = f"--train-backend {theirs}, this run has --train-backend {ours}.*save-hf"
    with pytest.raises(CheckpointError, match=says):
        resume.find(str(tmp_path), backend=ours)


@pytest.mark.parametrize(("number", "folder", "after"), [("5", "iter_0000005", 6), ("release", "release", 0)])
def test_megatron_s_own_checkpoints(number: str, folder: str, after: int, tmp_path: Path) -> None:
    """Of its training the rollout after the iteration is next; what its tools converted, no training preceded."""
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "metadata.json").write_text("{}")
    (tmp_path / resume.TRACKER).write_text(number)
    found = resume.find(str(tmp_path), backend="megatron")
    assert found == resume.Checkpoint(tmp_path / folder, None, after)
    assert weights_folder(str(tmp_path), None, flag="--ref-load") == tmp_path / folder
    assert weights_folder(str(tmp_path / folder), None, flag="--ref-load") == tmp_path / folder
    with pytest.raises(CheckpointError, match="was written with --train-backend megatron"):
        resume.find(str(tmp_path), backend="fsdp")


def test_weights_of_one_of_several_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save(tmp_path, 9)
    assert weights_folder(str(tmp_path), None, flag="--ref-load").name == "iter_0000010"
    assert weights_folder(str(tmp_path), 5, flag="--ref-load").name == "iter_0000005"
    with pytest.raises(CheckpointError, match=r"--ref-load .*found no iter_0000006 in it"):
        weights_folder(str(tmp_path), 6, flag="--ref-load")


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
