"""Plug-ins written for Megatron: hooks that note what they see, model providers, a reducer, a loss. Nothing is of miles
but what published plug-ins import from it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from miles.backends.training_utils.loss import get_log_probs_and_entropy

SEEN: list[dict[str, Any]] = []


# ---- hooks -----------------------------------------------------------------------------------------------------------


def init(args: Namespace) -> None:
    groups = "none"
    if torch.distributed.is_initialized():
        from megatron.core import mpu

        if mpu.model_parallel_is_initialized():
            groups = f"tp{mpu.get_tensor_model_parallel_rank()} pp{mpu.get_pipeline_model_parallel_rank()}"
    args.seen_by_init = True
    SEEN.append({"call": "init", "args": id(args), "groups": groups})


def before_log_prob(args: Namespace, model: list[torch.nn.Module], store_prefix: str) -> None:
    SEEN.append({"call": "log_prob", "prefix": store_prefix, **state_of(args, model)})


def before_train_step(
    args: Namespace,
    rollout_id: int,
    step_id: int,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
) -> None:
    largest = max((float(g.abs().max()) for chunk in model for g in gradients(chunk)), default=0.0)
    SEEN.append(
        {
            "call": "train_step", "rollout": rollout_id, "step": step_id, "gradient": largest,
            "rates": len(optimizer.param_groups), "steps_done": opt_param_scheduler.num_steps, **state_of(args, model),
        }
    )  # fmt: skip


def gradients(chunk: Any) -> list[torch.Tensor]:
    found = [getattr(p, "main_grad", p.grad) for p in chunk.parameters()]
    return [g.to_local() if hasattr(g, "to_local") else g for g in found if g is not None and g.numel()]


def state_of(args: Namespace, model: list[Any]) -> dict[str, Any]:
    weights = [p.to_local() if hasattr(p, "to_local") else p for chunk in model for p in chunk.parameters()]
    return {
        "args": id(args),
        "same_args": args.seen_by_init,
        "chunks": len(model) if type(model) is list else None,
        "role": model[0].role,
        "training": [module.training for chunk in model for module in chunk.modules()],
        "grad": torch.is_grad_enabled(),
        "weights": sum(float(w.detach().double().abs().sum()) for w in weights),
    }


# ---- models ----------------------------------------------------------------------------------------------------------


def gpt_model(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    """Megatron's own model, with its own rotary positions."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    from miles.backends.megatron_utils.layer_specs import get_decoder_block_spec

    args = get_args()
    SEEN.append({"call": "model", "args": id(args), "stages": (pre_process, post_process)})
    config = core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_decoder_block_spec(config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
    )


def built_in(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    from megatron.training import get_args

    from miles.backends.megatron_utils.model_provider import get_model_provider_func

    critic = get_model_provider_func(get_args(), role="critic")(pre_process, post_process, vp_stage)
    SEEN.append({"call": "built_in", "values": tuple(critic.output_layer.weight.shape)})
    return get_model_provider_func(get_args())(pre_process, post_process, vp_stage)


def nothing(pre_process: bool = True, post_process: bool = True) -> Any:
    return None


def linear(pre_process: bool = True, post_process: bool = True) -> Any:
    return torch.nn.Linear(2, 2)


def narrow(pre_process: bool = True, post_process: bool = True) -> Any:
    import copy

    from megatron.training import get_args

    from miles.backends.megatron_utils.model_provider import get_model_provider_func

    args = copy.copy(get_args())
    args.ffn_hidden_size //= 2
    return get_model_provider_func(args)(pre_process, post_process)


def with_more(pre_process: bool = True, post_process: bool = True) -> Any:
    model = built_in(pre_process, post_process)
    model.extra = torch.nn.Parameter(torch.zeros(3))
    return model


def of_another_layout(pre_process: bool = True, post_process: bool = True) -> Any:
    model = built_in(pre_process, post_process)
    model.config.sequence_parallel = True
    return model


def small_vocabulary(pre_process: bool = True, post_process: bool = True) -> Any:
    model = built_in(pre_process, post_process)
    model.vocab_size = 8
    return model


REFUSED = {
    "nothing": "returned None, expected a model",
    "linear": "returned a torch.nn.modules.linear.Linear without config, vocab_size",
    "narrow": "0.decoder.layers.0.mlp.linear_fc1.weight: [48, 32], expected [96, 32]",
    "with_more": "0.extra [3] has no counterpart",
    "of_another_layout": "config.sequence_parallel True, this run has False",
    "small_vocabulary": "vocab_size 8, expected a multiple of 1 from 41 on",
}


# ---- losses ----------------------------------------------------------------------------------------------------------


def reducer_of_mpu(
    total_lengths: list[int], response_lengths: list[int], masks: list[torch.Tensor], calculate_per_token_loss: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The sum over tokens by a constant; with context parallelism the mask of this rank's tokens."""
    from megatron.core import mpu

    from miles.backends.training_utils.cp_utils import slice_log_prob_with_cp
    from miles.backends.training_utils.parallel import ParallelState

    size = mpu.get_context_parallel_world_size()
    if size > 1:
        state = ParallelState.single_process()
        state.cp_rank, state.cp_size = mpu.get_context_parallel_rank(), size
        state.cp_group = mpu.get_context_parallel_group()
        masks = [
            slice_log_prob_with_cp(mask, total, length, state)
            for mask, total, length in zip(masks, total_lengths, response_lengths)
        ]
    mask = torch.cat(masks)
    return lambda loss: (loss * mask).sum() / 16


def reducer_without_mpu(
    total_lengths: list[int], response_lengths: list[int], masks: list[torch.Tensor], calculate_per_token_loss: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same, for the process that everything is compared with."""
    return lambda loss: (loss * torch.cat(masks)).sum() / 16


def loss(args: Namespace, parallel_state: Any, batch: dict[str, Any], logits: torch.Tensor, reduce: Any) -> Any:
    """REINFORCE with an entropy bonus, from the helpers that published losses use."""
    lengths = {"total_lengths": batch["total_lengths"], "response_lengths": batch["response_lengths"]}
    found = get_log_probs_and_entropy(
        logits, args=args, parallel_state=parallel_state, unconcat_tokens=batch["unconcat_tokens"], with_entropy=True,
        max_seq_lens=batch["max_seq_lens"], **lengths,
    )  # fmt: skip
    now, old = torch.cat(found["log_probs"]), torch.cat(batch["log_probs"])
    entropy = reduce(torch.cat(found["entropy"]))
    value = reduce(-(now - old).exp() * torch.cat(batch["advantages"])) - 0.01 * entropy
    if not len(now):
        value = value + 0 * logits.sum()
    return value, {"loss": value.detach(), "own_entropy": entropy.detach()}
