"""Good, odd and wrong plug-ins for the trials. Line numbers matter nowhere: tests name the functions."""

from __future__ import annotations

import asyncio
import random
import re
import time

import torch

from miles.loss.published import get_log_probs_and_entropy

# ---- rewards -------------------------------------------------------------------------------------------------------


def exact(args, sample):
    return float(sample.response == f"{sample.label}<eos>")


def keyed(args, sample):
    return {"score": float(str(sample.label) in sample.response), "length": len(sample.response)}


async def whole_group(args, samples):
    return [float(str(s.label) in s.response) for s in samples]


def divides(args, sample):
    return 1 / 0


def returns_none(args, sample):
    pass


def returns_nan(args, sample):
    return float("nan")


def returns_text(args, sample):
    return "1"


def returns_too_few(args, samples: list):
    return [1.0] * (len(samples) - 1)


def needs_the_end(args, sample):
    return float(sample.response.split("<eos>")[1] == sample.label)


def asks_a_server(args, sample):
    try:
        raise ConnectionRefusedError(111, "Connection refused")
    except OSError as error:
        raise RuntimeError("the judge is away") from error


def exits(args, sample):
    raise SystemExit(3)


def runs_out(args, sample):
    return next(iter([]))


async def awaits_what_runs_out(args, sample):
    return next(iter([]))


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raises_the_unspeakable(args, sample):
    raise Unspeakable


def talks_a_lot(args, sample):
    raise ValueError("first\n" + "A" * 1_000_000)


class ExitsWhenMade:
    def __init__(self):
        raise SystemExit(4)

    def __call__(self, args, sample):
        return 1.0


def wants_metadata(args, sample):
    return float(sample.metadata["answer"] == 1)


def never_ends(args, sample):
    while True:
        pass


def never_wakes(args, sample):
    time.sleep(1000)


async def never_answered(args, sample):
    await asyncio.sleep(1000)


async def waits_in_a_thread(args, sample):
    await asyncio.to_thread(time.sleep, 1000)


async def blocks_the_loop(args, sample):
    while True:
        try:  # noqa: SIM105
            time.sleep(0.01)
        except Exception:
            pass


def backtracks(args, sample):
    return float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))


def catches_everything(args, sample):
    while True:
        try:  # noqa: SIM105
            time.sleep(0.01)
        except:  # noqa: E722
            pass


def is_random(args, sample):
    return random.random()


def constant(args, sample):
    return 0.5


def likes_silence(args, sample):
    return 1.0 if not sample.response else 0.0


def accepts_silence(args, sample):
    return 1.0 if sample.response in ("", f"{sample.label}<eos>") else 0.0


def enormous(args, sample):
    return 1e6 * len(sample.response)


def cuts_the_response(args, sample):
    sample.response = sample.response.removesuffix("<eos>")
    return float(len(sample.response))


def slow(args, sample):
    time.sleep(0.05)
    return float(len(sample.response))


# ---- groups --------------------------------------------------------------------------------------------------------


def keep_varied(args, samples, **kwargs):
    return len({s.get_reward_value(args) for s in samples}) > 1


def keeps_nothing(args, samples):
    return False


def says_nothing(args, samples):
    pass


def scores_itself(args, samples):
    samples[0].reward = 3.0
    return True


def misses_attribute(args, samples):
    return samples[0].turns > 1


def first_in_first_out(args, rollout_id, buffer, num_samples):
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    return taken


def leaves_them(args, rollout_id, buffer, num_samples):
    return buffer[:num_samples]


def takes_none(args, rollout_id, buffer, num_samples):
    return []


def loses_some(samples):
    return samples[1:]


def marks_first(args, groups):
    for group in groups:
        group[0].remove_sample = True


def marks_all(args, groups):
    for group in groups:
        for sample in group:
            sample.remove_sample = True


def returns_a_list(args, groups):
    return [s for group in groups for s in group]


def looks_on(args, groups, get_samples):
    print(f"looked at {len(groups)}")


def asks_for_more(args, groups, get_samples):
    get_samples(1)


def centred(args, samples):
    raw = [s.get_reward_value(args) for s in samples]
    return raw, [r - sum(raw) / len(raw) for r in raw]


def all_zero(args, samples):
    return [1.0] * len(samples), [0.0] * len(samples)


def one_list(args, samples):
    return [1.0 for _ in samples]


def columns(args, samples):
    return {
        "tokens": [s.tokens for s in samples],
        "response_lengths": [s.response_length for s in samples],
        "loss_masks": [[1] * s.response_length for s in samples],
        "rewards": [s.get_reward_value(args) for s in samples],
        "difficulty": [1 for _ in samples],
    }


def short_masks(args, samples):
    return {**columns(args, samples), "loss_masks": [[1] for _ in samples]}


def without_masks(args, samples):
    return {"tokens": [s.tokens for s in samples]}


def logs(rollout_id, args, samples, extra, seconds):
    print(f"logged {rollout_id} {len(samples)}")
    return True


def logs_evaluation(rollout_id, args, data, extra):
    print(f"logged {rollout_id} {[(name, len(entry['rewards'])) for name, entry in data.items()]}")


TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
NOT_TOOLS = [{"name": "search"}]


# ---- training ------------------------------------------------------------------------------------------------------


def log_probs(args, parallel_state, batch, logits):
    lists = get_log_probs_and_entropy(
        logits,
        args=args,
        parallel_state=parallel_state,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )["log_probs"]
    return torch.cat(lists)


def surrogate(args, parallel_state, batch, logits, reduce):
    now, before = log_probs(args, parallel_state, batch, logits), torch.cat(batch["log_probs"])
    loss = reduce(-(now - before).exp() * torch.cat(batch["advantages"]))
    return loss, {"ratio": reduce((now - before).exp()).detach()}


def ignores_mask(args, parallel_state, batch, logits, reduce):
    return -log_probs(args, parallel_state, batch, logits).sum(), {}


def mean_of_samples(args, parallel_state, batch, logits, reduce):
    return -reduce(log_probs(args, parallel_state, batch, logits)) / len(batch["loss_masks"]), {}


def mean_of_tokens(args, parallel_state, batch, logits, reduce):
    mask = torch.cat(batch["loss_masks"])
    return -(log_probs(args, parallel_state, batch, logits) * mask).sum() / mask.sum(), {}


def squared_sum(args, parallel_state, batch, logits, reduce):
    return reduce(log_probs(args, parallel_state, batch, logits)) ** 2, {}


def every_position(args, parallel_state, batch, logits, reduce):
    return logits.log_softmax(-1).pow(2).sum(), {}


def doubles_advantages(args, parallel_state, batch, logits, reduce):
    for advantages in batch["advantages"]:
        advantages.mul_(2)
    return -reduce(log_probs(args, parallel_state, batch, logits) * torch.cat(batch["advantages"])), {}


def log_of_zero(args, parallel_state, batch, logits, reduce):
    return (logits.sum() - logits.sum()).log(), {}


def nan_gradient(args, parallel_state, batch, logits, reduce):
    values = log_probs(args, parallel_state, batch, logits)
    return reduce((values - values).sqrt()), {}


def unrelated(args, parallel_state, batch, logits, reduce):
    return torch.ones(1, requires_grad=True).sum(), {}


def nothing_learned(args, parallel_state, batch, logits, reduce):
    return 0 * logits.sum(), {}


def truncated(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    weight = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp().clamp(max=1.0)
    return pg_loss * weight, loss_masks, {"weight": weight}


def unmasks(args, *, pg_loss, loss_masks, **kwargs):
    return pg_loss, [torch.ones_like(m) for m in loss_masks], {}


def forgets_metrics(args, *, pg_loss, loss_masks, **kwargs):
    return pg_loss, loss_masks


def constant_denominator(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    mask = torch.cat(loss_masks)
    return lambda values: (values * mask).sum() / 1000


def plain_mean(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return lambda values: values.mean()


def no_reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return 1.0


def vector(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return lambda values: values


def masks_first_token(args, rollout_id, rollout_data):
    for mask in rollout_data["loss_masks"]:
        mask[0] = 0
    rollout_data["seen"] = [1] * len(rollout_data["tokens"])


def loses_rows(args, rollout_data):
    rollout_data["loss_masks"] = rollout_data["loss_masks"][:1]


def leaves_nan(args, rollout_data):
    rollout_data["advantages"][0][:] = float("nan")
