"""Bad input is answered: a sentence that says what was given, what was expected and what to do; no traceback, no hang.

Flags, files, data, models, run directories, ports and commands. Plug-ins are in test_bad_plug_ins.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_runs import BASE, HELDOUT, QUICKSTART, ROOT, TINY, flags, metrics, miles, train

from miles.observe.record import RunRecord

SMALL = ("--rollout-max-response-len", 12, "--num-rollout", 1)
USAGE = 2


def answer(capsys: pytest.CaptureFixture[str], *argv: object, status: int = USAGE) -> str:
    """What a command says on standard error, after `miles: `."""
    got = miles(*argv)
    shown = capsys.readouterr()
    assert got == status, shown.out + shown.err
    assert "Traceback" not in shown.out + shown.err
    head, _, text = shown.err.partition("miles: ")
    return text.strip() or head


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*flags)`: what `miles train` with these flags says."""
    return lambda *more, status=USAGE: answer(capsys, "train", *flags(tmp_path / "run", *SMALL, *more), status=status)


# ---- data ----------------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "1+1=?", "label": "2"}\n'
DATA = {
    "malformed": (GOOD + '{"prompt": "1+\n', ":2: expected a JSON object, got '{\"prompt\": \"1+' ("),
    "no object": (GOOD + "[1, 2]\n", ":2: expected a JSON object like {\"prompt\": ...}, got '[1, 2]'. Mend or delete"),
    "no prompt": ('{"question": "1"}\n', ":1: --input-key prompt: no such key in this row; its keys: 'question'."),
    "no label": ('{"prompt": "1", "answer": 1}\n', ":1: --label-key label: no such key in this row; its keys:"),
    "empty": ("", ": the data set is empty. Expected at least one row."),
    "blank lines": ("\n\n", ": the data set is empty. Expected at least one row."),
    "null prompt": ('{"prompt": null, "label": 2}\n', ":1: --input-key prompt: expected a string or a list of"),
    "empty prompt": (GOOD + '{"prompt": "", "label": 2}\n', ":2: the prompt is empty."),
    "half a character": ('{"prompt": "\\ud800", "label": 2}\n', ":1: the prompt holds half of a character, '\\ud800'."),
    "utf-16": (GOOD.encode("utf-16"), ":1: expected text in UTF-8, got byte 0xff at column 1. Save the file as UTF-8."),
    "too deep": ('{"prompt": %s\n' % ("[" * 100_000), ":1: expected a JSON object, got '{\"prompt\": [[["),
    "metadata": ('{"prompt": "1", "label": 2, "metadata": "x"}\n', ":1: --metadata-key metadata: expected JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_read(case: str, refused: Callable[..., str], write: Callable[..., Path]) -> None:
    content, says = DATA[case]
    file = write(content)
    assert refused("--prompt-data", file).startswith(f"{file}{says}")


def test_data_files_that_are_none(refused: Callable[..., str], write: Callable[..., Path]) -> None:
    assert refused("--prompt-data", "/nope/x.jsonl").startswith("/nope/x.jsonl: no such file. Expected a .jsonl or")
    assert "is a folder" in refused("--prompt-data", QUICKSTART)
    assert "ends in .jsonl or .parquet, got '.json'" in refused("--prompt-data", write("[]", "x.json"))
    assert "not readable as a Parquet file" in refused("--prompt-data", write("PAR1", "x.parquet"))
    assert "counts from the end" in refused("--prompt-data", f"{HELDOUT}@[-3:]")
    assert "--prompt-data: expected a path, got ''" in refused("--prompt-data", "")


def test_data_as_windows_writes_it_and_odd_names_are_fine(tmp_path: Path, write: Callable[..., Path]) -> None:
    file = write(b"\xef\xbb\xbf" + (GOOD * 8).replace("\n", "\r\n").encode(), "zählen und mehr %d.jsonl")
    train(tmp_path / "ein Lauf", *SMALL, "--prompt-data", file)


def test_prompts_that_are_too_long(
    refused: Callable[..., str], write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = json.dumps({"prompt": "1+" * 100 + "1=?", "label": "101"}) + "\n"
    file = write(GOOD * 3 + long + GOOD * 4)
    says = refused("--prompt-data", file)
    assert says.startswith(
        f"{file}:4: a prompt of 203 tokens leaves no room for a response in the model's context of 128"
    )
    assert "--rollout-max-prompt-len 127" in says
    train(tmp_path / "run", *SMALL, "--prompt-data", file, "--rollout-max-prompt-len", 127)
    assert "dropped 1 of 8 prompts: longer than 127 tokens (--rollout-max-prompt-len)" in caplog.text
    assert "all 8 prompts are longer than 3 tokens" in refused("--prompt-data", file, "--rollout-max-prompt-len", 3)


def test_a_response_ends_where_the_context_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompt and --rollout-max-response-len do not fit together: said once; what fits is generated."""
    run = train(tmp_path / "run", "--num-rollout", 2, "--rollout-max-response-len", 500)
    (told,) = [r.getMessage() for r in caplog.records if "the context of 128 tokens" in r.getMessage()]
    assert "a prompt of 9 tokens and a response of 500" in told and "--rollout-max-response-len 119" in told
    assert max(metrics(run, "rollout/response_len/max").values()) <= 119


def test_a_long_prompt_of_a_plug_in_is_named(refused: Callable[..., str], write: Callable[..., Path]) -> None:
    """Prompts that no data file holds are refused at their request."""
    plug_in = write(
        "from miles.rollout.data_source import RolloutDataSourceWithBuffer\n"
        "class Long(RolloutDataSourceWithBuffer):\n"
        "    def get_samples(self, n):\n"
        "        groups = super().get_samples(n)\n"
        "        for sample in groups[1]:\n"
        "            sample.prompt = '1+' * 100\n"
        "        return groups\n",
        "long_source.py",
    )
    says = refused("--data-source-path", f"{plug_in}:Long")
    assert says.startswith("sample 4 (group 1): its prompt of 200 tokens leaves no room for a response")
    assert "It begins '1+1+" in says and "--rollout-max-prompt-len" in says


def test_evaluation_data_is_read_before_anything_is_trained(
    refused: Callable[..., str], write: Callable[..., Path]
) -> None:
    late = ("--eval-interval", 1, "--skip-eval-before-train", "--progress", "plain")
    file = write(GOOD + '{"prompt": 3, "label": 4}\n')
    assert refused(*late, "--eval-prompt-data", "held-out", file).startswith(f"{file}:2: --input-key prompt: expected")
    assert refused(*late, "--eval-prompt-data", "a", "/nope.jsonl").startswith("/nope.jsonl: no such file")


# ---- flags and YAML ------------------------------------------------------------------------------------------------

FLAGS = [
    (["--rollout-batchsize", "4"], "--rollout-batchsize: no such flag. Did you mean --rollout-batch-size"),
    (["--xyzzy"], "--xyzzy: no such flag. `miles train --help-all` shows every one."),
    (["--lr", "abc"], "--lr: expected a number, got 'abc'."),
    (["--lr", ""], "--lr: expected a number, got ''."),
    (["--lr", "inf"], "--lr: expected a finite number, got 'inf'."),
    (["--lr"], "--lr: expected one argument."),
    (["--num-rollout", "1.5"], "--num-rollout: expected a whole number, got '1.5'."),
    (["--num-rollout", "-1"], "--num-rollout: expected a value >= 0, got -1."),
    (["--seed", "9" * 30], "--seed: expected a whole number of at most 9223372036854775807, got '999"),
    (["--rollout-batch-size", "9" * 12], "expected at most 16777216 samples, got 3999999999996."),
    (["--loss-type", "polici"], "--loss-type: expected one of policy_loss, sft_loss, custom_loss, got 'polici'."),
    (["--run-dir", ""], "--run-dir: expected a path without braces, got ''."),
    (["--run-dir", "runs/{name}"], "--run-dir: expected a path without braces, got 'runs/{name}'."),
    (["--run-dir", "a\udcff"], "--run-dir: expected text in UTF-8 without NUL characters"),
    (["--save", str(TINY)], f"--save: expected a folder, got '{TINY}'. This is a file."),
    (["--load", str(TINY)], f"--load: expected a folder, got '{TINY}'. This is a file."),
    (["--save-hf", "x/{step}"], "--save-hf: expected a path with {rollout_id} in it, and no other braces, got"),
    (["--save-debug-rollout-data", "{rollout_id}{"], "--save-debug-rollout-data: expected a path with {rollout_id}"),
    (["--custom-rm-path", ""], "1 plug-in problem, found before anything was started:\n\n--custom-rm-path"),
    (["--hook-policy", "custom-rn=drop"], "1 plug-in problem, found before anything was started:"),
    (["--load-debug-rollout-data", "/nope/{rollout_id}.pt"], "/nope/0.pt: no such file, for rollout 0."),
    (["stray"], "command line: 'stray' belongs to no flag."),
]


@pytest.mark.parametrize(("given", "says"), FLAGS, ids=[" ".join(given)[:40] for given, _ in FLAGS])
def test_flags(given: list[str], says: str, refused: Callable[..., str]) -> None:
    assert says in refused(*given)


def test_nothing_is_left_where_the_flags_were_wrong(refused: Callable[..., str], tmp_path: Path) -> None:
    refused("--lr", "abc")
    refused("--hf-checkpoint", "/nope")
    refused("--prompt-data", "/nope.jsonl")
    refused("--prompt-data", "/nope.jsonl")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left in ([], ["run"]), "a start that came to nothing leaves no row of numbered directories"
    assert not list((tmp_path / "run").glob("rollouts/*"))


YAML = {
    "unknown key": ("lr: 1e-6\nrolout-batch-size: 4\n", "file.yaml:2: --rolout-batch-size: no such flag. Did you mean"),
    "wrong type": ("seed: abc\n", "file.yaml:1: --seed: expected a whole number, got 'abc'."),
    "list": ("\nseed: [1, 2]\n", "file.yaml:2: --seed: expected one value, got [1, 2]."),
    "no mapping": ("- a\n", "file.yaml:1: expected a mapping of flags to values."),
    "empty": ("", "all of these are required, but not given. --config "),
    "tab": ("a:\n\t- b\n", "file.yaml:2: not valid YAML: found character"),
    "too deep": ("a: " + "[" * 5000, "file.yaml: not valid YAML: nested too deeply."),
    "code": ("seed: !!python/object/apply:os.system ['true']\n", "could not determine a constructor for the tag"),
    "utf-16": (
        "lr: 1\n".encode("utf-16"),
        "file.yaml:1: expected text in UTF-8, got byte 0xff. Save the file as UTF-8.",
    ),
}


@pytest.mark.parametrize("case", YAML)
def test_config_files(case: str, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    content, says = YAML[case]
    assert says in answer(capsys, "train", "--config", write(content, "file.yaml"))


def test_config_files_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "train", "--config", "/nope.yaml") == (
        "--config: expected a readable YAML file, got '/nope.yaml'. (No such file or directory.)"
    )
    assert "(Is a directory.)" in answer(capsys, "train", "--config", "/")


def test_evaluation_configs(refused: Callable[..., str], write: Callable[..., Path]) -> None:
    for content, says in (
        ("- 1\n", "expected a mapping"),
        ("datasets: []\n", "no data sets. Expected `datasets`"),
        ("datasets:\n- name: a\n", "needs a name and a path"),
        ("datasets:\n- {name: a, path: b, tempe: 1}\n", "has an unknown key 'tempe'. Did you mean temperature?"),
        ("datasets:\n- {name: a, path: b, temperature: hot}\n", "temperature: expected a value >= 0, got 'hot'"),
        ("datasets:\n- {name: a, path: b, top_k: 0}\n", "top_k: expected a value >= 1, or -1 for no limit, got 0"),
        ("datasets:\n- {name: a, path: b}\n- {name: a, path: c}\n", "two evaluation sets are called 'a'"),
    ):
        assert says in refused("--eval-interval", 1, "--eval-config", write(content, "eval.yaml"))


# ---- models --------------------------------------------------------------------------------------------------------


WEIGHTS = (BASE / "model.safetensors").read_bytes()


def test_models_that_are_none(refused: Callable[..., str], model: Callable[..., Path]) -> None:
    def says(folder: object) -> str:
        text = refused("--hf-checkpoint", folder)
        assert str(folder) in text
        return text

    assert "found no such folder" in says("/nope/model")
    assert "expected a Hugging Face model folder with a config.json, found" in says(model(config__json=None))
    assert "config.json cannot be read" in says(model(config__json=b"{"))
    assert "config.json holds no JSON object" in says(model(config__json=b"[]"))
    assert "a BertForMaskedLM does not write text" in says(model({"architectures": ["BertForMaskedLM"]}))
    assert "does not recognize this architecture" in says(model({"model_type": "foo"}))
    assert "model.safetensors: damaged" in says(model(model__safetensors=WEIGHTS[:5000]))
    assert "model.safetensors: damaged" in says(model(model__safetensors=b""))
    assert "Error no file named model.safetensors" in says(model(model__safetensors=None))
    assert "config.json speaks of 5 layers, the weights hold 3" in says(
        model({"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5})
    )
    assert "config.json speaks of 99 tokens, the weights hold 53" in says(model({"vocab_size": 99}))
    assert "hidden_size: expected a number >= 1, got 'wide'" in says(model({"hidden_size": "wide"}))
    assert "no tokenizer in this folder" in says(
        model(tokenizer__json=None, tokenizer_config__json=None, chat_template__jinja=None)
    )
    assert "the tokenizer in this folder cannot be loaded" in says(model(tokenizer__json=b"{"))


def test_an_architecture_that_the_engine_does_not_know(refused: Callable[..., str], model: Callable[..., Path]) -> None:
    folder = model({"architectures": ["MistralForCausalLM"], "model_type": "mistral"})
    assert "The embedded engine cannot run a MistralForCausalLM checkpoint" in refused("--hf-checkpoint", folder)


def test_serve(capsys: pytest.CaptureFixture[str], model: Callable[..., Path]) -> None:
    def says(*flags: object) -> str:
        assert miles("serve", *flags) == USAGE
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return shown.err

    assert "/nope: expected a Hugging Face model folder" in says("--model", "/nope")
    assert "damaged or unreadable" in says("--model", model(model__safetensors=b"x"), "--port", 0)
    with busy_port() as port:
        assert f"--port: expected a port that is free on 127.0.0.1 (Address already in use), got {port}" in says(
            "--model", BASE, "--port", port
        )


# ---- run directories and ports -------------------------------------------------------------------------------------


def test_run_directories_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for given, says in (
        (
            tmp_path / "file",
            "cannot be written: File exists. A file is in the way; give another directory with --run-dir.",
        ),
        (tmp_path / "file" / "x", "cannot be written: Not a directory."),
        ("/proc/miles", "cannot be written: No such file or directory. The directory is gone or cannot be created"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long."),
    ):
        assert f"{given}: {says}" in refused("--run-dir", given)


@pytest.mark.parametrize("flag", ["--save", "--save-hf", "--save-debug-rollout-data", "--dump-details"])
def test_other_places_are_tried_before_training(flag: str, refused: Callable[..., str]) -> None:
    folder = "/proc/miles"
    given = folder if flag in ("--save", "--dump-details") else f"{folder}/{{rollout_id}}"
    says = refused(flag, given, "--save-interval", 1, *(("--save", "{run_dir}/ck") if flag != "--save" else ()))
    assert says.startswith(folder) and f"give another one with {flag}" in says


def test_a_run_directory_in_use(tmp_path: Path, refused: Callable[..., str]) -> None:
    with RunRecord(tmp_path / "run"):
        assert f"in use by a live run (process {os.getpid()} on " in refused()


def test_a_full_disk_in_the_middle_of_a_run(
    small_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Metrics and rollouts: the run ends with a sentence, and what was written before can be read."""
    run = small_disk("200k") / "run"
    says = answer(capsys, "train", *flags(run, *SMALL, "--num-rollout", 200))
    assert f"{run}/" in says and "cannot be written: No space left on device. Free some space" in says
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 3 and all(line.endswith(b"\n") and json.loads(line) for line in lines)
    assert list((run / "rollouts").glob("*.parquet")) and not list(run.rglob("*.tmp"))


@pytest.fixture
def busy() -> Iterator[int]:
    with busy_port() as port:
        yield port


class busy_port:
    """A port that somebody listens on, for the length of the block."""

    def __enter__(self) -> int:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen()
        return int(self.socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def test_a_busy_port(busy: int, refused: Callable[..., str]) -> None:
    says = refused("--sglang-router-port", busy)
    assert says.startswith("--sglang-router-port: ") and str(busy) in says and "Address already in use" in says


# ---- commands ------------------------------------------------------------------------------------------------------


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    for argv, says in (
        ([], "no command is given.\n\nusage: miles COMMAND"),
        ([""], "'' is no command."),
        (["trian"], "'trian' is no command. Did you mean miles train?"),
        (["hooks", "custom-rn"], "expected the name of a plug point, got 'custom-rn'. Did you mean custom-rm?"),
        (["hooks", "xyz"], "expected the name of a plug point, got 'xyz'. `miles hooks` lists them all."),
        (["new", "custom-rn"], "Did you mean custom-rm?"),
        (["new", "custom-rm", tmp_path / "mine.py"], "mine.py: there already, and nothing is overwritten."),
        (["new", "custom-rm", tmp_path / "mine.py" / "x.py"], "x.py: cannot be written (File exists)."),
        (["replay", tmp_path / "none"], "expected the folder of a failed call, but there is no such folder."),
        (["replay", tmp_path], "but it has no call.json."),
        (["check"], "all of these are required, but not given."),
    ):
        assert says in answer(capsys, *argv)
    assert (tmp_path / "mine.py").read_text() == "x = 1\n"


def run_miles(*argv: object, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "miles", *map(str, argv)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


@pytest.mark.parametrize("argv", [["hooks"], ["--help"], ["train", "--help-all"]], ids=" ".join)
def test_a_reader_that_has_enough(argv: list[str]) -> None:
    """`miles hooks | head -1`"""
    with run_miles(*argv) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(30) == 0


def test_standard_output_on_a_full_disk() -> None:
    command = [sys.executable, "-m", "miles", "hooks"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "miles: standard output cannot be written: No space left on device.\n"


def test_an_interrupted_check(write: Callable[..., Path], tmp_path: Path) -> None:
    slow = write(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'there')!r}).touch()\ntime.sleep(60)\n", "slow.py"
    )
    with run_miles("check", "--config", TINY, "--custom-rm-path", f"{slow}:grade") as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "there").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and told == "miles: interrupted.\n"


# ---- plug-ins that cannot be loaded --------------------------------------------------------------------------------


def test_everything_wrong_with_all_plug_ins_at_once_and_before_torch(tmp_path: Path) -> None:
    """From another working directory, with paths relative to it, in less than 3 seconds."""
    (tmp_path / "syntax.py").write_text("def f(args, sample)\n    return 1\n")
    (tmp_path / "raises.py").write_text("x = {}['no']\ndef f(args, sample): return 1.0\n")
    (tmp_path / "fine.py").write_text("def grade(args, sample): return 1.0\ndef one(a): return True\n")
    argv = [
        *("--config", str(TINY), "--hf-checkpoint", str(BASE), "--prompt-data", str(HELDOUT)),
        *("--custom-rm-path", "no.such.module.grade", "--dynamic-sampling-filter-path", "fine.py:grad"),
        *("--custom-generate-function-path", "syntax.py:f", "--custom-reward-post-process-path", "raises.py:f"),
        *("--rollout-sample-filter-path", "fine.py:one", "--buffer-filter-path", "fine"),
        *("--hook-policy", "custom-rn=drop"),
    ]  # fmt: skip
    script = (
        "import sys\nfrom miles.__main__ import main\n"
        f"status = main(['train', *{argv!r}])\n"
        "print(status, [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])\n"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    seconds = time.monotonic() - begin
    assert done.stdout == "2 []\n", done.stderr
    assert "Traceback" not in done.stderr and seconds < 3
    for says in (
        "7 plug-in problems, found before anything was started:",
        "--custom-rm-path no.such.module.grade\n  found     no module named 'no'",
        "did you mean fine.py:grade (fine.py:1)?",
        "SyntaxError at syntax.py:1: expected ':': def f(args, sample)",
        "importing it raised KeyError: 'no' at raises.py:1: x = {}['no']",
        "one(a) at fine.py:2",
        "--buffer-filter-path fine\n  found     a path that names no function",
        "no plug point 'custom_rn'",
    ):
        assert says in done.stderr.replace("custom-rn'", "custom_rn'")


def test_a_run_from_another_directory_with_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miles.__main__ import main

    (tmp_path / "my grader.py").write_text("def grade(args, sample): return float(len(sample.response) % 2)\n")
    shutil.copy(HELDOUT, tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    argv = ["--config", str(TINY), *map(str, SMALL), "--hf-checkpoint", str(BASE), "--prompt-data", "data.jsonl"]
    assert main(["train", *argv, "--custom-rm-path", "my grader.py:grade", "--run-dir", "a run"]) == 0
    assert (tmp_path / "a run" / "summary.json").is_file()
