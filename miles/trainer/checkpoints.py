"""What a folder of checkpoints looks like from outside, whichever backend wrote it.

    <folder>/latest_checkpointed_iteration.txt    the number of the last complete one, or `release`
    <folder>/iter_<number>/  release/             one each

A folder `release` holds weights that no training wrote: Megatron's tools put a converted model there.
"""

from __future__ import annotations

from pathlib import Path

from miles.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def named(number: int | str) -> str:
    """Example: `20` and `"20"` are in `iter_0000020`, `"release"` is in `release`."""
    return RELEASE if number == RELEASE else f"iter_{int(number):07d}"


def is_megatrons(folder: Path) -> bool:
    """Whether Megatron-Core wrote this checkpoint: its mark, which it writes last, is there."""
    return (folder / "metadata.json").is_file()


def is_fsdps(folder: Path) -> bool:
    return (folder / "model").is_dir()


def is_hf(folder: Path) -> bool:
    """Whether this is a Hugging Face model folder."""
    return (folder / "config.json").is_file()


def weights_folder(given: str, iteration: int | None, *, flag: str) -> Path:
    """Where the weights are: `given` itself for a Hugging Face folder or one checkpoint, or one of the checkpoints that
    `--save` or Megatron's tools wrote there, the latest by default. CheckpointError names `flag`."""
    root = Path(given)
    if iteration is None and (is_hf(root) or is_fsdps(root) or is_megatrons(root)):
        return root
    number: int | str | None = iteration
    tracker = root / TRACKER
    if number is None and tracker.is_file():
        text = tracker.read_text().strip()
        number = text if text.isdecimal() or text == RELEASE else None
    folder = root if number is None else root / named(number)
    if number is None or not folder.is_dir():
        found = "no such folder" if not root.is_dir() else f"neither a config.json nor a {TRACKER}"
        raise CheckpointError(
            f"{flag} {given}: expected a Hugging Face model folder or one that --save wrote, found "
            f"{found if number is None else f'no {folder.name} in it'}."
        )
    return folder


def refuse_other(theirs: str, ours: str, folder: Path, flag: str) -> None:
    """CheckpointError for what was written with another `--train-backend`."""
    if theirs != ours:
        raise CheckpointError(
            f"{flag}: {folder} was written with --train-backend {theirs}, this run has --train-backend {ours}. Go on "
            f"with {theirs}, or take the same weights as a Hugging Face folder: --save-hf writes one with each "
            "checkpoint, and a run leaves one in model/ of its directory."
        )
