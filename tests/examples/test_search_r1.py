"""Search-R1: the model searches while it generates, reads what was found without learning it, and is scored."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path

import pytest
from tool_runs import NO_EVAL, ROOT, SMALL, by_loss, check_samples, rewards_vary, trained, weights_changed

from examples.tiny_tools import facts
from miles.errors import DataError
from miles.hooks import load_function
from miles.types import Sample

pytest.importorskip("bm25s")

CONFIG = "examples/search-r1/search.yaml"
FOLDER = ROOT / "examples" / "search-r1"
GENERATE = load_function(f"{FOLDER}/generate_with_search.py:generate")
EXAMPLE = GENERATE.__globals__
SearchEngine = EXAMPLE["SearchEngine"]


def score(response: str, label: object = "Tokyo") -> float:
    args = Namespace(search_format_score=0.1)
    return asyncio.run(EXAMPLE["reward_func"](args, Sample(response=response, label=label)))


def test_a_run_searches_masks_and_learns(train, metrics) -> None:
    run = train(CONFIG, *SMALL, *NO_EVAL)
    samples = trained(run)
    assert len(samples) == 48
    check_samples(samples)
    searched = [s for s in samples if s.metadata["searches"]]
    assert len(searched) > 24, "most responses search"
    corpus = set(facts.corpus())
    for sample in searched:
        pieces = by_loss(sample)
        assert [learned for learned, _ in pieces] == [i % 2 == 0 for i in range(len(pieces))]
        observations = [text for learned, text in pieces if not learned]
        assert len(observations) == len(sample.metadata["searches"])
        for text in observations:
            found = text.removeprefix("<information>").removesuffix("</information>")
            assert found in corpus or found == ""
        assert all("<information>" not in text for learned, text in pieces if learned)
    for sample in samples:
        if not sample.metadata["searches"]:
            assert all(learned for learned, _ in by_loss(sample))
    assert {s.reward for s in samples} == {0.0, 0.1, 1.0}
    assert rewards_vary(samples)
    # The trainer's log-probs of the same tokens: a shift by one would be off by more than 1.
    assert max(metrics(run, "train/train_rollout_logprob_abs_diff")) < 0.05
    assert weights_changed(run)


def test_evaluation_searches_too(train, metrics) -> None:
    run = train(CONFIG, "--eval-interval", 1, "--num-rollout", 0)
    assert 0.2 < metrics(run, "eval/heldout")[0] <= 1.0


def test_partial_rollout_is_refused(train, capsys: pytest.CaptureFixture[str]) -> None:
    train(CONFIG, *SMALL, *NO_EVAL, "--partial-rollout", status=2)
    told = capsys.readouterr().err
    assert "--partial-rollout: a response that was cut short in a search cannot be continued." in told


def test_a_missing_corpus_names_file_and_flag(train, capsys: pytest.CaptureFixture[str]) -> None:
    train(CONFIG, *SMALL, *NO_EVAL, "--search-corpus", "none.jsonl", status=2)
    assert "none.jsonl: --search-corpus: No such file or directory." in capsys.readouterr().err


def test_a_number_of_turns_below_one_is_refused(train, capsys: pytest.CaptureFixture[str]) -> None:
    train(CONFIG, *SMALL, *NO_EVAL, "--search-max-turns", 0, status=2)
    assert "--search-max-turns" in (told := capsys.readouterr().err) and "expected a whole number >= 1, got 0" in told


def test_conversations_that_are_no_longer_needed_are_cut_off(train) -> None:
    """Over-sampling aborts what still runs when enough groups are kept; what is trained is whole."""
    kept = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    flags = (*SMALL, *NO_EVAL, "--over-sampling-batch-size", 12, "--dynamic-sampling-filter-path", kept)
    samples = trained(train(CONFIG, *flags))
    assert len(samples) == 48
    check_samples(samples)
    assert Sample.Status.ABORTED not in {s.status for s in samples}


# ---- the search engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("country", facts.COUNTRIES)
def test_every_fact_is_found_by_the_words_of_its_question(country: str) -> None:
    engine = SearchEngine.load(str(FOLDER / "corpus.jsonl"))
    for relation in facts.RELATIONS:
        told = facts.sentence(relation, country, facts.value(relation, country))
        assert engine.search(f"{relation} {country}", 1) == [told]


def test_what_shares_no_word_is_not_found() -> None:
    engine = SearchEngine(["Tokyo is the capital of Japan.", "Lima is the capital of Peru."])
    assert engine.search("weather", 2) == []
    assert engine.search("", 2) == []
    assert len(engine.search("capital", 9)) == 2


@pytest.mark.parametrize("line", ["[]", "{}", "no json", '{"contents"'])
def test_a_bad_line_of_the_corpus_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"contents": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl:2"):
        SearchEngine.load(str(file))


def test_searches_at_the_same_time_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0

    async def counted(function, *given):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return function(*given)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    args = Namespace(search_corpus=str(FOLDER / "corpus.jsonl"), search_concurrency=3, search_topk=1)

    async def many() -> list[list[str]]:
        return await asyncio.gather(*(EXAMPLE["search"](args, "capital Peru") for _ in range(12)))

    assert asyncio.run(many()) == [["Lima is the capital of Peru."]] * 12
    assert most == 3


# ---- the reward ----------------------------------------------------------------------------------------------------

LOOKED_UP = "<think>look up</think><search>capital Japan</search><information>{}</information>"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (LOOKED_UP.format("x") + "<answer>Tokyo</answer><|end|>", 1.0),
        ("<think>guess</think><answer>the  TOKYO.</answer>", 1.0),
        (LOOKED_UP.format("x") + "<answer>Kyoto</answer><|end|>", 0.1),
        (LOOKED_UP.format("<answer>Tokyo</answer>") + "<answer>Kyoto</answer>", 0.1),
        ("<think>guess</think><answer>Kyoto</answer>", 0.0),
        (LOOKED_UP.format("<answer>Tokyo</answer>"), 0.0),
        ("<answer>Kyoto</answer><answer>Tokyo</answer>", 0.0),
        ("<think>look up</think><search></search><answer>Kyoto</answer>", 0.0),
        ("Tokyo", 0.0),
        ("", 0.0),
    ],
)
def test_reward(response: str, expected: float) -> None:
    assert score(response) == expected


@pytest.mark.parametrize(
    "label", ["Tokyo", ["Edo", "Tokyo"], {"target": ["tokyo"]}, {"ground_truth": {"target": ["Tokyo"]}}]
)
def test_labels_of_published_data_are_understood(label: object) -> None:
    assert score("<answer>Tokyo</answer>", label) == 1.0
    assert score("<answer>Oslo</answer>", label) == 0.0


