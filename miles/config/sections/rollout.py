"""From prompt to scored samples: data, sampling, evaluation, rewards."""

# ruff: noqa: RUF009  (`flag` declares a field; it makes no value that instances would share)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from miles.config.evaluation import EvalDatasetConfig
from miles.config.flags import (
    FRACTION,
    JSON_OBJECT,
    PATH,
    REQUIRED,
    TOP_K,
    Section,
    at_least,
    derived,
    flag,
    no_meaning_here,
    not_built,
)

FOR_PLUGINS = "Read by plug-ins only: "


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Section):
    """How responses are generated.

    Example: `RolloutConfig(hf_checkpoint="models/base", rollout_max_response_len=36, rollout_temperature=1.0)`
    """

    hf_checkpoint: str | None = flag(
        None, "Hugging Face folder: tokenizer, architecture and first weights.", check=PATH, common=True
    )
    model_name: str | None = flag(
        None,
        "Name under which a weight converter is looked up.",
        status=no_meaning_here("converters follow from config.json."),
    )
    rollout_temperature: float = flag(
        1.0,
        "Sampling temperature; the trainer divides its logits by it, too.",
        check=at_least(0),
        common=True,
    )
    rollout_top_p: float = flag(1.0, "Sample from the smallest set of tokens with this probability.", check=FRACTION)
    rollout_top_k: int = flag(-1, "Sample from the k likeliest tokens.", check=TOP_K)
    rollout_max_context_len: int | None = flag(None, "Most tokens of prompt and response together.", check=at_least(2))
    rollout_max_prompt_len: int | None = flag(
        None, "Training prompts with more tokens are left out.", check=at_least(1)
    )
    rollout_max_response_len: int | None = flag(None, "Most tokens of a response.", check=at_least(1), common=True)
    rollout_skip_special_tokens: bool = flag(False, "Leave special tokens out of the response text.")
    rollout_stop: list[str] | None = flag(None, "Texts that end a response.")
    rollout_stop_token_ids: list[int] | None = flag(None, "Token ids that end a response.")
    rollout_shuffle: bool = flag(False, "Shuffle the training prompts anew in each epoch.", common=True)
    rollout_seed: int = flag(42, "Seed of the shuffling and of the samples' own seeds.")
    over_sampling_batch_size: int | None = flag(
        None, "Prompts fetched at a time; --rollout-batch-size when unset.", check=at_least(1)
    )
    partial_rollout: bool = flag(False, "Keep unfinished groups and continue them in the next rollout.")
    mask_offpolicy_in_partial_rollout: bool = flag(
        False, "Do not train on tokens that an earlier rollout has generated."
    )
    update_weight_buffer_size: int = flag(
        512 * 1024**2,
        "Bytes of one bucket when several trainer processes hand their weights to the engines.",
        check=at_least(1),
    )
    update_weights_interval: int = flag(
        1,
        "Rollouts between two weight updates of asynchronous training.",
        check=at_least(1),
        status=no_meaning_here("synchronous training updates the weights after every rollout."),
    )
    keep_old_actor: bool = flag(False, "Compute old log-probs with a kept copy of older weights.")
    update_weight_transport: Literal["auto", "tensor", "distributed", "disk"] = flag(
        "auto",
        "How weights reach SGLang servers: shared memory, a broadcast, or a folder; auto: tensor on this machine, disk "
        "for --rollout-external.",
    )
    rollout_engine: Literal["auto", "embedded", "sglang", "external"] = flag(
        "auto", "What generates; auto: SGLang where there are GPUs and it can be found, else the embedded engine."
    )
    rollout_external: bool = flag(False, "Use SGLang servers that are already running.")
    rollout_external_engine_addrs: list[str] | None = flag(None, "Their addresses, HOST:PORT each.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Prompts and batches: how many of what, and from where.

    Example: `DataConfig(prompt_data="a.jsonl", rollout_batch_size=16, n_samples_per_prompt=8, global_batch_size=64)`
    has `samples_per_rollout == 128` and `steps_per_rollout == 2`.
    """

    num_rollout: int | None = flag(None, "Rollouts of the whole run.", check=at_least(0), common=True)
    num_epoch: int | None = flag(
        None, "Passes over the prompts, in place of --num-rollout.", check=at_least(1), common=True
    )
    rollout_global_dataset: bool = flag(
        True,
        "Do without a prompt file: the data source yields empty samples.",
        option="--disable-rollout-global-dataset",
    )
    prompt_data: str | None = flag(
        None, "Training prompts, .jsonl or .parquet; path@[a:b] takes a slice.", check=PATH, common=True
    )
    apply_chat_template: bool = flag(False, "Render prompts with the tokenizer's chat template.", common=True)
    apply_chat_template_kwargs: dict[str, Any] = flag({}, "Further arguments of the chat template.", check=JSON_OBJECT)
    input_key: str = flag("input", "Column of the prompt.", common=True)
    label_key: str | None = flag(None, "Column of the label.", common=True)
    multimodal_keys: dict[str, Any] | None = flag(
        None,
        "Column of each media type.",
        check=JSON_OBJECT,
        status=not_built("Reading images, video or audio from prompt data"),
    )
    metadata_key: str = flag("metadata", "Column of the metadata.")
    tool_key: str = flag("tools", "Column of the tool specifications.")
    rollout_batch_size: int = flag(REQUIRED, "Prompts (groups) of one rollout.", check=at_least(1), common=True)
    n_samples_per_prompt: int = flag(
        1, "Responses to each prompt: the size of a group.", check=at_least(1), common=True
    )
    global_batch_size: int | None = flag(
        None, "Samples (not prompts) of one optimizer step.", check=at_least(1), common=True
    )
    num_steps_per_rollout: int | None = flag(
        None, "Optimizer steps per rollout, in place of --global-batch-size.", check=at_least(1), common=True
    )
    micro_batch_size: int = flag(
        1, "Samples of one forward pass, unless --use-dynamic-batch-size.", check=at_least(1), common=True
    )
    balance_data: bool = flag(False, "Give every trainer process the same number of tokens.")
    use_dynamic_batch_size: bool = flag(False, "Pack micro batches up to --max-tokens-per-gpu tokens.", common=True)
    max_tokens_per_gpu: int | None = flag(None, "Most tokens of a packed micro batch.", check=at_least(1), common=True)
    log_probs_max_tokens_per_gpu: int | None = flag(
        None,
        "The same for passes without gradients; as --max-tokens-per-gpu when unset.",
        check=at_least(1),
        status=no_meaning_here("passes without gradients use the micro batches of the training pass."),
    )

    @property
    def samples_per_rollout(self) -> int:
        """rollout_batch_size * n_samples_per_prompt."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    @property
    def steps_per_rollout(self) -> int | None:
        """Optimizer steps of a full rollout = samples_per_rollout // global_batch_size; None without a batch size."""
        return self.samples_per_rollout // self.global_batch_size if self.global_batch_size is not None else None


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """When and on what the model is evaluated. `eval_datasets` is resolved from the flags."""

    eval_interval: int | None = flag(None, "Rollouts between two evaluations.", check=at_least(1), common=True)
    eval_prompt_data: list[str] | None = flag(None, "Evaluation sets as pairs: name path, name path, ...", common=True)
    eval_config: str | None = flag(
        None, "YAML description of the evaluation sets, in place of --eval-prompt-data.", check=PATH
    )
    skip_eval_before_train: bool = flag(False, "Do not evaluate before the first training step.")
    eval_input_key: str | None = flag(None, "Column of the prompt; as --input-key when unset.")
    eval_label_key: str | None = flag(None, "Column of the label; as --label-key when unset.")
    eval_tool_key: str | None = flag(None, "Column of the tools; as --tool-key when unset.")
    n_samples_per_eval_prompt: int = flag(1, "Responses to each evaluation prompt.", check=at_least(1), common=True)
    eval_temperature: float | None = flag(
        None, "Temperature; as --rollout-temperature when unset.", check=at_least(0), common=True
    )
    eval_top_p: float | None = flag(None, "As --rollout-top-p when unset.", check=FRACTION)
    eval_top_k: int | None = flag(None, "As --rollout-top-k when unset.", check=TOP_K)
    eval_max_response_len: int | None = flag(
        None, "Most tokens of a response; as in training when unset.", check=at_least(1)
    )
    eval_max_prompt_len: int | None = flag(None, "Longer evaluation prompts are left out.", check=at_least(1))
    eval_min_new_tokens: int | None = flag(
        None,
        "Least tokens of a response.",
        check=at_least(0),
    )
    eval_max_context_len: int | None = flag(
        None, FOR_PLUGINS + "most tokens of prompt and response; as in training when unset.", check=at_least(2)
    )
    eval_datasets: list[EvalDatasetConfig] = derived(list)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """How samples are scored."""

    rm_type: str | None = flag(None, "Built-in reward, where no --custom-rm-path is given.", common=True)
    reward_key: str | None = flag(None, "Entry of a dict reward that is trained on.", common=True)
    eval_reward_key: str | None = flag(None, "The same for evaluation; as --reward-key when unset.")
    group_rm: bool = flag(False, "Score the samples of a group in one call.")
    rm_url: str | None = flag(None, "Address of the remote_rm reward.")


@dataclass(frozen=True, kw_only=True)
class RolloutBufferConfig(Section):
    """What happens to finished samples on the way to the trainer."""

    rollout_buffer_url: str | None = flag(None, FOR_PLUGINS + "address of an external rollout buffer.")
    fetch_trajectory_retry_times: int = flag(-1, FOR_PLUGINS + "attempts to fetch from it; -1 never gives up.")
    min_batch_collection_ratio: float = flag(1, FOR_PLUGINS + "part of a batch that suffices.")
    rollout_task_type: str = flag("math", FOR_PLUGINS + "name of the task.")
    loss_mask_type: Literal["qwen", "qwen3", "distill_qwen", "template"] = flag(
        "qwen", "How the SFT rollout finds the tokens to train on; template derives it from the chat template."
    )
    data_pad_size_multiplier: int = flag(
        128,
        "Packed micro batches are padded to a multiple of this and of the tensor-parallel size.",
        check=at_least(1),
        only="megatron",
    )
    disable_rollout_trim_samples: bool = flag(
        False, "Do not cut the samples of a rollout to a multiple of --global-batch-size."
    )
    use_dynamic_global_batch_size: bool = flag(False, "Train on all samples of a rollout in one optimizer step.")
