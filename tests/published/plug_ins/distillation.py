"""A teacher's log-probs as the signal, as such plug-ins are written: the reward is the server's answer, the
post-processing turns it into an attribute of the samples, and a loss of its own reads them."""

import torch

from miles.backends.training_utils.loss import get_log_probs_and_entropy
from miles.utils.http_utils import post

LOSS_SAW = []


async def reward_func(args, sample, **kwargs):
    payload = {
        "input_ids": sample.tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return await post(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate", payload)


def post_process_rewards(args, samples, **kwargs):
    rewards = [sample.get_reward_value(args) for sample in samples]
    response_lengths = [sample.response_length for sample in samples]
    teacher_log_probs = [
        torch.tensor([item[0] for item in reward["meta_info"]["input_token_logprobs"][1:]], dtype=torch.float32)
        for reward in rewards
    ]
    teacher_log_probs = [t[-length:] for t, length in zip(teacher_log_probs, response_lengths, strict=False)]
    for sample, t_log_probs in zip(samples, teacher_log_probs, strict=False):
        sample.teacher_log_probs = t_log_probs
    return teacher_log_probs, teacher_log_probs


def loss(args, parallel_state, batch, logits, sum_of_sample_mean):
    out = get_log_probs_and_entropy(
        logits,
        args=args,
        parallel_state=parallel_state,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
    )
    student = torch.cat(out["log_probs"], dim=0)
    teacher = torch.cat(batch["teacher_log_probs"], dim=0).to(student.device)
    LOSS_SAW.append([len(t) for t in batch["teacher_log_probs"]] == batch["response_lengths"])
    gap = sum_of_sample_mean((student - teacher) ** 2)
    if student.numel() == 0:
        gap = gap + 0 * logits.sum()
    return gap, {"gap": gap.clone().detach()}
