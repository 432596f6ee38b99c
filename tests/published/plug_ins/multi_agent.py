"""Several agents per prompt, as such plug-ins are written: settings and results live in `args`, samples are lists."""

import asyncio
import random
from copy import deepcopy

from miles.rollout.rm_hub import batched_async_rm
from miles.rollout.sglang_rollout import GenerateState
from miles.utils.http_utils import post
from miles.utils.misc import load_function
from miles.utils.types import Sample

RESULTS = []


async def generate_with_multi_agents(args, sample: Sample, sampling_params, evaluation=False) -> list[Sample]:
    tokenizer = GenerateState(args).tokenizer
    max_context_length = args.rollout_max_context_len if not evaluation else args.eval_max_context_len
    args.sampling_params = sampling_params
    args.rollout_max_context_len = max_context_length
    args.tokenizer = tokenizer

    custom_multi_agent_func = load_function(args.custom_multi_agent_function_path)
    samples = await custom_multi_agent_func(args, sample)
    random.shuffle(samples)
    return samples


async def run_agent_system(args, sample):
    args = deepcopy(args)
    args.sample = sample
    args.results_dict = {"solver": [], "select": []}

    await asyncio.gather(*(solver_worker(args, i) for i in range(args.num_parallel)))
    rewards = await batched_async_rm(args, args.results_dict["solver"])
    for one, reward in zip(args.results_dict["solver"], rewards):
        one.reward = reward
    RESULTS.append((len(rewards), args.incorrect_reward_weight))
    for one in args.results_dict["solver"]:
        one.reward = one.reward * args.correct_reward_weight
    return args.results_dict["solver"]


async def solver_worker(args, worker_id):
    prompt_token_ids = args.tokenizer(args.sample.prompt, add_special_tokens=False)["input_ids"]
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    current_sampling_params = deepcopy(args.sampling_params)
    current_sampling_params["max_new_tokens"] = 8 + worker_id
    payload = {"input_ids": prompt_token_ids, "sampling_params": current_sampling_params, "return_logprob": True}
    output = await post(url, payload)

    sample = deepcopy(args.sample)
    scored = output["meta_info"]["output_token_logprobs"]
    sample.tokens = prompt_token_ids + [item[1] for item in scored]
    sample.response_length = len(scored)
    sample.response = output["text"]
    sample.rollout_log_probs = [item[0] for item in scored]
    sample.status = Sample.Status.COMPLETED
    args.results_dict["solver"].append(sample)
