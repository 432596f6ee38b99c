"""A disk that is full when the run saves or exports: a sentence, and the checkpoint before is intact."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e_runs import distance, flags, latest, miles, saving, train, weights
from safetensors.torch import load_file, save_file

SMALL = ("--rollout-max-response-len", 12)
USAGE = 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    return shown.err


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(run, *SMALL, *saving(run), "--num-rollout", 1)
    before = weights(run)
    again = (*SMALL, *saving(run), "--num-rollout", 2, "--load", run / "ck")
    with files_of_at_most(1_000_000):
        assert miles("train", *flags(run, *again)) == USAGE
    says = told(capsys)
    assert f"miles: {run}/ck/iter_0000002: cannot be written: File too large. Free some space or give another " in says
    assert "with --save; files written before are intact" in says
    assert latest(run).name == "iter_0000001" and distance(weights(run), before) == 0
    assert [p.name for p in (run / "ck").glob("*iter_*")] == ["iter_0000001"], "nothing half written is left"
    train(run, *again)
    assert latest(run).name == "iter_0000002"


def test_a_disk_with_room_for_one_checkpoint(
    small_disk: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = small_disk("12m") / "ck"
    argv = flags(tmp_path / "run", *SMALL, "--save", save, "--save-interval", 1, "--num-rollout", 3)
    assert miles("train", *argv) == USAGE
    assert f"miles: {save}/iter_0000002: cannot be written: No space left on device. Free some space" in told(capsys)
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    assert miles("train", *argv, "--load", save, "--num-rollout", 1) == 0, "the checkpoint can be resumed from"


def test_the_final_model_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with files_of_at_most(1_000_000):
        assert miles("train", *flags(run, *SMALL, "--num-rollout", 1)) == USAGE
    says = told(capsys)
    assert f"miles: {run}/model: cannot be written: File too large." in says and "with --run-dir" in says
    assert not (run / "model").exists() and not list(run.glob(".model*")), "complete or absent"


def test_an_export_beside_the_checkpoint_does_not_fit(
    small_disk: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = tmp_path / "run", small_disk("500k")
    argv = flags(run, *SMALL, *saving(run), "--num-rollout", 1, "--save-hf", f"{folder}/{{rollout_id}}")
    assert miles("train", *argv) == USAGE
    says = told(capsys)
    assert f"miles: {folder}/0: cannot be written: No space left on device." in says and "with --save-hf" in says
    assert latest(run).name == "iter_0000001" and list(folder.iterdir()) == []


def test_weights_that_are_missing(
    model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would be trained from random numbers."""
    folder = model()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert miles("train", *flags(tmp_path / "run", *SMALL, "--hf-checkpoint", folder)) == USAGE
    says = told(capsys)
    assert "1 weights of a Qwen3ForCausalLM are not in its files, such as model.layers.1.mlp.up_proj.weight" in says


def test_a_loss_without_metrics(tmp_path: Path) -> None:
    plug_in = tmp_path / "plain_loss.py"
    plug_in.write_text("def loss(args, parallel_state, batch, logits, reduce): return logits.sum() * 0.0, {}\n")
    custom = ("--loss-type", "custom_loss", "--custom-loss-function-path", f"{plug_in}:loss")
    train(tmp_path / "run", *SMALL, "--num-rollout", 1, *custom)
