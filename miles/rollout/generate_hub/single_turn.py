"""The built-in generate function: one request, one response, resumed where an abort cut it short."""

from __future__ import annotations

from typing import Any

from miles.errors import UsageError
from miles.rollout.generate_utils.generate_endpoint_utils import (
    compute_prompt_ids_from_sample,
    compute_request_payload,
    update_sample_from_response,
)
from miles.rollout.generate_utils.radix_tree import postprocess_sample_with_radix_tree, uses_radix_tree
from miles.types import GenerateFnInput, GenerateFnOutput, Sample

# Characters of a prompt that an error shows.
EXCERPT = 60


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """Fill `input.sample` from one engine call.

    A sample that was aborted goes on from its tokens with what is left of `max_new_tokens`; none left, or a full
    context, makes it TRUNCATED without a request.
    """
    state: Any = input.state
    sample, params = input.sample, dict(input.sampling_params)
    assert sample.status in (Sample.Status.PENDING, Sample.Status.ABORTED), f"sample is {sample.status}"
    if sample.tokens:
        input_ids = sample.tokens
        if params.get("max_new_tokens") is not None:
            params["max_new_tokens"] -= sample.response_length
            if params["max_new_tokens"] <= 0:
                sample.status = Sample.Status.TRUNCATED
                return GenerateFnOutput(samples=sample)
    else:
        input_ids = compute_prompt_ids_from_sample(state, sample)

    payload, halt = compute_request_payload(input.args, input_ids, params, sample.multimodal_inputs)
    if payload is None:
        assert halt is not None
        if not sample.tokens:
            raise UsageError(
                f"sample {sample.index} (group {sample.group_index}): its prompt of {len(input_ids)} tokens leaves no "
                f"room for a response in the context of the model. It begins {str(sample.prompt)[:EXCERPT]!r}. Leave "
                "such prompts out with --rollout-max-prompt-len, or shorten it."
            )
        sample.status = halt
        return GenerateFnOutput(samples=sample)
    output = await state.context.client.generate(payload)
    if uses_radix_tree(input.args) and state.tokenizer.decode(input_ids) == f"{sample.prompt}{sample.response}":
        await postprocess_sample_with_radix_tree(input.args, sample, output)
        return GenerateFnOutput(samples=sample)
    await update_sample_from_response(input.args, sample, payload, output)
    return GenerateFnOutput(samples=sample)
