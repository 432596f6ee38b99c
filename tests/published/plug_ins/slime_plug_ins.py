"""Plug-ins as they are written for slime, imports included."""

import torch
from slime.backends.megatron_utils.cp_utils import get_sum_of_sample_mean
from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, policy_loss_function
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

POSTPROCESSED = []
MASKED = []


async def generate(args, sample: Sample, sampling_params) -> Sample:
    from slime.utils.misc import load_function

    assert load_function("slime.utils.types.Sample") is Sample
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_ids = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
    payload = {"input_ids": prompt_ids, "sampling_params": sampling_params, "return_logprob": True}
    output = await post(url, payload)
    scored = output["meta_info"]["output_token_logprobs"]
    sample.tokens = prompt_ids + [item[1] for item in scored]
    sample.response = output["text"]
    sample.response_length = len(scored)
    sample.rollout_log_probs = [item[0] for item in scored]
    sample.status = Sample.Status.COMPLETED
    return sample


def rollout_data_postprocess(args, rollout_id, rollout_data):
    POSTPROCESSED.append(rollout_id)
    for i, mask in enumerate(rollout_data["loss_masks"]):
        mask = mask.clone()
        mask[0] = 0
        rollout_data["loss_masks"][i] = mask
    rollout_data["turn"] = [float(rollout_id)] * len(rollout_data["tokens"])


def custom_loss(args, batch, logits, sum_of_sample_mean):
    result = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
    )
    MASKED.append(all(int(mask[0]) == 0 for mask in batch["loss_masks"]) and len(batch["turn"]) == len(mask_of(batch)))
    log_probs = torch.cat(result["log_probs"])
    loss = -sum_of_sample_mean(log_probs * torch.cat(batch["advantages"]))
    return loss, {"loss": loss.clone().detach(), "entropy": sum_of_sample_mean(torch.cat(result["entropy"])).detach()}


def custom_policy_loss(args, batch, logits, sum_of_sample_mean):
    loss, metrics = policy_loss_function(args, batch, logits, sum_of_sample_mean)
    reduce = get_sum_of_sample_mean(
        batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], args.calculate_per_token_loss
    )
    return loss, {**metrics, "mean_advantage": reduce(torch.cat(batch["advantages"]))}


def mask_of(batch):
    return batch["loss_masks"]


def custom_tis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    assert "parallel_state" not in kwargs or kwargs["parallel_state"] is not None
    return pg_loss, loss_masks, {"ratio": torch.exp(torch.cat(train_log_probs) - torch.cat(rollout_log_probs))}


def strict_tis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths):
    return pg_loss, loss_masks, {"strict": torch.ones_like(pg_loss)}
