"""The radix tree against a plain dictionary, its bounds, and the published names."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.router.middleware_hub.radix_tree import StringRadixTrie, StringTreeNode


def letters(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer: one token per character."""
    return {"input_ids": [ord(c) for c in text]}


def tree(**given: Any) -> StringRadixTrie:
    return StringRadixTrie(tokenizer=letters, **given)


def nodes(of: StringRadixTrie) -> list[StringTreeNode]:
    return [node for _, node in of._walk(of.root, 0)]


def check(of: StringRadixTrie) -> None:
    """What holds at any time."""
    total = 0
    for node in nodes(of):
        assert node.validate_token_logp_consistency()
        assert node is of.root or (node.has_value or len(node.children) > 1), "a node for nothing"
        assert all(c.parent is node and c.string_key[0] == first for first, c in node.children.items())
        assert all(d.base is node for d in node.dependents) and (node.base is None or node in node.base.dependents)
        assert (node in of._by_use) == node.has_value
        total += len(node.token_ids)
    assert total == of.cur_cache_size <= of.max_cache_size
    assert of.total_entries == len(of._by_use)


TEXTS = st.text("ab", min_size=1, max_size=6)
VALUES = st.lists(st.integers(0, 3), min_size=1, max_size=6)
OPERATIONS = st.lists(st.tuples(st.sampled_from(["insert", "remove"]), TEXTS, VALUES), max_size=30)


@given(OPERATIONS, st.text("ab", max_size=8))
def test_finds_what_a_dictionary_finds(operations: list[tuple[str, str, list[int]]], query: str) -> None:
    ours, plain = tree(), dict[str, list[int]]()
    for what, text, ids in operations:
        if what == "insert":
            assert ours.insert(text, ids, [i / 2 for i in ids], [i % 2 for i in ids])
            plain[text] = ids
        else:
            assert ours.remove(text) == (plain.pop(text, None) is not None)
        check(ours)
    longest = max((text for text in plain if query.startswith(text)), key=len, default="")
    found = ours.find_longest_prefix(query)
    assert found.matched_prefix == longest and found.remaining_string == query[len(longest) :]
    assert found.token_ids == plain.get(longest, [])
    assert found.logp == [i / 2 for i in found.token_ids] and found.loss_mask == [i % 2 for i in found.token_ids]


@given(st.lists(st.tuples(TEXTS, VALUES, st.integers(0, 30)), max_size=40), st.integers(3, 12))
def test_never_holds_more_than_its_bound(inserted: list[tuple[str, list[int], int]], most: int) -> None:
    ours = tree(max_cache_size=most)
    for text, ids, version in inserted:
        assert ours.insert(text, ids, weight_version=str(version)) == (len(ids) <= most)
        check(ours)
        if len(ids) <= most:
            assert ours.find_longest_prefix(text).token_ids == ids


@given(st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=5))
def test_turns_share_the_tokens_of_their_history(turns: list[str]) -> None:
    ours = tree()
    text, ids, logp, mask = "", [], [], []
    for n, turn in enumerate(turns):
        text += turn
        ids, logp, mask = ids + [100 + n], logp + [-float(n)], mask + [n % 2]
        ours.insert(text, ids, logp, mask, weight_version=n)
    assert ours.cur_cache_size == len(turns)  # each token once
    assert ours.retrieve_from_text(text + "zz") == (ids + [122, 122], logp + [0.0, 0.0], mask + [0, 0])


def test_what_is_not_known_is_tokenized_and_remembered() -> None:
    ours = tree()
    assert ours.retrieve_from_text("ab") == ([97, 98], [0.0, 0.0], [0, 0])
    assert ours.find_longest_prefix("abc").matched_prefix == "ab"
    assert ours.retrieve_from_text("") == ([], [], [])
    assert StringRadixTrie().retrieve_from_text("ab") == ([], [], [])


def test_log_probs_can_be_left_out() -> None:
    ours = tree()
    ours.insert("ab", [1, 2], [-0.5, -0.25], [0, 1])
    assert ours.retrieve_from_text("abc", return_logprob=False) == ([1, 2, 99], [0.0, 0.0, 0.0], [0, 1, 0])


@pytest.mark.parametrize(
    "given", [("", [1]), ("a", []), ("a", [1, 2], [0.0]), ("a", [1], None, [1, 1]), ("a", list(range(11)))]
)
def test_what_makes_no_sense_is_not_inserted(given: tuple[Any, ...]) -> None:
    ours = tree(max_cache_size=10)
    assert not ours.insert(*given) and nodes(ours) == [ours.root]


@pytest.mark.parametrize("kind", [int, str])
def test_old_versions_go(kind: type[Any]) -> None:
    """Engines report versions as texts: "10" is newer than "9"."""
    ours = tree(gc_threshold_k=5)
    for version in range(3, 12):
        ours.insert(f"text {version}", [version], weight_version=kind(version))
    ours.insert("no version", [1])
    kept = [v for v in range(3, 12) if ours.find_longest_prefix(f"text {v}").matched_prefix == f"text {v}"]
    assert kept == [6, 7, 8, 9, 10, 11]
    assert ours.gc_by_weight_version(kind(15)) == 4 and ours.total_entries == 3
    check(ours)


def test_versions_that_are_names_count_in_their_order() -> None:
    ours = tree(gc_threshold_k=1)
    for version in ("default", "b", "a"):
        ours.insert(version, [1], weight_version=version)
    assert [ours.find_longest_prefix(v).matched_prefix for v in ("default", "b", "a")] == ["", "b", "a"]


def test_an_old_history_stays_while_a_newer_turn_needs_it() -> None:
    ours = tree(gc_threshold_k=0)
    ours.insert("ab", [1, 2], weight_version="1")
    ours.insert("abc", [1, 2, 3], weight_version="2")
    assert ours.find_longest_prefix("abc").token_ids == [1, 2, 3]
    assert not ours.root.children["a"].is_evictable and ours.root.children["a"].children["c"].is_evictable


def test_used_longest_ago_goes_first() -> None:
    ours = tree(max_cache_size=3)
    for text in "abc":
        ours.insert(text, [1])
    ours.find_longest_prefix("a")
    ours.insert("d", [1])
    assert [bool(ours.find_longest_prefix(text).token_ids) for text in "abcd"] == [True, False, True, True]
    assert ours.get_stats()["evicted"] == 1


def test_statistics_and_clear(capsys: pytest.CaptureFixture[str]) -> None:
    ours = tree()
    ours.insert("ab", [1, 2], weight_version=7)
    ours.insert("ac", [3])
    ours.find_longest_prefix("ab")
    ours.find_longest_prefix("x")
    stats = ours.get_stats()
    assert (stats["total_entries"], stats["cur_cache_size"], stats["hit_rate"]) == (2, 3, 0.5)
    ours.pretty_print()
    assert "'b' 2 tokens, version 7" in capsys.readouterr().out
    ours.clear()
    assert ours.get_stats()["total_entries"] == 0 and not ours.find_longest_prefix("ab").matched_prefix


def test_long_texts_are_quick_to_find() -> None:
    """Steps, not seconds: the number of nodes that are visited does not grow with the number of texts."""
    ours = tree(max_cache_size=10**6)
    prompt = "a long prompt that all texts have " * 50
    for n in range(2000):
        ours.insert(f"{prompt}{n:04d}", [n])
    assert ours.root.children["a"].string_key.startswith(prompt)
    depth = max(depth for depth, _ in ours._walk(ours.root, 0))
    assert depth <= 5
