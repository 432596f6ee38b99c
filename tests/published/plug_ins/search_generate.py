"""Retrieval during generation, as such plug-ins are written: text in, text out, observations masked."""

import re

from miles.rollout.sglang_rollout import GenerateState
from miles.utils.http_utils import post
from miles.utils.types import Sample

CONFIGS = {"max_turns": 2, "return_logprob": True}
CALLS = {"search": 0, "reward": 0}


async def search(query):
    CALLS["search"] += 1
    return "12"


async def execute_predictions(prediction):
    # Every digit counts as a query, so that the untrained model asks now and then.
    found = re.search(r"\d", prediction)
    return (await search(found.group(0)), False) if found else ("", True)


async def generate(args, sample: Sample, sampling_params) -> Sample:
    assert not args.partial_rollout, "Partial rollout is not supported for this function at the moment."

    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_text = sample.prompt
    prompt_tokens_ids = state.tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    response = ""
    response_token_ids = []
    loss_mask = []
    rollout_log_probs = [] if CONFIGS["return_logprob"] else None

    for turn in range(CONFIGS["max_turns"]):
        payload = {"text": prompt_text + response, "sampling_params": {**sampling_params, "max_new_tokens": 12}}
        if CONFIGS["return_logprob"]:
            payload["return_logprob"] = True
        output = await post(url, payload)

        if output["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample

        cur_response = output["text"]
        logprobs = output["meta_info"]["output_token_logprobs"]
        cur_response_token_ids = [item[1] for item in logprobs]
        rollout_log_probs += [item[0] for item in logprobs]
        response += cur_response
        response_token_ids += cur_response_token_ids
        loss_mask += [1] * len(cur_response_token_ids)

        next_obs, done = await execute_predictions(cur_response)
        if done or turn == CONFIGS["max_turns"] - 1:
            break

        obs_tokens_ids = state.tokenizer(next_obs, add_special_tokens=False)["input_ids"]
        response += next_obs
        response_token_ids += obs_tokens_ids
        loss_mask += [0] * len(obs_tokens_ids)
        rollout_log_probs += [0.0] * len(obs_tokens_ids)

    sample.tokens = prompt_tokens_ids + response_token_ids
    sample.response_length = len(response_token_ids)
    sample.response = response
    sample.loss_mask = loss_mask
    sample.rollout_log_probs = rollout_log_probs
    sample.prompt = prompt_text

    match output["meta_info"]["finish_reason"]["type"]:
        case "length":
            sample.status = Sample.Status.TRUNCATED
        case "abort":
            sample.status = Sample.Status.ABORTED
        case "stop":
            sample.status = Sample.Status.COMPLETED
    return sample


async def reward_func(args, sample, **kwargs):
    if not isinstance(sample, Sample):
        raise TypeError("Sample must be an instance of Sample class.")
    CALLS["reward"] += 1
    return sum(char in sample.label for char in sample.response) / max(len(sample.response), 1)
