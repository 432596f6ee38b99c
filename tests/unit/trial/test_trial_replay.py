"""`miles replay PLUGPOINT PATH --on RUN_DIR`, on a record that no run has to be made for."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from trial_helpers import PLUG_INS, path_of, record, run

from miles.hooks import CATALOG
from miles.observe.record import read_rollouts
from miles.trial.recorded import recorded_args, recorded_groups
from miles.trial.table import TRIALS, why_not_called, why_not_replayed


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("--seed", "77", "--eval-prompt-data", "held out", "x.jsonl", "--wandb-key", "secret")
    return record(tmp_path_factory.mktemp("recorded") / "run", *flags)


# plug point, plug-in, what is printed
REPLAYED = [
    ("custom-rm", "exact", ["result    0.0 .. 1.0 over 18 responses, 8 of them recorded: 2 score differently now",
                            "          sample 2: 1.0 -> 0.0"]),
    ("custom-rm", "whole_group", ["8 of them recorded: 2 score differently now"]),
    ("dynamic-sampling-filter", "keep_varied", ["keeps 1 of 2 groups", "group 0: kept, reason", "group 1: dropped"]),
    ("buffer-filter", "first_in_first_out", ["1 of 2 groups asked for 1, 1 left", "takes group 0"]),
    ("rollout-sample-filter", "marks_first", ["removes 2 of 8 samples", "sample 4 (group 1): removed"]),
    ("rollout-all-samples-process", "looks_on", ["looked at 2", "result    returned, after 2 groups"]),
    ("custom-reward-post-process", "centred", ["trained -0.25 .. 0.75 over 8 samples", "sample 0: 1.0 -> 0.75"]),
    ("custom-convert-samples-to-train-data", "columns", ["8 rows: tokens,", "difficulty: one int per row"]),
    ("custom-rollout-log-function", "logs", ["logged 1 8", "result    True: the default logging is skipped"]),
    ("custom-eval-rollout-log-function", "logs_evaluation",
     ["on        the evaluation after 1 rollouts", "logged 0 [('held out', 4)]", "False: the default logging runs"]),
    ("rollout-data-postprocess", "masks_first_token", ["changed loss_masks; added seen", "columns tokens,"]),
    ("custom-loss-function", "surrogate", ["gradient finite, respects the mask, a sum over samples", "metric ratio: "]),
    ("custom-loss-function", "ignores_mask", ["ignores the mask", "warning   it gives a gradient to "]),
    ("custom-tis-function", "truncated", ["weights 0.", "metric weight: mean 0.9"]),
    ("custom-pg-loss-reducer-function", "constant_denominator", [" where the default gives "]),
]  # fmt: skip


@pytest.mark.parametrize(("point", "name", "says"), REPLAYED, ids=[f"{p}-{n}" for p, n, _ in REPLAYED])
def test_replays(point: str, name: str, says: list[str], run_dir: Path) -> None:
    done = run("replay", point, path_of(name), "--on", str(run_dir))
    assert done.status == 0, done.err + done.out
    assert done.out.startswith(f"--{point}-path {path_of(name)} ({os.path.relpath(PLUG_INS)}:")
    for text in says:
        assert text in done.out, done.out


def test_the_recorded_mask_counts(run_dir: Path) -> None:
    done = run("replay", "custom-loss-function", path_of("surrogate"), "--on", str(run_dir))
    masked = sum(m == 0 for s in read_rollouts(run_dir, 1) for m in s.loss_mask or [])
    assert masked > 0 and f"in responses, {masked} of these masked" in done.out


def test_everything_that_the_catalogue_calls_replayable_is() -> None:
    for name, point in CATALOG.items():
        assert (why_not_replayed(point) is None) <= (name in TRIALS), name
        assert (why_not_called(point) is None) <= (name in TRIALS), name
        assert point.pure == (why_not_called(point) is None)


@pytest.mark.parametrize("name", [p.name for p in CATALOG.values() if why_not_replayed(p) is not None])
def test_the_others_say_why_not(name: str, run_dir: Path) -> None:
    point = CATALOG[name]
    done = run("replay", point.key, path_of("exact"), "--on", str(run_dir))
    assert done.status == 2
    assert done.err == f"miles: {point.flag} cannot be replayed on a recorded rollout. {why_not_replayed(point)}\n"


def test_one_sample_and_its_group(run_dir: Path) -> None:
    on = ("--on", str(run_dir), "--rollout", "0", "--sample", "2")
    done = run("replay", "custom-rm", path_of("exact"), *on)
    assert "on        sample 2 of rollout 0 of" in done.out
    assert "sample 2 (group 0), completed: prompt '983+969=?'" in done.out
    assert "recorded 1.0, now 0.0" in done.out
    done = run("replay", "dynamic-sampling-filter", path_of("keep_varied"), *on)
    assert "on        the group of sample 2 of rollout 0 of" in done.out and "keeps 1 of 1 group" in done.out
    missing = run("replay", "custom-rm", path_of("exact"), "--on", str(run_dir), "--sample", "99")
    assert missing.status == 2 and "--sample 99: " in missing.err and "has the samples 0 to 7" in missing.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["custom-rm", "--on", "{run}"], "miles replay custom-rm: which plug-in? For example: miles replay custom-rm"),
        (["custom-rm", "x.py:f"], "on which run? Give --on RUN_DIR"),
        (["custom-rmm", "x.py:f", "--on", "{run}"], "Did you mean custom-rm?"),
        (["custom-rm", "x.py:f", "--on", "nowhere"], "--on nowhere: there is no such folder"),
        (["custom-rm", "x.py:f", "--on", "{run}"], "no file x.py"),
        (["custom-rm", "{plug_ins}:exact", "--on", "{run}", "--rollout", "5"], "--rollout 5: {run} has the rollouts"),
        (["custom-eval-rollout-log-function", "{plug_ins}:logs_evaluation", "--on", "{run}", "--rollout", "0"],
         "no evaluation after 0 rollouts there"),
        (["runs/x/failures/1"], "but there is no such folder"),
    ],
)  # fmt: skip
def test_wrong_words(words: list[str], says: str, run_dir: Path) -> None:
    filled = [word.format(run=run_dir, plug_ins=PLUG_INS) for word in words]
    done = run("replay", *filled)
    assert done.status == 2 and says.format(run=run_dir) in done.err


def test_a_failure_shows_the_users_lines_alone(run_dir: Path) -> None:
    done = run("replay", "custom-rm", path_of("divides"), "--on", str(run_dir))
    assert done.status == 1
    assert "  found     ZeroDivisionError: division by zero at " in done.out
    assert "sample 0 (group 0), completed" in done.out
    frames = [line for line in done.out.splitlines() if line.startswith("  File ")]
    assert len(frames) == 1 and str(PLUG_INS) in frames[0]
    bad = run("replay", "custom-rm", path_of("returns_none"), "--on", str(run_dir))
    assert bad.status == 1 and "returned None, expected a number" in bad.out and "Traceback" not in bad.out


def test_pdb_stops_in_the_plug_in(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("p args.seed\nw\nq\n"))
    done = run("replay", "custom-rm", path_of("divides"), "--on", str(run_dir), "--pdb")
    assert done.status == 1
    assert "77" in done.out and "return 1 / 0" in done.out


def test_get_samples_is_not_recorded(run_dir: Path) -> None:
    done = run("replay", "rollout-all-samples-process", path_of("asks_for_more"), "--on", str(run_dir))
    assert done.status == 1 and "a record holds no data source: get_samples cannot be called in a replay" in done.out


def test_args_are_those_of_the_run(run_dir: Path) -> None:
    args = recorded_args(run_dir)
    assert args.seed == 77 and args.n_samples_per_prompt == 4 and args.use_critic is False
    assert [dataset.name for dataset in args.eval_datasets] == ["held out"]


def test_what_plug_ins_set_on_samples_comes_back(run_dir: Path) -> None:
    sample = recorded_groups(run_dir, 1)[0][1]
    assert sample.marked_by_a_plug_in == [1, 2]  # type: ignore[attr-defined]
    assert sample.rollout_log_probs and sample.loss_mask and sample.label == "1952"


def test_secrets_and_damage(run_dir: Path, tmp_path: Path) -> None:
    content = json.loads((run_dir / "config.json").read_text())
    assert "secret" not in json.dumps(content)
    (tmp_path / "schema.json").write_bytes((run_dir / "schema.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert recorded_args(tmp_path).wandb_key is None
    for text in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(text)
        done = run("replay", "custom-rm", path_of("exact"), "--on", str(tmp_path))
        assert done.status == 2 and "expected the settings of a run" in done.err
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "rollouts").mkdir()
    assert "no rollout is recorded there yet" in run("replay", "custom-rm", path_of("exact"), "--on", str(tmp_path)).err
