"""On-policy distillation: the student samples, a teacher says how likely each sampled token is.

    student's response ──► reward_func: POST <teacher>/generate, no new token ──► reward: {"teacher_log_probs", "score"}
                                     post_process_rewards ──► sample.teacher_log_probs
                 --advantage-estimator on_policy_distillation: log pi_teacher - log pi_student, per token

The teacher is any engine that speaks SGLang's API: a real SGLang server, or `miles serve`. Its address is --rm-url,
with or without the path /generate. Student and teacher must have the same tokenizer: the teacher is sent token ids.

    --custom-rm-path examples/on_policy_distillation/on_policy_distillation.py:reward_func
    --custom-reward-post-process-path examples/on_policy_distillation/on_policy_distillation.py:post_process_rewards

The reward is a dict for two reasons: the log-probs must get from the one function to the other, and a number is what a
person wants to see. `score` (--reward-key score) is 1.0 where the response answers the label, and no gradient uses it.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from miles.utils.http_utils import post
from miles.utils.types import Sample

# How often a teacher that does not answer is asked again, a second apart.
ATTEMPTS = 5


async def reward_func(args: Namespace, sample: Sample, **kwargs: Any) -> dict[str, Any]:
    """Ask the teacher for its log-probs of the response. Example: `{"score": 0.0, "teacher_log_probs": [-0.1, -2]}`."""
    score = float(sample.response.rpartition("</think>")[2].removesuffix("<eos>") == sample.label)
    if sample.response_length == 0:
        return {"score": score, "teacher_log_probs": []}
    if not args.rm_url:
        raise ValueError("--rm-url: expected the address of the teacher's server, for instance http://127.0.0.1:30000")
    answer = await post(address(args.rm_url), request(sample), max_retries=ATTEMPTS)
    scored = answer["meta_info"]["input_token_logprobs"][-sample.response_length :]
    ids = [entry[1] for entry in scored]
    if ids != sample.tokens[-sample.response_length :]:
        raise ValueError(
            f"{args.rm_url}: the teacher scored the tokens {ids[:8]}..., expected those of the response, "
            f"{sample.tokens[-sample.response_length :][:8]}... Student and teacher need the same tokenizer."
        )
    return {"score": score, "teacher_log_probs": [entry[0] for entry in scored]}


def request(sample: Sample) -> dict[str, Any]:
    """SGLang's request for the log-probs of tokens that exist already, at temperature 1, the student's own."""
    return {
        "input_ids": sample.tokens,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def address(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/generate") else f"{url}/generate"


def post_process_rewards(args: Namespace, samples: list[Sample], **kwargs: Any) -> tuple[list[float], list[float]]:
    """Hang the teacher's log-probs on the samples. The numbers that come back are for the eye alone."""
    for sample in samples:
        sample.teacher_log_probs = sample.reward["teacher_log_probs"]
    scores = [sample.reward["score"] for sample in samples]
    return scores, scores
