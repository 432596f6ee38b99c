"""Plug-ins of the trainer, the router and the built-in generate functions."""

from __future__ import annotations

SEEN: list[object] = []


def post_one(args):
    SEEN.append(("one", args))


def post_two(args, rollout_data):
    SEEN.append(("two", rollout_data))


def post_guide(args, samples):
    SEEN.append(("two", samples))


def post_three(args, rollout_id, rollout_data):
    SEEN.append(("three", rollout_id, rollout_data))


def post_two_with_option(args, rollout_data, verbose=False):
    SEEN.append(("two", rollout_data))


def post_anything(*args):
    SEEN.append(args)


def loss_five(args, parallel_state, batch, logits, sum_of_sample_mean):
    return sum_of_sample_mean(logits), {"parallel_state": parallel_state}


def loss_four(args, batch, logits, sum_of_sample_mean):
    return sum_of_sample_mean(logits), {"batch": batch}


def loss_four_with_option(args, batch, logits, reducer, scale=1.0):
    return reducer(logits), {"scale": scale}


def loss_anything(*args):
    return 0, {}


def loss_scalar(args, batch, logits, sum_of_sample_mean):
    return 0


def tis(args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, parallel_state):
    return pg_loss, loss_masks, {"parallel_state": parallel_state}


def tis_keywords(*, pg_loss, loss_masks, **kwargs):
    return pg_loss, loss_masks, {"keys": sorted(kwargs)}


def tis_without_state(args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths):
    return pg_loss, loss_masks, {}


def tis_pair(**kwargs):
    return 1, 2


def tis_unknown(pg_loss, weights):
    return pg_loss


def reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return lambda x: sum(x) / 100


def reducer_scalar(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    return 0.5


def provider(pre_process, post_process):
    return ("model", pre_process, post_process)


def provider_with_stage(pre_process=True, post_process=True, vp_stage=None):
    return ("model", pre_process, post_process, vp_stage)


def provider_with_kwargs(**kwargs):
    return kwargs


def provider_nothing(pre_process, post_process):
    return None


def megatron_init(args):
    SEEN.append("init")


def before_log_prob(args, model, store_prefix):
    SEEN.append(store_prefix)


def before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    SEEN.append((rollout_id, step_id))


def post_save(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    SEEN.append(checkpoint_dir)


async def async_init(args):
    SEEN.append("never awaited")


def hidden_coroutine(args):
    return async_init(args)


class Middleware:
    def __init__(self, app, *, router):
        self.app, self.router = app, router


class Outer(Middleware):
    pass


class WithoutRouter:
    def __init__(self, app):
        self.app = app


async def agent(base_url, prompt, request_kwargs):
    return base_url


async def agent_with_metadata(base_url, prompt, request_kwargs, metadata=None, **kwargs):
    return metadata


specs = [{"type": "function", "function": {"name": "add"}}]


async def execute(name, params):
    return f"{name}{params}"


def execute_in_thread(name, params):
    return str(len(params))


async def execute_number(name, params):
    return 3
