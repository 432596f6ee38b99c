"""What the page of plug points says beside the declarations: chapters, what each is for, its arguments in words.

Names of arguments come from the declarations; a test holds the two together. `docs` puts the page together.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One plug point.

    `purpose`: what it is for, two or three sentences. `uses`: what people do with it. `arguments`: what `ARGUMENTS`
    does not say, or says differently here. `on_record`: whether the samples that a run has recorded are enough to call
    it again, where it can be replayed at all.
    """

    purpose: str
    uses: tuple[str, ...]
    arguments: dict[str, str] = field(default_factory=dict)
    on_record: bool = True


@dataclass(frozen=True)
class Chapter:
    """A chapter of the page: plug points by name, in order; `text` stands above them."""

    title: str
    points: tuple[str, ...] = ()
    text: str = ""


CHAPTERS = (
    Chapter("Rollout function", ("rollout_function",)),
    Chapter("Generate function", ("custom_generate_function",)),
    Chapter("Reward", ("custom_rm",)),
    Chapter("Dynamic sampling filter", ("dynamic_sampling_filter",)),
    Chapter("Buffer filter", ("buffer_filter",)),
    Chapter("Sample filter", ("rollout_sample_filter",)),
    Chapter("All samples of a rollout", ("rollout_all_samples_process",)),
    Chapter("Rollout data before training", ("rollout_data_postprocess",)),
    Chapter("Loss", ("custom_loss_function",)),
    Chapter("Importance sampling and rejection", ("custom_tis_function",)),
    Chapter("Reducer of the policy loss", ("custom_pg_loss_reducer_function",)),
    Chapter("Rewards to advantages", ("custom_reward_post_process",)),
    Chapter("Samples to train data", ("custom_convert_samples_to_train_data",)),
    Chapter("Logging", ("custom_rollout_log_function", "custom_eval_rollout_log_function")),
    Chapter("Data source", ("data_source",)),
    Chapter("Evaluation function", ("eval_function",)),
    Chapter(
        "Hooks inside the trainer",
        (
            "custom_megatron_init",
            "custom_megatron_before_log_prob_hook",
            "custom_megatron_before_train_step_hook",
            "custom_megatron_post_save_hook",
        ),
    ),
    Chapter("Middleware of the miles router", ("miles_router_middleware",)),
    Chapter(
        "Routing replay of mixtures of experts",
        text=(
            "Two settings and no plug point: `--use-routing-replay` sends tokens to the same experts in the forward and"
            " the backward pass (arXiv:2507.18071), `--use-rollout-routing-replay` to the experts that the engine used"
            " (arXiv:2510.11370). Both work with either backend, see [mixtures of experts](moe.md)."
        ),
    ),
    Chapter("Model provider", ("custom_model_provider",)),
    Chapter(
        "Tools and agents",
        ("generate_tool_specs", "generate_execute_tool_function", "custom_agent_function"),
        "The built-in generate functions for conversations have plug points of their own. See "
        "[conversations with tools](rollouts.md#conversations-with-tools).",
    ),
)

ARGUMENTS = {
    "args": "every setting of the run and of its plug-ins, as attributes",
    "rollout_id": "number of the rollout, from 0",
    "data_source": "where prompts come from: `get_samples(n)`, `add_samples(groups)`",
    "evaluation": "whether this is an evaluation",
    "input": "a `RolloutFnTrainInput` or a `RolloutFnEvalInput`, both with `rollout_id` and `evaluation`",
    "samples": "flat list of the samples that are trained",
    "groups": "the groups that are trained, one list of samples per prompt",
    "parallel_state": "sizes and ranks of data, context and tensor parallelism",
    "loss_masks": "per sample a tensor over its response tokens: 1 where it is trained",
    "total_lengths": "per sample the number of its tokens, prompt and response",
    "response_lengths": "per sample the number of its response tokens",
    "model": "the model's chunks on this rank (one without interleaved pipelining)",
}

_TRAINED_ROWS = (
    "columns with one entry per sample: `tokens`, `loss_masks`, `rewards`, `log_probs`, `advantages`, `returns`, "
    "`rollout_log_probs`, ..."
)

ENTRIES = {
    "rollout_function": Entry(
        "Everything between prompts and scored groups is yours: which prompts are taken, how many answers there are, "
        "what runs at the same time, when it is enough. The parts of the built-in rollout can be called from it: "
        "`generate_and_rm_group` of `miles.rollout.sglang_rollout` generates and scores one group. With "
        "`MILES_EXPERIMENTAL_ROLLOUT_REFACTOR=1` in the environment the default is the class "
        "`miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn`, which does the same.",
        (
            "several agents that answer each other",
            "generation that runs on while the trainer works",
            "trees and beams instead of independent answers",
            "conversations that are data, as in supervised fine-tuning",
        ),
    ),
    "eval_function": Entry(
        "The same for evaluation. It is separate so that training and evaluation may differ: other sampling, other "
        "metrics, other data.",
        ("majority votes and best-of-n", "a benchmark that brings its own harness", "evaluation with tools"),
        {"evaluation": "always true", "rollout_id": "the rollout that the evaluation follows; 0 before training, too"},
    ),
    "custom_generate_function": Entry(
        "How one prompt becomes one response (or several samples). The rollout around it stays: concurrency, rewards, "
        "filters, partial rollouts. It may call the engine as often as it likes and put text of its own between.",
        (
            "retrieval while the model thinks",
            "tools, environments, conversations of several turns",
            "budgets of thinking tokens, second attempts",
        ),
        {
            "input": "a `GenerateFnInput`: `args`, `sample`, `sampling_params`, `evaluation`, `state`",
            "sample": "the prompt, to be filled in; with `--partial-rollout` perhaps with the beginning of a response",
            "sampling_params": "the engine's sampling parameters; a dict of this call alone",
        },
        on_record=False,
    ),
    "custom_rm": Entry(
        "What is learned. A number per response, or several in a dict of which `--reward-key` names the one to train. "
        "The built-in rewards (`--rm-type`) are in [rewards](rewards.md).",
        (
            "verifiers, unit tests, format rules",
            "a model that judges, behind HTTP",
            "comparisons inside of a group (`--group-rm`)",
        ),
        {
            "sample": "the finished sample: `prompt`, `response`, `label`, `metadata`, `tokens`, `status`",
            "samples": "all samples of a group",
            "prompts": "the prompts of the batch",
            "completions": "the responses of the batch",
            "data_source": "the name of the data set, from the metadata",
            "solution_str": "the response",
            "ground_truth": "the label",
            "extra_info": "the metadata",
        },
    ),
    "dynamic_sampling_filter": Entry(
        "Whether a finished group is worth a place in the batch. What is dropped is replaced by another prompt "
        "(`--over-sampling-batch-size` fetches ahead), so the batch stays full.",
        ("no groups whose answers score alike, as in DAPO", "problems of medium difficulty", "no aborted samples"),
        {"samples": "the group, with rewards"},
    ),
    "buffer_filter": Entry(
        "Which of the groups that came back are taken first: with `--partial-rollout` those that were cut short, or "
        "what a rollout function put back. Without a filter the oldest.",
        ("a limit to how old a response may be", "priorities", "a share of the batch for repeated problems"),
        {
            "rollout_id": "None: the published call does not know it",
            "buffer": "the live list of groups; what is taken must be removed from it",
            "num_samples": "the largest number of groups that may be returned",
            "samples": "the groups of the buffer; those that are not returned are lost",
        },
    ),
    "rollout_sample_filter": Entry(
        "Leaves single samples out of the loss without taking them out of their group: `sample.remove_sample = True`. "
        "Mean and standard deviation of the group still count them.",
        ("no loss for responses that were cut off", "no loss for broken tool calls", "a limit of tokens per batch"),
        {"samples": "the same groups, or one flat list of their samples"},
    ),
    "rollout_all_samples_process": Entry(
        "Sees everything that a rollout made, dropped groups included. Nothing that it returns is used.",
        ("statistics over all attempts", "a curriculum that remembers what was solved", "a file of failures"),
        {
            "all_groups": "every group that finished, kept or not",
            "get_samples": "the data source's own method, whose object is `get_samples.__self__`",
            "samples": "every group that finished, kept or not",
        },
    ),
    "rollout_data_postprocess": Entry(
        "The last look at the data: log-probabilities and advantages are there, no step is made yet. Columns may be "
        "changed in place; in the forms with samples, their `loss_mask`, `remove_sample` and `metadata` are written "
        "back.",
        ("masks that depend on probabilities", "clipped or shaped advantages", "statistics of what is trained"),
        {"rollout_data": _TRAINED_ROWS, "samples": "the samples of this rank, in groups or flat"},
    ),
    "custom_loss_function": Entry(
        "The objective, from logits on. It needs `--loss-type custom_loss`. What it does not compute is not there: "
        "clipping, entropy and importance sampling belong to the built-in policy loss, which "
        "`miles.backends.training_utils.loss.policy_loss_function` offers for calling.",
        ("other policy-gradient losses", "terms beside the built-in one", "distillation, preference losses"),
        {
            "batch": "the micro-batch: `unconcat_tokens`, `advantages`, `log_probs` (old), `loss_masks`, ...",
            "logits": "float32 `[1, T, vocabulary]` of all packed tokens, not divided by the temperature",
            "sum_of_sample_mean": "flat tensor over response tokens -> sum over samples of means over trained tokens",
        },
    ),
    "custom_tis_function": Entry(
        "Corrects for the difference between the engine that sampled and the trainer that learns. It runs inside of "
        "the policy loss: it may weight the loss of each token, and take tokens or whole responses out of it.",
        (
            "truncated and masked importance sampling, per token or per response",
            "rejection of responses that the trainer finds impossible",
            "measuring the difference without changing the loss (`--get-mismatch-metrics`)",
        ),
        {
            "pg_loss": "flat `[R]`: the clipped policy-gradient loss of each response token",
            "train_log_probs": "per sample the trainer's log-probabilities, before the first step of the rollout",
            "rollout_log_probs": "per sample the engine's log-probabilities",
        },
    ),
    "custom_pg_loss_reducer_function": Entry(
        "How the losses of tokens become one number. It replaces the mean over each response for the policy-gradient "
        "term alone; all metrics keep the default.",
        ("a constant in place of the length, as in Dr.GRPO", "means over the group", "weights by position"),
        {"calculate_per_token_loss": "whether the run counts tokens instead of samples"},
    ),
    "custom_reward_post_process": Entry(
        "From raw rewards to the numbers that become advantages, over the whole rollout at once. The default is "
        "GRPO's: less the mean of the group, divided by its standard deviation.",
        ("other baselines", "shaping by length", "clipping, ranks, normalisation over the batch"),
    ),
    "custom_convert_samples_to_train_data": Entry(
        "The whole conversion, for data whose shape the default does not know. Columns that miles does not know come "
        "along to the loss, cut and packed like the others. Reward post-processing is part of it, so a plug-in for "
        "that is not called.",
        ("samples that become several rows", "own columns for an own loss", "masks that look at the whole batch"),
    ),
    "custom_rollout_log_function": Entry(
        "Sees each training rollout when its metrics are logged. True keeps the default metrics from being logged.",
        ("metrics of one's own", "tables of samples in Weights & Biases", "an alarm"),
        {
            "rollout_extra_metrics": "metrics of the rollout function, such as the counts of dropped groups",
            "rollout_time": "seconds",
        },
    ),
    "custom_eval_rollout_log_function": Entry(
        "The same for evaluations: it sees what the evaluation function returned.",
        ("accuracy by difficulty or topic", "files for a leaderboard"),
        {
            "rollout_id": "the rollout that the evaluation follows; 0 before training, too",
            "data": 'name of the set -> `{"rewards": [...], "truncated": [...], "samples": [...]}`',
            "extra_metrics": "metrics of the evaluation function",
        },
    ),
    "data_source": Entry(
        "Where groups come from, for as long as the run lasts: a file by default, anything else that can hand out "
        "samples. `miles.rollout.data_source.DataSource` is a base class, but having the methods is enough.",
        ("problems made on the fly", "a curriculum", "mixtures with changing weights", "a queue that others fill"),
    ),
    "custom_megatron_init": Entry(
        "Once per trainer process, when process groups and seeds are set and no model exists yet.",
        ("settings of libraries", "patches that must be there before the model", "connections to other services"),
    ),
    "custom_megatron_before_log_prob_hook": Entry(
        "Before each pass that only computes: log-probabilities of the old policy or of the reference, values of the "
        "critic. The model is in evaluation mode and has the weights of the pass.",
        ("recording what a pass does", "another mode of a layer for such passes"),
        {"store_prefix": '`"ref_"` when the reference computes, else empty'},
    ),
    "custom_megatron_before_train_step_hook": Entry(
        "Before each optimizer step, when gradients are zeroed.",
        ("freezing by schedule", "a schedule of one's own", "noise, averaging of weights"),
        {
            "step_id": "number of the step in its rollout, from 0",
            "optimizer": "the optimizer, of Megatron-Core or of PyTorch",
            "opt_param_scheduler": "what sets the learning rate",
        },
    ),
    "custom_megatron_post_save_hook": Entry(
        "When a checkpoint is complete and a resumed run would take it.",
        ("copying it away", "starting an evaluation elsewhere", "deleting old ones"),
        {
            "checkpoint_dir": "the folder of the checkpoint",
            "hf_checkpoint_dir": "the folder that `--save-hf` wrote with it, or None",
        },
    ),
    "miles_router_middleware": Entry(
        "Between the rollout and the engines: every request and every answer passes.",
        ("caching", "routing by one's own rules", "measuring, recording"),
        {"app": "what the request goes to next", "router": "the router, with its engines"},
    ),
    "custom_model_provider": Entry(
        "Builds the model in place of the one that config.json describes, with `--train-backend megatron`: other code "
        "for the same parameters. See [a model of one's own](megatron.md#a-model-of-ones-own).",
        ("other layers, kernels, a forward pass of one's own", "frozen parts", "dtypes and hooks of single modules"),
        {
            "pre_process": "whether this chunk has the embeddings",
            "post_process": "whether this chunk has the output layer",
            "vp_stage": "number of the chunk with interleaved pipelining",
        },
    ),
    "generate_tool_specs": Entry(
        "Which tools the model is told about, where prompts do not bring their own (`--tool-key`).",
        ("one set of tools for all prompts",),
    ),
    "generate_execute_tool_function": Entry(
        "Runs one call of a tool and returns what the model shall read.",
        ("calculators, search, sandboxes", "an environment that keeps its state outside"),
        {"name": "the tool", "params": "the arguments that the model wrote, as a dict"},
        on_record=False,
    ),
    "custom_agent_function": Entry(
        "An agent that knows nothing of training: it talks to a server as to OpenAI's, and what was said becomes the "
        "sample.",
        ("agent frameworks as they are", "harnesses of benchmarks"),
        {
            "base_url": "the address to talk to",
            "prompt": "the prompt: text or a list of messages",
            "request_kwargs": "what each request must carry: sampling parameters, tools",
            "metadata": "the metadata of the sample",
        },
    ),
}
