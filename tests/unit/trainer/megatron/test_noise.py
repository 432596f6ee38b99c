"""What is silenced, and that nothing else is."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from miles.trainer.megatron.noise import NOISE, WITHOUT_GPU, quiet


def shown(monkeypatch: pytest.MonkeyPatch, *, gpu: bool) -> list[str]:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet()
        for category, beginning, _ in NOISE + WITHOUT_GPU:
            warnings.warn(f"{beginning} And more.", category, stacklevel=1)
            warnings.warn(f"{category.__name__} of other things: {beginning}", category, stacklevel=1)
    return [str(warning.message) for warning in caught]


def test_words_are_silenced_and_kinds_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [f"{category.__name__} of other things: {beginning}" for category, beginning, _ in NOISE + WITHOUT_GPU]
    assert shown(monkeypatch, gpu=False) == others


def test_what_matters_to_a_gpu_is_shown_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told = shown(monkeypatch, gpu=True)
    for table, silent in ((NOISE, True), (WITHOUT_GPU, False)):
        assert all((f"{beginning} And more." not in told) == silent for _, beginning, _ in table)
