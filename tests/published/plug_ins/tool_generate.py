"""Code tools during generation, as such plug-ins are written: attributes of their own on samples, a reward that is a
dict, a string as status."""

from typing import Any

try:
    import wandb
except ImportError:
    wandb = None

from miles.rollout.sglang_rollout import GenerateState
from miles.utils.http_utils import post
from miles.utils.types import Sample

SEEN = []


async def generate(args, sample: Sample, sampling_params, evaluation: bool = False) -> Sample:
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_tokens_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    max_context_length = args.rollout_max_context_len if args.rollout_max_context_len is not None else 64
    if len(prompt_tokens_ids) >= max_context_length:
        sample.status = Sample.Status.TRUNCATED
        return sample

    payload = {"input_ids": prompt_tokens_ids, "sampling_params": sampling_params, "return_logprob": True}
    if wandb is not None and wandb.run is not None:
        wandb.log({"debug/payload_length": len(payload["input_ids"])})
    output = await post(url, payload)
    pairs = [(item[1], item[0]) for item in output["meta_info"]["output_token_logprobs"]]
    sample.update_from_meta_info(args, output["meta_info"])
    tokens, log_probs = [list(column) for column in zip(*pairs)]
    tool_text = state.tokenizer.encode("7", add_special_tokens=False)

    sample.tokens = prompt_tokens_ids + tokens + tool_text
    sample.response = output["text"] + "7"
    sample.response_length = len(tokens) + len(tool_text)
    sample.loss_mask = [1] * len(tokens) + [0] * len(tool_text)
    sample.rollout_log_probs = log_probs + [0.0] * len(tool_text)
    # Statuses of environments are plain strings.
    sample.status = "truncated" if sample.status == Sample.Status.TRUNCATED else "completed"
    sample.tool_call_count = 1
    sample.payload_text = sample.prompt + sample.response
    sample.payload_has_system = "system" in sample.payload_text
    return sample


async def reward_func(args, sample, **kwargs) -> dict[str, Any]:
    SEEN.append((sample.status, sample.tool_call_count))
    result = {"score": float(sample.response.count("7")), "pred": ""}
    if result["score"] < 2:
        result["score"] = min(-0.6, result["score"] - 2 + sample.tool_call_count / 2 * 0.1)
    if result["pred"] is None:
        result["pred"] = ""
    return result
