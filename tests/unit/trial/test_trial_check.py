"""`miles check` on tables of plug-ins: what it says they returned, what it warns of, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trial_helpers import FLAGS, PLUG_INS, ROOT, check, path_of, record, run

RM = "--custom-rm-path"
LOSS = ("--custom-loss-function-path", "--loss-type", "custom_loss")
TIS = ("--custom-tis-function-path", "--use-tis")

# plug-in, flags, what the line ends with
GOOD = [
    ("exact", (RM,), "0.0 .. 1.0 over 18 responses"),
    ("keyed", (RM, "--reward-key", "score"), "0.0 .. 1.0 over 18 responses"),
    ("whole_group", (RM, "--group-rm"), "0.0 .. 1.0 over 18 responses"),
    ("keep_varied", ("--dynamic-sampling-filter-path",), "keeps 1 of 2 groups; dropped: 1 without a reason"),
    ("first_in_first_out", ("--buffer-filter-path",), "1 of 2 groups asked for 1, 1 left"),
    ("marks_first", ("--rollout-sample-filter-path",), "removes 2 of 8 samples"),
    ("centred", ("--custom-reward-post-process-path",), "raw 0.0 .. 1.0, trained -0.25 .. 0.75 over 8 samples"),
    ("columns", ("--custom-convert-samples-to-train-data-path",),
     "8 rows: tokens, response_lengths, loss_masks, rewards, difficulty"),
    ("logs", ("--custom-rollout-log-function-path",), "not called: it writes to logs"),
    ("masks_first_token", ("--rollout-data-postprocess-path",), "changed loss_masks; added seen"),
    ("surrogate", LOSS, ", gradient finite, respects the mask, a sum over samples"),
    ("surrogate", (*LOSS, "--calculate-per-token-loss"), ", gradient finite, respects the mask, a sum over samples"),
    ("truncated", TIS, ", gradient finite, respects the mask, a sum over samples"),
    ("constant_denominator", ("--custom-pg-loss-reducer-function-path",),
     ", gradient finite, respects the mask, a sum over samples"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flags", "ends"), GOOD, ids=lambda v: v if isinstance(v, str) else "")
def test_good_ones(name: str, flags: tuple[str, ...], ends: str) -> None:
    done = check(flags[0], name, *flags[1:])
    assert done.status == 0, done.err
    assert done.warnings == []
    assert done.row(flags[0]).endswith(ends)


ODD = [
    ("is_random", (RM,), "called twice with the same response it returns "),
    ("constant", (RM,), "it returns 0.5 for each of 18 responses, the label in the usual forms and nothing among them"),
    ("likes_silence", (RM,), "an empty response scores 1.0, more than the label itself in any usual form (0.0)"),
    ("accepts_silence", (RM,), "an empty response scores 1.0, as much as the best of the others"),
    ("enormous", (RM,), "; scale them to about 1"),
    ("cuts_the_response", (RM,), "it changes sample.response, which a run then trains with; work on a copy"),
    ("needs_the_end", (RM, "--hook-policy", "custom-rm=drop"), "3 of 18 calls failed: IndexError: list index out of"),
    ("asks_a_server", (RM,), "(it asks a server that does not answer now; the run needs it)"),
    ("keeps_nothing", ("--dynamic-sampling-filter-path",), "it drops every group"),
    ("says_nothing", ("--dynamic-sampling-filter-path",), "it returns None, which drops a group"),
    ("scores_itself", ("--dynamic-sampling-filter-path",), "it changes sample.reward"),
    ("takes_none", ("--buffer-filter-path",), "it returns none of 2 groups"),
    ("loses_some", ("--buffer-filter-path",), "1 group of 2 left the buffer without being returned"),
    ("marks_all", ("--rollout-sample-filter-path",), "it removes every sample"),
    ("returns_a_list", ("--rollout-sample-filter-path",), "its list is ignored; set sample.remove_sample = True"),
    ("all_zero", ("--custom-reward-post-process-path",), "every reward that is trained on is 0"),
    ("ignores_mask", LOSS, "response tokens whose loss mask is 0 (tool output)"),
    ("mean_of_samples", LOSS, "it is a mean over the samples of a micro-batch, expected a sum"),
    ("mean_of_tokens", LOSS, "it is a mean over the tokens of a micro-batch, expected a sum over samples"),
    ("squared_sum", LOSS, "the gradient of several samples is not the sum of theirs"),
    ("every_position", LOSS, "it gives a gradient to positions outside of responses"),
    ("doubles_advantages", LOSS, "it changes batch['advantages'] in place, which later micro-batches see"),
    ("nothing_learned", LOSS, "its gradient is 0 everywhere: nothing is learned"),
    ("unmasks", TIS, "it returns masks that are not 0 where the loss mask is"),
    ("truncated", ("--custom-tis-function-path", "--get-mismatch-metrics"), "although --use-tis is not given"),
    ("plain_mean", ("--custom-pg-loss-reducer-function-path",), "it is a mean over the tokens of a micro-batch"),
    ("surrogate", LOSS[:1], "never called with --loss-type policy_loss; give --loss-type custom_loss"),
    ("truncated", TIS[:1], "never called without --use-tis or --get-mismatch-metrics"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flags", "says"), ODD, ids=lambda v: v if isinstance(v, str) and " " not in v else "")
def test_odd_ones_are_told(name: str, flags: tuple[str, ...], says: str) -> None:
    done = check(flags[0], name, *flags[1:])
    assert done.status == 0, done.err
    assert any(says in warning for warning in done.warnings), done.out
    assert f"warning: {flags[0]} {path_of(name)} ({os.path.relpath(PLUG_INS)}:" in done.out
    assert done.out.splitlines()[-1].endswith(f"{len(done.warnings)} warning{'s'[: len(done.warnings) != 1]}.")


# plug-in, flags, lines of the report
BAD = [
    ("divides", (RM,), "ZeroDivisionError: division by zero at {file}:{line}: return 1 / 0", "mend that line"),
    ("divides", (RM, "--hook-policy", "custom-rm=drop"), "{file}:{line}: return 1 / 0", "mend that line"),
    ("needs_the_end", (RM,), "IndexError: list index out of range at {file}:{line}: return float(", "mend that line"),
    ("exits", (RM,), "SystemExit: 3 at {file}:{line}: raise SystemExit(3)", "mend that line"),
    ("runs_out", (RM,), "raised StopIteration at {file}:{line}: return next(", "mend that line"),
    ("awaits_what_runs_out", (RM,), "raised StopIteration at {file}:{line}: return next(", "mend that line"),
    ("raises_the_unspeakable", (RM,), "Unspeakable: (str of it raised RuntimeError) at {file}:{line}: raise U", "mend"),
    ("wants_metadata", (RM,), "KeyError: 'answer' at {file}:{line}: return float(", "mend that line"),
    ("returns_none", (RM,), "{file}:{line} returned None, expected a number", "does every branch of"),
    ("returns_nan", (RM,), "{file}:{line} returned float nan, expected a finite number", "look for a division"),
    ("returns_text", (RM,), "{file}:{line} returned str '1', expected a number", "convert it: float(...)"),
    ("keyed", (RM,), "returned a dict, expected a number", "name the score: --reward-key; keys: 'score', 'length'"),
    ("returns_too_few", (RM, "--group-rm"), "{file}:{line} returned a list of length 3, expected 4",
     "one reward per sample, in the order of the samples"),
    ("misses_attribute", ("--dynamic-sampling-filter-path",), "'Sample' object has no attribute 'turns'", "mend that"),
    ("leaves_them", ("--buffer-filter-path",), "groups that are still in the buffer", "remove what"),
    ("one_list", ("--custom-reward-post-process-path",), "returned 8 values, expected (raw_rewards, rewards)", "mend"),
    ("short_masks", ("--custom-convert-samples-to-train-data-path",), "loss_masks length of row 0 is 1", "mend what"),
    ("without_masks", ("--custom-convert-samples-to-train-data-path",), "no 'response_lengths'", "mend what"),
    ("log_of_zero", LOSS, "gave the value -inf", "look for a log or a division of 0"),
    ("nan_gradient", LOSS, "a gradient with NaN or infinities", "look for a log or a division of 0"),
    ("unrelated", LOSS, "does not depend on `logits`", "compute it from `logits`"),
    ("forgets_metrics", TIS, "returned 2 values, expected (pg_loss, masks, metrics)", "mend what"),
    ("no_reducer", ("--custom-pg-loss-reducer-function-path",), "returned a float, expected a function", "mend what"),
    ("vector", ("--custom-pg-loss-reducer-function-path",), "returned a tensor of shape [", "sum or average it"),
    ("loses_rows", ("--rollout-data-postprocess-path",), "loss_masks: expected one entry per sample", "mend what"),
    ("leaves_nan", ("--rollout-data-postprocess-path",), "left NaN or infinities in the column 'advantages'", "mend"),
]  # fmt: skip


def line_of(name: str, text: str) -> int:
    """Of the definition, or of the line in it that holds `text`."""
    lines = PLUG_INS.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith((f"def {name}(", f"async def {name}(")))
    if not text:
        return start + 1
    return next(i for i in range(start, len(lines)) if text in lines[i]) + 1


@pytest.mark.parametrize(("name", "flags", "found", "remedy"), BAD, ids=[f"{b[0]}-{len(b[1])}" for b in BAD])
def test_bad_ones_are_refused(name: str, flags: tuple[str, ...], found: str, remedy: str) -> None:
    done = check(flags[0], name, *flags[1:])
    assert done.status == 2
    assert done.row(flags[0]).endswith("failed, see below")
    own = found.partition("{line}: ")[2].split("(")[0]
    expected = found.format(file=os.path.relpath(PLUG_INS), line=line_of(name, own))
    head, _, problem = done.err.partition("\n\n")
    assert head == "miles: 1 plug-in problem, found before anything was started:"
    lines = problem.splitlines()
    assert lines[0] == f"{flags[0]} {path_of(name)}"
    assert lines[1].startswith("  found     ") and expected in lines[1]
    assert any(line.startswith("  remedy    ") and remedy in line for line in lines)
    assert "Traceback" not in done.err


def test_a_class_that_exits_when_it_is_made() -> None:
    done = check(RM, "ExitsWhenMade")
    assert done.status == 2
    assert "making an object of the class raised SystemExit: 4 at " in done.err
    assert ": raise SystemExit(4)" in done.err


def test_long_messages_are_cut_and_keep_their_indentation() -> None:
    done = check(RM, "talks_a_lot")
    found = done.err.partition("  found     ")[2].partition("  remedy ")[0].splitlines()
    assert found[0] == "ValueError: first"
    assert all(line.startswith(12 * " ") for line in found[1:])
    assert any("more characters) ..." in line for line in found)
    assert any(f"at {os.path.relpath(PLUG_INS)}:" in line for line in found)
    assert len(done.err) < 5000


STUCK = [
    ("never_ends", "while True:|pass"),
    ("never_wakes", "time.sleep(1000)"),
    ("never_answered", "await asyncio.sleep(1000)"),
    ("blocks_the_loop", "time.sleep(0.01)"),
    ("backtracks", "return float(bool(re.match("),
]


@pytest.mark.parametrize(("name", "line"), STUCK, ids=[s[0] for s in STUCK])
def test_nothing_hangs(name: str, line: str) -> None:
    begin = time.monotonic()
    done = check(RM, name, "--limit-s", "0.2")
    assert time.monotonic() - begin < 60
    assert done.status == 2
    assert any(f"no result after 0.2 s, still at {os.path.relpath(PLUG_INS)}:" in done.err and text in done.err
               for text in line.split("|")), done.err  # fmt: skip
    assert "--limit-s gives a slow one more time" in done.err


def in_a_process(name: str) -> subprocess.CompletedProcess[str]:
    words = ["check", *FLAGS, RM, path_of(name), "--limit-s", "0.1"]
    code = (
        "import sys\nfrom miles.trial import caller\nfrom miles.__main__ import main\n"
        f"caller.FOR_RETURNING_S = 0.5\nsys.exit(main({words!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def test_what_catches_everything_ends_the_process() -> None:
    done = in_a_process("catches_everything")
    assert done.returncode == 2
    assert f"miles: {RM} {path_of('catches_everything')}: no result after 0.1 s, and it cannot be" in done.stderr
    assert f"trial_plug_ins.py:{line_of('catches_everything', 'time.sleep')}" in done.stderr


def test_threads_that_are_left_do_not_keep_the_process() -> None:
    done = in_a_process("waits_in_a_thread")
    assert done.returncode == 2
    assert "no result after 0.1 s, still at " in done.stderr and "await asyncio.to_thread(time.sleep" in done.stderr


def test_all_problems_come_at_once() -> None:
    """Those that do not bind beside those that fail when they are called."""
    more = ["--dynamic-sampling-filter-path", path_of("nowhere"), "--custom-reward-post-process-path"]
    done = check(RM, "divides", *more, path_of("one_list"))
    assert done.status == 2
    assert done.err.startswith("miles: 3 plug-in problems, found before anything was started:")
    for flag in (RM, "--dynamic-sampling-filter-path", "--custom-reward-post-process-path"):
        assert f"\n{flag} " in done.err


def test_strict_counts_warnings() -> None:
    assert check(RM, "constant", "--strict").status == 2
    assert check(RM, "exact", "--strict").status == 0


def test_slow_rewards_are_called_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles.trial.reward.BUDGET_S", 0.1)
    monkeypatch.setattr("miles.trial.reward.SLOW_S", 0.01)
    done = check(RM, "slow")
    assert done.warnings == ["a call takes 0.1 s: every sample of a rollout waits that long"]
    assert "over 4 responses" in done.row(RM)


def test_a_reward_that_takes_the_whole_budget_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles.trial.reward.BUDGET_S", 0.0)
    done = check(RM, "slow")
    assert done.status == 0 and "over 3 responses" in done.row(RM)


def test_rewards_reach_the_filters() -> None:
    """The filter sees what the reward of the run gives, where that differs."""
    flags = ("--reward-key", "score", "--dynamic-sampling-filter-path", path_of("keep_varied"))
    assert check(RM, "keyed", *flags).row("--dynamic-sampling-filter-path").endswith("keeps 2 of 2 groups")


# ---- which samples -------------------------------------------------------------------------------------------------


def test_a_miss_on_samples_of_somebody_elses_is_no_problem() -> None:
    """A generate function may give samples what made-up ones lack."""
    generate = ("--custom-generate-function-path", "miles.rollout.generate_hub.single_turn.generate")
    filter = "--dynamic-sampling-filter-path"
    done = check(filter, "misses_attribute", *generate)
    assert done.status == 0 and done.row(filter).endswith("failed")
    (warning,) = done.warnings
    assert warning.startswith("AttributeError: 'Sample' object has no attribute 'turns' at ")
    assert warning.endswith("--on RUN_DIR tries it on recorded ones)")
    assert check(RM, "returns_none", *generate).status == 2
    assert check(RM, "wants_metadata", "--prompt-data", "nowhere.jsonl").warnings[0].startswith("8 of 8 calls failed")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "run")


def test_on_a_recorded_rollout(run_dir: Path) -> None:
    """Without other flags those of the recorded run hold."""
    done = run("check", "--on", str(run_dir), RM, path_of("exact"))
    assert done.status == 0, done.err
    assert done.row(RM).endswith("0.0 .. 1.0 over 18 responses, 8 of them recorded: 2 score differently now")
    assert "2 groups; no problems." in done.out and f"rollout 1 of {run_dir}" in done.out
    loss = run("check", *FLAGS, "--on", str(run_dir), "--rollout", "0", LOSS[0], path_of("surrogate"), *LOSS[1:])
    assert loss.status == 0 and f"rollout 0 of {run_dir}" in loss.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rollout", "1"], "--rollout: belongs to --on"),
        (["--limit-s", "0"], "--limit-s: expected"),
        (["--on", "nowhere"], "--on nowhere: there is no such folder"),
        (["--on", "{run}", "--rollout", "7"], "--rollout 7: {run} has the rollouts 0 to 1."),
    ],
)
def test_wrong_flags(words: list[str], says: str, run_dir: Path) -> None:
    done = run("check", *FLAGS, *(word.format(run=run_dir) for word in words))
    assert done.status == 2 and says.format(run=run_dir) in done.err


def test_nothing_is_written_into_the_record(run_dir: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    run("check", "--on", str(run_dir), RM, path_of("cuts_the_response"), "--rollout-sample-filter-path",
        path_of("marks_all"))  # fmt: skip
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


def test_check_is_quick_and_light() -> None:
    """Nothing heavy is imported for plug-ins that do not need it."""
    heavy = ("torch", "transformers", "numpy", "pyarrow", "datasets")
    reward = str(ROOT / "examples/quickstart/carry.py") + ":reward"
    code = (
        "import sys, time\nbegin = time.perf_counter()\nfrom miles.__main__ import main\n"
        f"assert main(['check', *{FLAGS!r}, '--custom-rm-path', {reward!r}]) == 0\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_its_own_flags() -> None:
    done = run("check", "--help")
    assert done.status == 0 and "--on RUN_DIR" in done.out and "miles train" in done.out
