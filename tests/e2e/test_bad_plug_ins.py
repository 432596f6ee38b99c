"""Plug-ins that fail while a run goes: the card, what the policies make of it, and that no failed score is ever a 0."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from bad_plug_ins import BAD_SAMPLE, failure_of
from e2e_runs import distance, latest, metrics, miles, saving, train, weights

from miles.observe.record import read_rollouts
from miles.types import Sample

PLUG_INS = Path(__file__).with_name("bad_plug_ins.py")

# A rollout of 16 answers of at most 12 tokens: a second.
SMALL = ("--rollout-max-response-len", 12, "--num-rollout", 1, "--lr", "1e-3")


def path(name: str) -> str:
    return f"{PLUG_INS}:{name}"


def line_of(text: str) -> int:
    (number,) = [i for i, line in enumerate(PLUG_INS.read_text().splitlines(), 1) if text in line]
    return number


def card_of(capsys: pytest.CaptureFixture[str], run_dir: Path, *flags: object, status: int = 1) -> str:
    """What a failing run says: no traceback, and within the time limit of the whole test."""
    train(run_dir, *SMALL, *flags, status=status)
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert shown.err.startswith("miles: --") or status == 0
    return shown.err


# ---- rewards -------------------------------------------------------------------------------------------------------

REWARDS = {
    "divides": "ZeroDivisionError: division by zero",
    "returns_none": "returned None, expected a number",
    "returns_nan": "returned float nan, expected a finite number",
    "returns_inf": "returned float inf, expected a finite number",
    "returns_text": "returned str '1.0', expected a number",
    "returns_dict": "returned a dict, expected a number\n(.|\n)*hint +name the score: --reward-key; keys: 'accuracy'",
    "returns_too_much": "returned int 1000(.|\n)*expected a number that float32 can hold",
    "exits": "SystemExit: 3(.|\n)*hint +raise an exception instead",
    "cancels_itself": "  CancelledError\n",
    "unspeakable": r"Unspeakable: \(str of it raised RuntimeError\)",
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(capsys, tmp_path / "r", "--custom-rm-path", path(name))
    assert card.startswith(f"miles: --custom-rm-path {path(name)} failed at ")
    assert re.search(REWARDS[name], card)
    assert re.search(r"sample +\d+ \(group \d\), \w+: prompt '", card)
    assert "--hook-policy custom-rm=" in card and "miles replay " in card


def test_the_card_names_the_line_and_replay_reproduces_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(capsys, tmp_path / "r", "--custom-rm-path", path("divides"))
    number = line_of("# the line that the card must name")
    assert f"bad_plug_ins.py:{number}\n  {number} | return 1 / len" in card
    match = re.search(r"miles replay (\S+) --pdb", card)
    assert match is not None
    assert miles("replay", match[1]) == 1
    shown = capsys.readouterr().out
    assert "recorded  ZeroDivisionError: division by zero" in shown
    assert f'bad_plug_ins.py", line {number}' in shown and shown.rstrip().endswith(
        "ZeroDivisionError: division by zero"
    )


def test_a_dict_without_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(capsys, tmp_path / "r", "--custom-rm-path", path("returns_dict"), "--reward-key", "score")
    assert "returned a dict without 'score'" in card and "--reward-key is 'score'; the dict has 'accuracy'" in card


def test_a_reward_that_damages_its_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(capsys, tmp_path / "r", "--custom-rm-path", path("empties_the_sample"))
    assert f"bad_plug_ins.py:{line_of('async def empties_the_sample')}" in card
    assert "response_length of sample 0 is" in card and "but it has 0 tokens" in card


@pytest.mark.parametrize("name", ["hangs", "hangs_in_thread", "blocks"])
def test_a_reward_that_takes_too_long(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it awaits, sleeps in a thread, or keeps the event loop to itself."""
    card = card_of(capsys, tmp_path / "r", "--custom-rm-path", path(name), "--hook-timeout-s", 0.2)
    assert "took longer than 0.2 s (--hook-timeout-s)" in card
    begin = line_of(f"def {name}(")
    assert any(f"bad_plug_ins.py:{begin + i}\n" in card for i in (1, 2)), "the line that it waits in"


# ---- a failed score is never a 0 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of runs in which nothing fails, per policy: one sample masked, its group's statistics without it."""
    made = {}
    for policy, statistics in (("mask", "statistics_without_one"), ("drop", "statistics_of_a_smaller_group")):
        run = tmp_path_factory.mktemp("by_hand") / "r"
        train(
            run, *SMALL, *saving(run), "--custom-rm-path", path("scores"), "--rollout-sample-filter-path",
            path("mask_one"), "--custom-reward-post-process-path", path(statistics),
        )  # fmt: skip
        made[policy] = weights(run)
    return made


@pytest.mark.parametrize(
    ("reward", "policy"),
    [("one_raises", "drop"), ("one_raises", "mask"), ("one_is_none", "drop"), ("one_hangs", "retry:1,drop")],
)
def test_a_tolerated_failure_leaves_its_group_and_its_statistics(
    reward: str, policy: str, tmp_path: Path, by_hand: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Under `mask` its place counts in the mean over the optimizer step; under `drop` it does not."""
    run = tmp_path / "r"
    flags = ("--custom-rm-path", path(reward), "--hook-policy", f"custom-rm={policy}", "--hook-timeout-s", 0.2)
    train(run, *SMALL, *saving(run), *flags)
    same, other = ("mask", "drop") if policy == "mask" else ("drop", "mask")
    # By hand the advantages are scaled, not the mean: Adam's first steps make something of the last bit.
    assert distance(weights(run), by_hand[same]) < (1e-7 if same == "mask" else 5e-6)
    assert distance(weights(run), by_hand[other]) > 2e-5

    samples = {s.index: s for s in read_rollouts(run, 0)}
    assert len(samples) == 16 and samples[BAD_SAMPLE].reward is None
    assert samples[BAD_SAMPLE].status == Sample.Status.FAILED and failure_of(samples[BAD_SAMPLE]) is not None
    others = [float(s.reward) for s in samples.values() if s.index != BAD_SAMPLE]  # type: ignore[arg-type]
    assert metrics(run, "rollout/failed_scores") == {0: 1}
    assert metrics(run, "rollout/raw_reward")[0] == pytest.approx(sum(others) / 15)


def test_what_a_zero_would_have_done(tmp_path: Path, by_hand: dict[str, dict[str, torch.Tensor]]) -> None:
    """The comparison above can fail: a 0 in the place of the failed score ends in other weights."""
    run = tmp_path / "r"
    train(run, *SMALL, *saving(run), "--custom-rm-path", path("one_is_zero"))
    assert all(distance(weights(run), made) > 1e-4 for made in by_hand.values())


def test_a_group_of_failed_scores_is_replaced(tmp_path: Path) -> None:
    """One valid sample of four has nothing to be compared with."""
    run = tmp_path / "r"
    train(run, *SMALL, "--custom-rm-path", path("three_of_a_group_raise"), "--hook-policy", "custom-rm=drop")
    groups = {s.group_index for s in read_rollouts(run, 0)}
    assert groups == {0, 2, 3, 4}
    assert metrics(run, "rollout/dynamic_filter/drop_failed_scores") == {0: 1}


def test_retries_leave_no_trace_in_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles.hooks.call.RETRY_DELAY_S", 0.0)
    flaky, steady = tmp_path / "flaky", tmp_path / "steady"
    train(flaky, *SMALL, *saving(flaky), "--custom-rm-path", path("Flaky"), "--hook-policy", "custom-rm=retry:2")
    train(steady, *SMALL, *saving(steady), "--custom-rm-path", path("scores"))
    assert distance(weights(flaky), weights(steady)) == 0


def test_more_than_the_budget_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "r"
    flags = ("--custom-rm-path", path("divides"), "--hook-policy", "custom-rm=drop")
    train(run, *SMALL, *flags, status=1)
    told = capsys.readouterr().err
    assert re.search(r"miles: \d+ of \d+ calls of --custom-rm-path have failed in this rollout", told)
    assert "--hook-error-budget 0.05 tolerates" in told and "ZeroDivisionError" in told and "miles replay " in told


# ---- everything else -----------------------------------------------------------------------------------------------

PLUG_POINTS = {
    "--custom-generate-function-path": {
        "generate_raises": "ValueError: the tool is gone",
        "generate_none": "returned None, expected the Sample(.|\n)*hint +end the function with `return sample`",
        "generate_nothing": "returned no samples, expected at least one",
        "generate_wrong_length": "response_length of sample 0 is 7, but it has 3 tokens",
        "generate_unknown_token": "has the token id 99999, expected ids from 0 to 52, the vocabulary",
        "generate_nan": "rollout_log_probs of sample 0 is nan at response token 0",
        "generate_aborted": "The reward of sample 0 is NoneType None",
        "generate_hangs": r"took longer than 0.2 s \(--hook-timeout-s\)",
    },
    "--rollout-function-path": {
        "rollout_none": "returned None, expected a list of groups",
        "rollout_empty": "rollout 0 returned no samples, expected a non-empty list of groups",
        "rollout_of_dicts": "returned groups that hold a dict, expected Samples",
        "rollout_too_small": r"The rollout gave 4 samples, fewer than one optimizer step of 8 \(--global-batch-size\)",
        "rollout_unscored": "The reward of sample 0 is NoneType None",
    },
    "--data-source-path": {
        "SourceWithoutSamples": r"get_samples\(4\) returned no groups while rollout 0 still needs 4",
        "SourceThatRunsDry": r"get_samples\(4\) returned no groups while rollout 1 still needs 4",
        "SourceOfSamples": r"get_samples\(4\) returned a list of Sample, expected groups",
        "SourceOfPairs": r"get_samples\(4\) returned a group of 2 samples\n  hint +each prompt has 4",
        "SourceThatRaises": "OSError: the database is gone",
        "SourceThatIsNotMade": "OSError: cannot connect",
        "SourceThatCannotSave": "ValueError: nowhere to save to",
    },
    "--dynamic-sampling-filter-path": {"filter_raises": "ValueError: no variance"},
    "--custom-rollout-log-function-path": {"log_raises": "ValueError: the logger is gone"},
    "--custom-reward-post-process-path": {"post_process_short": "raw_rewards has 1 entries for 16 samples"},
    "--custom-convert-samples-to-train-data-path": {
        "convert_none": "returned None, expected a dict of columns",
        "convert_too_few_tokens": r"response_lengths: expected one entry per sample \(3\), got 16",
        "convert_short_masks": "loss_masks length of row 0 is 1, its response_length is",
        "convert_nan": r"rewards\[0\]: float nan, expected a finite number",
    },
    "--custom-loss-function-path": {
        "loss_of_a_number": "returned float 0.5, expected a scalar tensor",
        "loss_per_token": r"returned a tensor of shape \[1, \d+\], expected a scalar tensor",
    },
    "--custom-pg-loss-reducer-function-path": {
        "reducer_of_nothing": r"returned a tensor of shape \[\d+\], expected a scalar tensor"
    },
}
CASES = [(flag, name) for flag, names in PLUG_POINTS.items() for name in names]


@pytest.mark.parametrize(("flag", "name"), CASES, ids=[name for _, name in CASES])
def test_other_plug_ins_that_fail(flag: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "r"
    extra = ("--loss-type", "custom_loss") if "loss-function" in flag and "pg" not in flag else ()
    card = card_of(
        capsys, run, "--custom-rm-path", path("scores"), flag, path(name), *extra, "--hook-timeout-s", 0.2,
        "--num-rollout", 2, *saving(run),
    )  # fmt: skip
    assert card.startswith(f"miles: {flag} {path(name)} failed at ")
    assert f"{PLUG_INS.name}:" in card.splitlines()[0]
    assert re.search(PLUG_POINTS[flag][name], card)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("StateOfFunctions", "state_dict returned what no checkpoint gives back, expected numbers, text"),
        ("StateOfItsOwn", "state_dict returned what no checkpoint gives back, expected numbers, text"),
        ("StateThatRaises", "ValueError: no state"),
    ],
)
def test_state_that_cannot_be_saved(name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said when it is saved, not when the run is to be resumed."""
    run = tmp_path / "r"
    assert says in card_of(capsys, run, "--custom-rm-path", path(name), *saving(run))
    assert not list((run / "ck").glob("*iter_*"))


def test_state_that_a_plug_in_does_not_take_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "r"
    flags = ("--custom-rm-path", path("StateThatIsNotTaken"), *saving(run))
    train(run, *SMALL, *flags)
    capsys.readouterr()
    card = card_of(capsys, run, *flags, "--load", run / "ck", "--num-rollout", 2)
    assert "KeyError: 'counted'" in card and "bad_plug_ins.py:" in card


def test_logging_that_fails_may_be_skipped(tmp_path: Path) -> None:
    flags = ("--custom-rollout-log-function-path", path("log_raises"))
    run = train(tmp_path / "r", *SMALL, *flags, "--hook-policy", "custom-rollout-log-function=drop")
    assert metrics(run, "rollout/raw_reward"), "the default logging ran in its place"


def test_a_filter_that_drops_everything_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="miles.rollout.loop"):
        train(tmp_path / "r", *SMALL, "--dynamic-sampling-filter-path", path("drops_at_first"))
    told = [r.getMessage() for r in caplog.records if "does not progress" in r.getMessage()]
    assert len(told) == 2, "after 16 groups and after 32: again at each doubling, not at each step"
    assert "16 of 16 finished groups were dropped (too easy: 16); 0 of the 4 that it needs are kept" in told[0]
    assert f"--dynamic-sampling-filter-path {path('drops_at_first')} decides" in told[0]


def test_a_loss_of_nan_is_told_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "r"
    flags = ("--custom-loss-function-path", path("loss_is_nan"), "--loss-type", "custom_loss", "--num-rollout", 2)
    train(run, *SMALL, *flags, *saving(run))
    told = [r.getMessage() for r in caplog.records if "the gradient is not finite" in r.getMessage()]
    assert [json.loads(re.findall(r"(\d+) skipped so far", t)[0]) for t in told] == [1, 2, 4]
    assert metrics(run, "train/skipped_step") == dict.fromkeys(range(4), 1.0)
    assert distance(weights(run, 1), weights(run, 2)) == 0
    assert all(torch.isfinite(t).all() for t in weights(run).values())


def test_a_failure_leaves_the_last_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "r"
    train(run, *SMALL, *saving(run), "--custom-rm-path", path("scores"))
    before = weights(run)
    flags = ("--load", run / "ck", "--num-rollout", 3, "--custom-rm-path", path("divides"))
    train(run, *SMALL, *saving(run), *flags, status=1)
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert latest(run).name == "iter_0000001" and distance(weights(run), before) == 0
