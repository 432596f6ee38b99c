"""A sample from the radix tree of the router: the tokens of its whole text as engines generated them.

`miles.router.middleware_hub.radix_tree_middleware` answers `/retrieve_from_text`, and has the published name of
`postprocess_sample_with_radix_tree`.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from miles.engine.calls import post
from miles.errors import EngineError
from miles.rollout.generate_utils.generate_endpoint_utils import routed_experts_of
from miles.types import Sample

MIDDLEWARE = "RadixTreeMiddleware"


def uses_radix_tree(args: Namespace) -> bool:
    """Whether requests of this run pass the tree. Partial rollouts do without it: they resume from their own tokens."""
    paths = args.miles_router_middleware_paths or ()
    named = any(path.replace(":", ".").rpartition(".")[2] == MIDDLEWARE for path in paths)
    return bool(named and args.use_miles_router and not args.partial_rollout)


async def postprocess_sample_with_radix_tree(args: Namespace, sample: Sample, output: dict[str, Any]) -> Sample:
    """Fill `sample`, whose prompt is a text, from the tree after one /generate of which `output` is the answer.

    Sets tokens, response, loss mask and log-probs of the response, which begins at the first generated token. Raises
    EngineError where the tree does not have the response (another router answered, or it was forgotten).
    """
    assert not args.partial_rollout, "the radix tree does not go together with --partial-rollout"
    assert isinstance(sample.prompt, str), "the radix tree needs prompts that are texts"
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/retrieve_from_text"
    known = await post(url, {"text": sample.prompt + sample.response + output["text"]})
    tokens, mask = known["tokens"], known["loss_mask"]
    generated = [item[1] for item in output["meta_info"].get("output_token_logprobs") or ()]
    if generated and (tokens[-len(generated) :] != generated or not all(mask[-len(generated) :])):
        raise EngineError(
            f"{url} does not know the {len(generated)} tokens that were generated for sample {sample.index}. "
            f"{MIDDLEWARE} must be the innermost middleware that answers /generate."
        )
    length = len(mask) - mask.index(1) if 1 in mask else 0
    begin = len(tokens) - length
    sample.tokens = tokens
    sample.response += output["text"]
    sample.response_length = length
    sample.loss_mask = mask[begin:]
    sample.rollout_log_probs = known["rollout_logp"][begin:]
    sample.rollout_routed_experts = routed_experts_of(args, sample, output["meta_info"])
    sample.update_from_meta_info(args, output["meta_info"])
    return sample
