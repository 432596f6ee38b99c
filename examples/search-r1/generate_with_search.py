"""Retrieval during generation, as in Search-R1 (https://arxiv.org/abs/2503.09516): the model asks, reads, answers.

    <think>look up</think><search>capital Japan</search>                   learned
    <information>Tokyo is the capital of Japan.</information>              not learned: the search engine wrote it
    <answer>Tokyo</answer><|end|>                                          learned

    miles train --config examples/search-r1/search.yaml

All of it is one response. Generation stops at `</search>`, the search engine's answer is appended with loss mask 0 and
log-prob 0.0, and generation goes on from there. Another search engine takes the place of `search` below.
"""

from __future__ import annotations

import asyncio
import re
import string
import time
import weakref
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import Any

from local_search import SearchEngine

from miles.errors import FlagError
from miles.rollout.generate_utils.generate_endpoint_utils import (
    compute_prompt_ids_from_sample,
    compute_request_payload,
    update_sample_from_response,
)
from miles.rollout.sglang_rollout import GenerateState
from miles.types import Sample
from miles.utils.http_utils import post

STOP = ["</search>", "</answer>"]
QUERY = re.compile(r"<search>([^<]*)</search>$")
INFORMATION = re.compile(r"<information>.*?</information>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ARTICLES = re.compile(r"\b(a|an|the)\b")
WELL_FORMED = re.compile(r"<think>[^<]*</think>(<search>[^<]+</search>)+<answer>[^<]+</answer>(<\|end\|>)?")

# Searches that may run at the same time, per event loop.
_slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


async def generate(args: Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Up to `--search-max-turns` turns; `metadata["searches"]` holds the queries that were answered."""
    if args.partial_rollout:
        raise FlagError("--partial-rollout", given="a response that was cut short in a search cannot be continued.")
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    params = {**sampling_params, "stop": STOP}
    sample.tokens = compute_prompt_ids_from_sample(state, sample)
    sample.loss_mask, sample.rollout_log_probs = [], []
    queries: list[str] = []
    for turn in range(args.search_max_turns):
        payload, halt = compute_request_payload(args, sample.tokens, params)
        if payload is None or state.aborted:
            sample.status = Sample.Status.ABORTED if state.aborted else halt
            break
        output = await post(url, payload)
        await update_sample_from_response(args, sample, payload, output, update_loss_mask=True)
        query = QUERY.search(output["text"])
        if sample.status != Sample.Status.COMPLETED or query is None or turn == args.search_max_turns - 1:
            break
        begin = time.perf_counter()
        found = await search(args, query[1].strip())
        sample.non_generation_time += time.perf_counter() - begin
        queries.append(query[1].strip())
        append_observation(sample, f"<information>{' '.join(found)}</information>", state.tokenizer)
    sample.metadata = {**sample.metadata, "searches": queries}
    return sample


async def search(args: Namespace, query: str) -> list[str]:
    """The texts that answer `query`, at most `--search-topk`."""
    engine = SearchEngine.load(args.search_corpus)
    slots = _slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(args.search_concurrency))
    async with slots:
        return await asyncio.to_thread(engine.search, query, args.search_topk)


def append_observation(sample: Sample, text: str, tokenizer: Any) -> None:
    """Add to the response what the model has not said: no loss, log-prob 0.0."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert sample.loss_mask is not None and sample.rollout_log_probs is not None
    sample.tokens = sample.tokens + ids
    sample.response += text
    sample.response_length += len(ids)
    sample.loss_mask = sample.loss_mask + [0] * len(ids)
    sample.rollout_log_probs = sample.rollout_log_probs + [0.0] * len(ids)


async def reward_func(args: Namespace, sample: Sample, **kwargs: Any) -> float:
    """1.0 for the exact answer, `--search-format-score` for a wrong one that was searched for in the right form."""
    said = INFORMATION.sub("", sample.response)
    answers = ANSWER.findall(said)
    if len(answers) == 1 and normalised(answers[0]) in map(normalised, targets(sample.label)):
        return 1.0
    return args.search_format_score if WELL_FORMED.fullmatch(said) else 0.0


def targets(label: Any) -> list[str]:
    """The accepted answers: of a text, a list, or the published `{"ground_truth": {"target": [...]}}`."""
    if isinstance(label, dict):
        return targets(label["ground_truth"] if "ground_truth" in label else label["target"])
    return [str(entry) for entry in label] if isinstance(label, list) else [str(label)]


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces (the exact match of SQuAD).

    Example: `normalised("The Hague.")` is `"hague"`.
    """
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(ARTICLES.sub(" ", plain).split())


def _generate_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--search-corpus", default="examples/search-r1/corpus.jsonl", help='Lines of {"contents": "..."}.')
    add("--search-topk", type=_positive, default=1, help="Texts per query.")
    add("--search-max-turns", type=_positive, default=3, help="Requests per response, that for the answer included.")
    add("--search-concurrency", type=_positive, default=64, help="Searches at the same time.")


def _reward_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--search-format-score", type=float, default=0.1, help="Reward of form without a right answer.")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number >= 1, got {text}")
    return int(text)


generate.add_arguments = _generate_arguments  # type: ignore[attr-defined]
reward_func.add_arguments = _reward_arguments  # type: ignore[attr-defined]
