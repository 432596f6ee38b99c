"""Which request runs in which slot, and what one step does: the synchronous heart of the embedded engine.

A request's life:
 1. `submit` checks it and puts it into `waiting`;
 2. at a step with a free slot and room in the cache it takes the next slot (`_admit`);
 3. all its tokens but the last one are prefilled, or taken from a slot that already holds them: a group of equal
    prompts is computed once;
 4. with scoring, the prompt's log-probs are read off the same pass; `max_new_tokens=0` ends here;
 5. from then on each step feeds its last token and samples the next one, together with all others (`_decode`);
 6. a stop token, stop string, its token limit or the context length ends it (`_collect`);
 7. it leaves its slot to the last running request (`_release`), and its keys and values stay until the slot is needed;
 8. its result waits in `finished` for whoever called `step`.

Everything here runs in one thread (`engine.py` owns that thread and all waiting); nothing here knows about event loops.
"""

from __future__ import annotations

import base64
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from miles.engine.embedded.cache import KVCache
from miles.engine.embedded.model import DecoderModel
from miles.engine.embedded.sampler import BatchSampler
from miles.engine.protocol import (
    BadRequestError,
    FinishReason,
    GenerateRequest,
    GenerateResult,
    SamplingParams,
    TokenLogprob,
    WeightVersionSpan,
)
from miles.errors import EngineError

PREFILL_TOKENS = 8192
"""Padded tokens of one prefill pass."""

SCORE_ROWS = 512
"""Positions whose logits exist at the same time while a prompt is scored."""


@dataclass(eq=False)
class Running:
    """A request inside the engine. `ids` is prompt plus output; all but the last have keys and values once it runs."""

    request: GenerateRequest
    ids: list[int]
    prompt_len: int
    limit: int  # length of `ids` at which it ends
    stop_ids: frozenset[int]
    forbidden: list[int]  # token ids that min_new_tokens keeps away
    seed: int
    started_s: float
    slot: int = -1
    epoch: int = -1
    cached_tokens: int = 0
    logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[TokenLogprob] | None = None
    spans: list[WeightVersionSpan] = field(default_factory=list)
    finish: FinishReason | None = None
    experts: Tensor | None = None  # int32 [len(ids) - 1, layers, top_k], once it has left its slot

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.prompt_len

    @property
    def score_from(self) -> int:
        """First prompt position whose log-prob is still wanted; the prompt's length where none is."""
        start = self.request.logprob_start_len
        wanted = self.request.return_logprob and start >= 0 and self.input_logprobs is None
        return start if wanted else self.prompt_len

    def close_span(self, version: str) -> None:
        """Note that the output since the last span came from weights `version`."""
        start = self.spans[-1].end if self.spans else 0
        if self.num_output > start or not self.spans:
            self.spans.append(WeightVersionSpan(version, start, self.num_output))


@dataclass
class _Batch:
    """Tensors of a decode step, in slot order; advanced in place while the same requests run."""

    tokens: Tensor  # int64 [n], the last token of each request
    positions: Tensor  # int64 [n], its place
    rows: Tensor  # int64 [n], slot * length + position
    mask: Tensor  # additive [n, 1, 1, length]
    longest: int
    sampler: BatchSampler
    min_new: list[Running]  # requests that must not stop yet


class Scheduler:
    """Waiting and running requests, and the step that moves them."""

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Any,
        *,
        max_running_requests: int,
        max_total_tokens: int,
        context_length: int,
        eos_ids: frozenset[int],
        seed: int,
        weight_version: str,
        cache_class: type[KVCache] = KVCache,
    ) -> None:
        self._cache_class = cache_class
        self.model, self.tokenizer = model, tokenizer
        self.max_running_requests, self.context_length, self.eos_ids = max_running_requests, context_length, eos_ids
        self.max_total_tokens = max_total_tokens
        self.weight_version = weight_version
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.finished: list[Running] = []
        self.cache = self._new_cache()
        self.num_steps = 0  # done since the start: whoever looks twice sees whether the engine is alive
        self._batch: _Batch | None = None
        self._seeds = torch.Generator().manual_seed(seed)

    def _new_cache(self) -> KVCache:
        return self._cache_class(
            self.model.shape,
            self.model.cache_dtype,
            self.model.device,
            max_slots=self.max_running_requests,
            max_total_tokens=self.max_total_tokens,
        )

    # ---- the step ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Let waiting requests in, sample one token for every running one, and let finished ones go."""
        self._release(self._admit())
        if self.running:
            tokens, logprobs = self._decode()
            self._release(self._collect(tokens, logprobs))
        self.num_steps += 1

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # ---- in ------------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> Running:
        """Check a request against this model and queue it. Raises BadRequestError."""
        running = self._checked(request)
        self.waiting.append(running)
        return running

    def _checked(self, request: GenerateRequest) -> Running:
        params = request.sampling_params
        ids = request.input_ids
        if ids is None:
            if self.tokenizer is None:
                raise BadRequestError("this engine has no tokenizer: send 'input_ids' instead of 'text'.")
            ids = list(self.tokenizer.encode(request.text))
        if not ids:
            raise BadRequestError("the prompt has no tokens.")
        limit = self._length_limit(len(ids), params)  # first: a prompt of millions of tokens is not looked through
        vocab = self.model.shape.vocab_size
        bad = next((token for token in ids if not 0 <= token < vocab), None)
        if bad is not None:
            raise BadRequestError(f"input_ids: token {bad} is outside the vocabulary of {vocab} tokens.")
        if params.stop and self.tokenizer is None:
            raise BadRequestError("this engine has no tokenizer: use stop_token_ids instead of stop.")
        if request.return_routed_experts and not self.model.shape.num_experts:
            raise BadRequestError("return_routed_experts needs a mixture-of-experts model; this one is dense.")
        if request.return_logprob and request.logprob_start_len > len(ids):
            raise BadRequestError(
                f"logprob_start_len {request.logprob_start_len} is beyond the {len(ids)} prompt tokens."
            )
        stop_ids = params.stop_token_ids | self.eos_ids
        seed = params.sampling_seed
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, (), generator=self._seeds))
        return Running(
            request=request,
            ids=list(ids),
            prompt_len=len(ids),
            limit=limit,
            stop_ids=frozenset() if params.ignore_eos else stop_ids,
            forbidden=sorted(token for token in stop_ids if 0 <= token < vocab),
            seed=seed,
            started_s=time.perf_counter(),
        )

    def _length_limit(self, prompt_len: int, params: SamplingParams) -> int:
        """The sequence length at which a request ends. BadRequestError where the model is too short for it."""
        room, wanted = self.context_length - prompt_len, params.max_new_tokens
        if wanted is None or params.fit_context:
            if room <= 0:
                raise BadRequestError(f"prompt of {prompt_len} tokens fills the context length {self.context_length}.")
            wanted = room if wanted is None else min(wanted, room)
        if wanted > room:
            raise BadRequestError(
                f"prompt of {prompt_len} tokens + max_new_tokens {wanted} exceeds context length "
                f"{self.context_length}. Shorten the prompt or ask for fewer tokens."
            )
        limit = prompt_len + wanted
        if limit > self.max_total_tokens:
            raise BadRequestError(
                f"{limit} tokens do not fit the engine's cache of {self.max_total_tokens} tokens. Ask for fewer tokens "
                "or give the engine more memory (max_total_tokens)."
            )
        return limit

    def _admit(self) -> list[Running]:
        """Give waiting requests slots and keys and values; returns those that only wanted scores."""
        admitted: list[Running] = []
        longest = max((r.limit for r in self.running), default=0)
        while self.waiting:
            longest = max(longest, self.waiting[0].limit)
            if not self.cache.fits(len(self.running) + len(admitted) + 1, longest):
                break
            admitted.append(self.waiting.popleft())
        if not admitted:
            return []
        first = len(self.running)
        need = max(len(r.ids) for r in [*self.running, *admitted])
        if self.cache.reserve(first + len(admitted), need):
            self._batch = None
        self._fill(admitted, first)
        self._batch = None
        done = [r for r in admitted if r.limit == r.prompt_len]
        for r in done:
            r.finish = FinishReason("length", length=0)
        return done

    def _fill(self, admitted: list[Running], first: int) -> None:
        """Slots from `first` on for the admitted, with keys and values of all tokens but the last."""
        leaders, followers = _split_equal_prompts(admitted)
        lookup = self.cache.prefix_lookup()
        prefixes: dict[Running, tuple[int, int]] = {}
        for r in leaders:
            prefix = self.cache.find_prefix(lookup, r.ids, min(len(r.ids) - 1, r.score_from))
            if prefix is not None:
                prefixes[r] = prefix
        self._seat(admitted, first, prefixes)
        self._share([(source, r, length) for r, (source, length) in prefixes.items()])
        self._prefill([(r, prefixes[r][1] if r in prefixes else 0) for r in leaders])
        self._share([(leader.slot, r, len(r.ids) - 1) for r, leader in followers])
        for r in admitted:
            self.cache.contents[r.slot] = r.ids[:-1]

    def _seat(self, admitted: list[Running], first: int, prefixes: dict[Running, tuple[int, int]]) -> None:
        """Slots `first`.. for the admitted: where its prefix lies already if that can be had, else the next one."""
        free = set(range(first, first + len(admitted)))
        for r in admitted:
            r.epoch, r.slot = self.cache.epoch, -1
            if r in prefixes and prefixes[r][0] in free:
                r.slot = prefixes[r][0]
                free.remove(r.slot)
        slots = iter(sorted(free))
        for r in admitted:
            r.slot = r.slot if r.slot >= 0 else next(slots)
        self.running.extend(sorted(admitted, key=lambda r: r.slot))

    def _share(self, copies: list[tuple[int, Running, int]]) -> None:
        """(source slot, request, length): take keys and values that another slot holds."""
        self.cache.copy_prefixes([c[0] for c in copies], [c[1].slot for c in copies], [c[2] for c in copies])
        for _, r, length in copies:
            r.cached_tokens = length if r.num_output == 0 else r.cached_tokens

    def _prefill(self, work: list[tuple[Running, int]]) -> None:
        """Compute keys and values from position `offset` on, for prompts of similar length together."""
        for batch in _prefill_batches([(r, offset) for r, offset in work if len(r.ids) - 1 > offset]):
            width = max(len(r.ids) - 1 - offset for r, offset in batch)
            rows = [r.ids[offset:-1] + [0] * (width - (len(r.ids) - 1 - offset)) for r, offset in batch]
            tokens = torch.tensor(rows, device=self.model.device).flatten()
            self.model.cover_positions(self.cache.length)
            slots, offsets = [r.slot for r, _ in batch], [offset for _, offset in batch]
            positions, places, attend = self.cache.prefill_attention(slots, offsets, width)
            hidden = self.model.forward(tokens, positions, attend, self.cache.recorder(places))
            hidden = hidden.view(len(batch), width, -1)
            for i, (r, offset) in enumerate(batch):
                if r.score_from < r.prompt_len:
                    self._score(r, hidden[i, r.score_from - offset : r.prompt_len - 1 - offset])
        for r, _ in work:
            if r.score_from < r.prompt_len:  # only the last token was asked for: nothing was computed
                r.input_logprobs = [(None, r.ids[r.score_from], None)]

    def _score(self, r: Running, hidden: Tensor) -> None:
        """Log-probs of the prompt's tokens after `score_from`; `hidden` [T, C] are the positions before them."""
        targets = torch.tensor(r.ids[r.score_from + 1 : r.prompt_len], device=hidden.device)
        scores: list[float] = []
        for part, wanted in zip(hidden.split(SCORE_ROWS), targets.split(SCORE_ROWS)):
            logprobs = self.model.log_softmax(self.model.logits(part))
            scores += logprobs.gather(1, wanted.unsqueeze(1)).squeeze(1).tolist()
        rest = zip(scores, r.ids[r.score_from + 1 : r.prompt_len])
        r.input_logprobs = [(None, r.ids[r.score_from], None), *((score, token, None) for score, token in rest)]

    # ---- on ------------------------------------------------------------------------------------------------------

    def _decode(self) -> tuple[list[int], list[float]]:
        """Feed each running request's last token; returns the next tokens and their log-probs, in slot order."""
        longest = self._batch.longest if self._batch is not None else max(len(r.ids) for r in self.running)
        if self.cache.reserve(len(self.running), longest):
            self._batch = None
        batch = self._batch = self._batch or self._make_batch(longest)
        num = len(self.running)
        mask = batch.mask[:, :, :, : batch.longest]
        attend = self.cache.decode_attention(batch.rows, mask, num, batch.longest)
        record = self.cache.recorder(batch.rows)
        logits = self.model.logits(self.model.forward(batch.tokens, batch.positions, attend, record))
        for r in batch.min_new:
            if r.num_output < r.request.sampling_params.min_new_tokens:
                logits[r.slot, r.forbidden] = -math.inf
        tokens, logprobs = batch.sampler.sample(logits)
        batch.tokens = tokens
        batch.positions.add_(1)
        batch.rows.add_(1)
        if batch.longest < self.cache.length:
            batch.mask.view(-1).index_fill_(0, batch.rows, 0.0)
        batch.longest += 1
        return tokens.tolist(), logprobs.tolist()

    def _make_batch(self, longest: int) -> _Batch:
        device, length = self.model.device, self.cache.length
        self.model.cover_positions(length)
        running = self.running
        lengths = [len(r.ids) for r in running]
        positions = torch.tensor(lengths, device=device) - 1
        hidden_from_view = torch.arange(length, device=device) > positions.unsqueeze(1)
        mask = torch.zeros(hidden_from_view.shape, dtype=self.model.dtype, device=device)
        mask.masked_fill_(hidden_from_view, -math.inf)
        params = [r.request.sampling_params for r in running]
        return _Batch(
            tokens=torch.tensor([r.ids[-1] for r in running], device=device),
            positions=positions,
            rows=torch.arange(len(running), device=device) * length + positions,
            mask=mask[:, None, None, :],
            longest=longest,
            sampler=BatchSampler(params, [r.seed for r in running], lengths, device, self.model.log_softmax),
            min_new=[r for r in running if r.num_output < r.request.sampling_params.min_new_tokens],
        )

    # ---- out -----------------------------------------------------------------------------------------------------

    def _collect(self, tokens: list[int], logprobs: list[float]) -> list[Running]:
        """Append the new tokens; returns the requests that they end."""
        if not math.isfinite(sum(logprobs)):
            raise EngineError("the model's logits are not finite: its weights have diverged or are damaged.")
        done = []
        for r, token, logprob in zip(self.running, tokens, logprobs):
            r.ids.append(token)
            r.logprobs.append(logprob)
            if token in r.stop_ids:
                r.finish = FinishReason("stop", matched=token)
            elif r.request.sampling_params.stop and (matched := self._matched_stop(r)) is not None:
                r.finish = FinishReason("stop", matched=matched)
            elif len(r.ids) >= r.limit:
                r.finish = FinishReason("length", length=r.num_output)
            else:
                continue
            done.append(r)
        return done

    def _matched_stop(self, r: Running) -> str | None:
        """The stop string that the newest token completed. A string of k characters spans at most k tokens."""
        stops = r.request.sampling_params.stop
        window = min(max(map(len, stops)) + 1, r.num_output)
        tail = self.tokenizer.decode(r.ids[-window:])
        return next((stop for stop in stops if stop in tail), None)

    def _release(self, done: Sequence[Running]) -> None:
        """Move finished requests out; the last running ones take their slots. Slots left keep what they hold."""
        if not done:
            return
        num = len(self.running) - len(done)
        leaving = set(done)
        holes = [r.slot for r in done if r.slot < num]
        movers = [r for r in self.running[num:] if r not in leaving]
        used = max(len(r.ids) for r in self.running)
        self.cache.swap(holes, [r.slot for r in movers], min(used, self.cache.length))
        for hole, mover in zip(holes, movers):
            gone = self.running[hole]
            self.running[hole], self.running[mover.slot] = mover, gone
            gone.slot, mover.slot = mover.slot, hole
        del self.running[num:]
        for r in done:
            self.cache.contents[r.slot] = r.ids[:-1] if r.epoch == self.cache.epoch else []
            self._vacate(r)
        self.finished.extend(done)
        self._batch = None

    def _vacate(self, r: Running) -> None:
        """Take what a request's result needs from its slot."""
        if r.request.return_routed_experts:
            r.experts = self.cache.experts_of(r.slot, len(r.ids) - 1)
        r.slot = -1

    # ---- between steps -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def abort(self, matches: Callable[[Running], bool], message: str) -> None:
        """End requests with what they have so far."""
        chosen = [r for r in [*self.waiting, *self.running] if matches(r)]
        for r in chosen:
            r.finish = FinishReason("abort", message=message)
        self.finished += [r for r in self.waiting if r.finish is not None]
        self.waiting = deque(r for r in self.waiting if r.finish is None)
        self._release([r for r in self.running if r.finish is not None])

    def retract(self) -> None:
        """Put running requests back to the head of the queue; their keys and values will be computed again."""
        self.waiting.extendleft(reversed(self.running))
        for r in self.running:
            self._vacate(r)
        self.running = []
        self._batch = None

    def flush(self) -> bool:
        """Forget shared prefixes; False (and nothing done) while requests run."""
        if self.running:
            return False
        self.cache.flush()
        return True

    def set_weights(self, load: Callable[[], None], version: str) -> None:
        """Change weights between two steps. Running requests go on with the keys and values they have."""
        load()
        for r in [*self.waiting, *self.running]:
            if r.num_output:
                r.close_span(self.weight_version)
        self.weight_version = version
        self.cache.flush()
        if (self.cache.dtype, self.cache.device) != (self.model.cache_dtype, self.model.device):
            self.retract()
            self.cache = self._new_cache()

    def fail_all(self) -> list[Running]:
        """Forget all requests and the cache after a failed step; returns the requests."""
        lost = [*self.waiting, *self.running, *self.finished]
        self.waiting.clear()
        self.running, self.finished, self._batch = [], [], None
        self.cache = self._new_cache()
        return lost

    # ---- results -------------------------------------------------------------------------------------------------

    def result(self, r: Running) -> GenerateResult:
        """What a finished request returns."""
        assert r.finish is not None
        r.close_span(self.weight_version)
        request, output_ids = r.request, r.ids[r.prompt_len :]
        result = GenerateResult(
            rid=request.rid,
            text=self._text(r, output_ids),
            output_ids=output_ids,
            finish_reason=r.finish,
            prompt_tokens=r.prompt_len,
            cached_tokens=min(r.cached_tokens, r.prompt_len),
            weight_versions=r.spans,
            e2e_latency_s=time.perf_counter() - r.started_s,
        )
        if r.experts is not None:
            result.routed_experts = base64.b64encode(r.experts.cpu().numpy().astype("<i4").tobytes()).decode("ascii")
        if request.return_logprob:
            result.output_logprobs, result.input_logprobs = r.logprobs, r.input_logprobs
            if request.return_text_in_logprobs and self.tokenizer is not None:
                decode = self.tokenizer.decode
                result.output_texts = [decode([token]) for token in output_ids]
                result.input_logprobs = [(p, token, decode([token])) for p, token, _ in r.input_logprobs or []]
        return result

    def _text(self, r: Running, output_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        assert r.finish is not None
        params, matched = r.request.sampling_params, r.finish.matched
        if isinstance(matched, int) and not params.no_stop_trim:
            output_ids = output_ids[:-1]
        text: str = self.tokenizer.decode(
            output_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        if isinstance(matched, str) and (place := text.find(matched)) >= 0:
            text = text[: place + len(matched) if params.no_stop_trim else place]
        return text


def _split_equal_prompts(admitted: list[Running]) -> tuple[list[Running], list[tuple[Running, Running]]]:
    """(requests to compute, [(request, the one with the same tokens)]). Requests to be scored are always computed."""
    first: dict[tuple[int, ...], Running] = {}
    leaders, followers = [], []
    for r in admitted:
        leader = first.setdefault(tuple(r.ids), r)
        if leader is r or r.score_from < r.prompt_len:
            leaders.append(r)
        else:
            followers.append((r, leader))
    return leaders, followers


def _prefill_batches(work: list[tuple[Running, int]]) -> list[list[tuple[Running, int]]]:
    """Similar lengths together: at most half of a batch is padding, and at most PREFILL_TOKENS in all."""
    batches: list[list[tuple[Running, int]]] = []
    width = 0
    for r, offset in sorted(work, key=lambda item: item[1] - len(item[0].ids)):
        length = len(r.ids) - 1 - offset
        if not batches or 2 * length < width or (len(batches[-1]) + 1) * width > PREFILL_TOKENS:
            batches.append([])
            width = length
        batches[-1].append((r, offset))
    return batches
