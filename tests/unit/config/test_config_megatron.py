"""--train-backend megatron: what it needs, what fits together, what belongs to the other backend."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from config_helpers import model_folder, namespace, refusal, settings, settings_of_model, value_of

from miles.config import RunConfig, megatron, parse
from miles.config import resolve as rules
from miles.config.dump import as_yaml
from miles.config.layout import ParallelLayout

TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
EP, ETP, SP = "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--sequence-parallel"
ACTOR = "--actor-num-gpus-per-node"
HAS = megatron.has
QWEN3, MOE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"


@pytest.fixture(autouse=True)
def installed_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with Megatron-Core alone."""
    monkeypatch.setattr(rules, "local_gpus", lambda: 0)
    monkeypatch.setattr(megatron, "has", lambda module: module == "megatron.core")


def dense(path: Path, *flags: str, **changed: object) -> RunConfig:
    return settings_of_model(path, QWEN3, *flags, **changed)


def refused(path: Path, *flags: str, model: str = QWEN3, **changed: object) -> str:
    return refusal("--train-backend", "megatron", "--hf-checkpoint", model_folder(path, model, **changed), *flags)


# ---- libraries -----------------------------------------------------------------------------------------------------


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "has", lambda module: False)
    text = refusal("--train-backend", "megatron")
    assert text == "--train-backend megatron: Megatron-Core is not installed. pip install 'miles[megatron]'"
    assert settings().train.train_backend == "fsdp"  # the default does not ask for it


def test_what_can_be_imported() -> None:
    assert HAS("json.decoder") and not HAS("json.nothing") and not HAS("no_such_package.core")


def test_bridge(tmp_path: Path) -> None:
    text = refused(tmp_path, "--megatron-to-hf-mode", "bridge")
    assert "--megatron-to-hf-mode bridge: The conversion by Megatron-Bridge is not built yet." in text


# ---- processes -----------------------------------------------------------------------------------------------------

WORLDS = [
    (QWEN3, [], 1, 1),
    (QWEN3, [TP, "2"], 2, 1),
    (QWEN3, [TP, "2", SP, PP, "2", CP, "2"], 8, 1),
    (QWEN3, [TP, "2", ACTOR, "4"], 4, 2),
    (QWEN3, [ACTOR, "4"], 4, 4),
    (MOE, [EP, "2"], 2, 2),
    (MOE, [EP, "4", PP, "2"], 8, 4),
    (MOE, [TP, "2", SP, EP, "2"], 4, 2),
    (MOE, [TP, "2", SP, EP, "2", ETP, "1"], 2, 1),
]


@pytest.mark.parametrize(("model", "flags", "world", "shares"), WORLDS)
def test_an_unset_world_is_the_smallest(model: str, flags: list[str], world: int, shares: int, tmp_path: Path) -> None:
    config = settings_of_model(tmp_path, model, *flags)
    assert config.cluster.world_size == config.layout.world_size == world and config.layout.dp_size == shares
    if ACTOR not in flags:
        assert config.origins["actor_num_gpus_per_node"] == ("substituted" if world != 8 else "default")


def test_layout_of_all_flags(tmp_path: Path) -> None:
    flags = [TP, "2", SP, PP, "2", CP, "2", EP, "2", ETP, "1", "--num-virtual-stages-per-pipeline-rank", "2"]
    config = settings_of_model(tmp_path, MOE, *flags)
    assert config.layout == ParallelLayout(8, tensor=2, context=2, pipeline=2, expert=2, expert_tensor=1, virtual=2)


def test_with_fsdp_every_process_takes_a_share() -> None:
    config = settings(ACTOR, "2", TP, "2")
    assert config.layout == ParallelLayout(2) and config.layout.dp_size == 2
    assert f"{TP} 2: no meaning with --train-backend fsdp." in config.notices
    assert "--no-bf16: no meaning with --train-backend fsdp." in settings("--no-bf16").notices


WRONG = [
    ([TP, "2", PP, "2", ACTOR, "6"], f"{ACTOR}: expected a multiple of 4, because of {TP} 2 and {PP} 2, got 6."),
    ([TP, "3"], f"{TP} 3: must divide the 4 attention heads of the model."),
    ([PP, "8"], f"{PP} 8: the model has 4 layers, fewer than stages."),
    ([PP, "3"], f"{PP} 3: 4 layers cannot be divided among 3 equal stages. --decoder-first-pipeline-num-layers"),
    (
        [PP, "2", "--decoder-first-pipeline-num-layers", "4"],
        f"{PP} 2: 0 layers cannot be divided among 1 equal stages.",
    ),
    ([PP, "2", "--decoder-first-pipeline-num-layers", "9"], "-5 layers cannot be divided"),
    (["--decoder-last-pipeline-num-layers", "1"], f"--decoder-last-pipeline-num-layers: needs {PP} 2 or more."),
    (["--num-virtual-stages-per-pipeline-rank", "2"], f"--num-virtual-stages-per-pipeline-rank: needs {PP} 2 or more."),
    (
        [PP, "2", "--num-virtual-stages-per-pipeline-rank", "3"],
        "--num-virtual-stages-per-pipeline-rank: expected a divisor of 2, the layers of a stage, got 3.",
    ),
    (
        [PP, "2", "--num-layers-per-virtual-pipeline-stage", "4"],
        "--num-layers-per-virtual-pipeline-stage: expected a divisor of 2, the layers of a stage, got 4.",
    ),
    (
        [PP, "2", "--num-layers-per-virtual-pipeline-stage", "1", "--num-virtual-stages-per-pipeline-rank", "2"],
        "--num-layers-per-virtual-pipeline-stage: excludes --num-virtual-stages-per-pipeline-rank.",
    ),
    (
        [PP, "2", "--num-layers-per-virtual-pipeline-stage", "1", "--decoder-first-pipeline-num-layers", "1"],
        "--num-layers-per-virtual-pipeline-stage: needs equal stages",
    ),
    (
        [PP, "2", "--microbatch-group-size-per-virtual-pipeline-stage", "1"],
        "--microbatch-group-size-per-virtual-pipeline-stage: expected at least 2, the stages, got 1.",
    ),
    ([EP, "2"], f"{EP} 2: the model has no experts."),
    (["--padded-vocab-size", "50"], "--padded-vocab-size: expected a multiple of"),
    ([TP, "2", "--padded-vocab-size", "55"], f"--padded-vocab-size: expected a multiple of {TP} 2 of at least 53"),
    ([ACTOR, "3"], "--global-batch-size: expected a multiple of 3, the trainer's processes"),
    (
        [TP, "2", ACTOR, "6"],
        "--global-batch-size: expected a multiple of 3, the data-parallel shares of 6 trainer processes, got 64.",
    ),
    (["--distributed-backend", "mpi"], "--distributed-backend: expected gloo, got 'mpi'."),
    (["--true-on-policy-mode"], "--true-on-policy-mode: needs --train-backend fsdp"),
    (["--qkv-format", "bshd", CP, "2"], "--qkv-format bshd: excludes --context-parallel-size"),
    (
        ["--qkv-format", "bshd", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "9"],
        "--qkv-format bshd: needs --train-backend megatron without --use-dynamic-batch-size.",
    ),
    (
        ["--overlap-param-gather"],
        "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce.",
    ),
    (
        ["--overlap-param-gather", "--overlap-grad-reduce", "--no-use-distributed-optimizer"],
        "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce.",
    ),
    (["--recompute-granularity", "full"], "needs --recompute-method and --recompute-num-layers."),
    (
        ["--recompute-granularity", "selective", "--recompute-num-layers", "1"],
        "--recompute-granularity selective: excludes --recompute-num-layers.",
    ),
    (
        [TP, "2", SP, "--recompute-activations", "--distribute-saved-activations"],
        "--distribute-saved-activations: excludes --sequence-parallel",
    ),
    (["--hidden-dropout", "0.1"], "--hidden-dropout 0.1: needs a GPU. Use 0."),
    (["--transformer-impl", "transformer_engine", "--fp16"], "--fp16: Training in fp16 is not built yet."),
    (["--fp8-format", "hybrid"], "--fp8-format hybrid: Training in fp8 is not built yet."),
    (["--spec", "a", "b"], "A layer spec of one's own is not built yet."),
    (["--ckpt-format", "zarr"], "--ckpt-format zarr: Another checkpoint format than torch_dist is not built yet."),
    (["--moe-aux-loss-coeff", "0.1"], "A load-balancing loss of the experts is not built yet."),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_what_does_not_fit(flags: list[str], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(tmp_path, *flags)


OF_EXPERTS = [
    ([EP, "3"], {}, f"{EP} 3: must divide the 4 experts of the model."),
    ([TP, "2"], {}, f"{TP} 2: needs --sequence-parallel where a model has experts."),
    ([], {"num_experts_per_tok": 5}, "--moe-router-topk: expected at most 4, the experts, got 5."),
    ([], {"num_experts_per_tok": 1}, "--moe-router-topk 1: needs --moe-router-pre-softmax"),
    (["--moe-router-group-topk", "1"], {}, "--moe-router-group-topk 1: needs --moe-router-num-groups"),
    (["--moe-router-score-function", "sigmoid"], {}, '--moe-router-score-function sigmoid: config.json says "softmax"'),
    ([TP, "4", SP], {"moe_intermediate_size": 6}, f"{TP} 4: must divide 6, the width of an expert."),
]


@pytest.mark.parametrize(("flags", "changed", "sentence"), OF_EXPERTS)
def test_what_does_not_fit_experts(flags: list[str], changed: dict[str, object], sentence: str, tmp_path: Path) -> None:
    assert sentence in refused(tmp_path, *flags, model=MOE, **changed)


@pytest.mark.parametrize(("groups", "tensor", "fits"), [(2, 4, True), (4, 2, True), (1, 4, True), (3, 2, False)])
def test_heads_of_keys_and_values(groups: int, tensor: int, fits: bool, tmp_path: Path) -> None:
    """A divisor or a multiple, as Megatron-Core has it."""
    model = {"num_attention_heads": 12, "num_key_value_heads": groups}
    if fits:
        assert dense(tmp_path, TP, str(tensor), **model).layout.tensor == tensor
    else:
        assert "must divide the 3 heads of keys and values" in refused(tmp_path, TP, str(tensor), **model)


# ---- what follows --------------------------------------------------------------------------------------------------

FOLLOWS = [
    (
        [],
        {"bf16": False, "use_distributed_optimizer": True, "transformer_impl": "local", "use_cpu_initialization": True},
    ),
    ([], {"apply_rope_fusion": False, "bias_swiglu_fusion": False, "gradient_accumulation_fusion": False}),
    (["--bf16"], {"bf16": True, "accumulate_allreduce_grads_in_fp32": True}),
    ([SP], {"sequence_parallel": False}),
    ([TP, "2"], {"padded_vocab_size": 256}),
    ([TP, "2", "--make-vocab-size-divisible-by", "1"], {"padded_vocab_size": 54}),
    (["--padded-vocab-size", "60"], {"padded_vocab_size": 60}),
    (["--gradient-checkpointing"], {"recompute_granularity": "full", "recompute_num_layers": 1}),
    (
        ["--gradient-checkpointing", "--recompute-granularity", "selective"],
        {"recompute_granularity": "selective", "recompute_num_layers": None},
    ),
    (["--recompute-activations"], {"recompute_granularity": "selective"}),
    ([PP, "2", "--num-layers-per-virtual-pipeline-stage", "1"], {"num_virtual_stages_per_pipeline_rank": 2}),
    ([PP, "2", "--num-layers-per-virtual-pipeline-stage", "2"], {"num_virtual_stages_per_pipeline_rank": None}),
    ([PP, "3", "--decoder-first-pipeline-num-layers", "2"], {"decoder_first_pipeline_num_layers": 2}),
    ([PP, "2", *("--decoder-first-pipeline-num-layers", "1", "--decoder-last-pipeline-num-layers", "3")], {}),
    (["--qkv-format", "bshd"], {"qkv_format": "bshd"}),
    (["--data-pad-size-multiplier", "8"], {"data_pad_size_multiplier": 8}),
]


@pytest.mark.parametrize(("flags", "expected"), FOLLOWS)
def test_what_follows(flags: list[str], expected: dict[str, object], tmp_path: Path) -> None:
    config = dense(tmp_path, *flags)
    for name, value in expected.items():
        assert value_of(config, name) == value, name


def test_without_a_trainer_the_parallel_flags_say_nothing(tmp_path: Path) -> None:
    config = dense(tmp_path, TP, "2", "--debug-rollout-only")
    assert config.layout == ParallelLayout(1)


def test_args_carry_megatrons_names(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, QWEN3)
    flags = ["--train-backend", "megatron", "--hf-checkpoint", folder, PP, "2"]
    args = namespace(*flags, "--num-layers-per-virtual-pipeline-stage", "1")
    assert args.virtual_pipeline_model_parallel_size == 2 and args.world_size == 2
    assert (args.hidden_size, args.padded_vocab_size, args.add_bias_linear, args.bf16) == (64, 128, False, False)
    assert args.variable_seq_lengths is True


def test_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "local_gpus", lambda: 4)
    monkeypatch.setattr(megatron, "has", lambda module: True)
    config = dense(tmp_path, "--hidden-dropout", "0.1")
    m = config.megatron
    assert m.bf16 and m.accumulate_allreduce_grads_in_fp32 and not m.use_cpu_initialization and m.hidden_dropout == 0.1
    assert m.bias_swiglu_fusion and m.apply_rope_fusion and config.cluster.distributed_backend == "nccl"
    text = refused(tmp_path, TP, "4", PP, "2")
    assert f"{ACTOR}: expected at most 4, the GPUs of this machine, got 8." in text


NOTICES = [
    ([SP], "--sequence-parallel: no meaning here, without --tensor-model-parallel-size."),
    (["--fsdp-cpu-offload", "--fsdp-param-dtype", "bfloat16"],
     "--fsdp-cpu-offload, --fsdp-param-dtype bfloat16: no meaning with --train-backend megatron."),
    (["--recompute-method", "uniform"], "--recompute-method: no meaning here, without --recompute-granularity."),
    (["--attention-backend", "flash"], "--attention-backend flash: no meaning here, the attention follows from"),
    ([ETP, "1"], f"{ETP}: no meaning here, the model has no experts."),
    (["--seq-length", "8192"], "--seq-length 8192: no meaning here, samples keep their lengths."),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "notice"), NOTICES)
def test_notices(flags: list[str], notice: str, tmp_path: Path) -> None:
    (found,) = [n for n in dense(tmp_path, *flags).notices if n.startswith(notice)]
    assert found


def test_the_dispatcher_that_needs_one_length(tmp_path: Path) -> None:
    given = settings_of_model(tmp_path, MOE, "--moe-token-dispatcher-type", "allgather")
    assert given.megatron.moe_token_dispatcher_type == "alltoall"
    assert [n for n in given.notices if n.startswith("--moe-token-dispatcher-type allgather: alltoall in its place")]


def test_one_process_is_one_of_its_own(tmp_path: Path) -> None:
    """Notices about a trainer that shares its process with the engine are for the other backend."""
    config = dense(tmp_path, "--balance-data", "--distributed-timeout-minutes", "3")
    assert config.cluster.world_size == 1
    assert not any(n.startswith(("--balance-data", "--distributed-timeout")) for n in config.notices)


# ---- the other backend ---------------------------------------------------------------------------------------------


def test_flags_of_megatron_with_fsdp_get_one_notice() -> None:
    config = settings("--num-layers", "2", "--swiglu", "--fp8-format", "hybrid", "--recompute-granularity", "full")
    (notice,) = [n for n in config.notices if "--num-layers" in n]
    assert notice.endswith(": no meaning with --train-backend fsdp.")
    assert all(
        f in notice for f in ("--num-layers 2", "--swiglu", "--fp8-format hybrid", "--recompute-granularity full")
    )


def test_context_parallelism_needs_megatron() -> None:
    assert f"{CP} 2: needs --train-backend megatron" in refusal(CP, "2")


def test_model_providers_need_megatron(tmp_path: Path) -> None:
    text = refusal("--custom-model-provider-path", "my.model")
    assert text == ("--custom-model-provider-path: --train-backend fsdp never calls it. Use --train-backend megatron.")
    assert dense(tmp_path, "--custom-model-provider-path", "my.model").hooks.custom_model_provider_path == "my.model"


@pytest.mark.parametrize(
    "name", ["init-path", "before-log-prob-hook-path", "before-train-step-hook-path", "post-save-hook-path"]
)
def test_hooks_of_both_backends(name: str, tmp_path: Path) -> None:
    for config in (settings(f"--custom-megatron-{name}", "a.b"), dense(tmp_path, f"--custom-megatron-{name}", "a.b")):
        assert not any("--custom-megatron" in n for n in config.notices)


# ---- what the backend receives -------------------------------------------------------------------------------------


def test_overrides_hold_what_was_said(tmp_path: Path) -> None:
    config = dense(tmp_path, "--moe-permute-fusion", "--ddp-bucket-size", "1000", "--weight-decay", "0.1")
    transformer = config.overrides("TransformerConfig")
    assert transformer["layernorm_epsilon"] == 1e-6 and transformer["gated_linear_unit"] is True
    assert "moe_permute_fusion" not in transformer  # it has no meaning here
    assert "fp8" not in transformer and None not in transformer.values()
    assert "sequence_parallel" not in transformer and "moe_router_topk" not in transformer  # nobody said anything
    assert config.overrides("DistributedDataParallelConfig") == {
        "use_distributed_optimizer": True, "align_param_gather": True, "bucket_size": 1000,
    }  # fmt: skip
    optimizer = config.overrides("OptimizerConfig")
    assert optimizer["weight_decay"] == 0.1 and optimizer["adam_beta2"] == 0.95 and optimizer["bf16"] is False


def test_the_written_file_gives_the_same_run_again(tmp_path: Path) -> None:
    config = dense(
        tmp_path, TP, "2", SP, "--no-rope-fusion", "--recompute-activations", "--no-use-distributed-optimizer"
    )
    (tmp_path / "again.yaml").write_text(as_yaml(config))
    again, _ = parse(["--config", str(tmp_path / "again.yaml")])
    assert dataclasses.replace(again.run, config=None) == config.run and again.megatron == config.megatron
    for name in ("TransformerConfig", "OptimizerConfig", "DistributedDataParallelConfig"):
        assert again.overrides(name) == config.overrides(name)


PATTERNS = [("2", 2), ("[0,1,1]", [0, 1, 1]), ("[0]*1+[1]*3", [0, 1, 1, 1]), ("([0]+[1]*2)*2", [0, 1, 1, 0, 1, 1])]


@pytest.mark.parametrize(("text", "expected"), PATTERNS)
def test_patterns_of_layers(text: str, expected: object) -> None:
    assert settings("--moe-layer-freq", text).megatron.moe_layer_freq == expected


@pytest.mark.parametrize("text", ["", "x", "[0]*99999", "__import__('os')", "1.5", "[[1]]", "[0]-[1]", "True", "2**9"])
def test_what_is_no_pattern(text: str) -> None:
    assert "--moe-layer-freq: expected a whole number, or one per layer" in refusal("--moe-layer-freq", text)


def test_a_pattern_in_a_file(tmp_path: Path) -> None:
    for text, expected in (("[0, 1]", [0, 1]), ("2", 2), ("'[0]*1+[1]*1'", [0, 1])):
        (tmp_path / "run.yaml").write_text(f"moe-layer-freq: {text}\n")
        assert settings("--config", str(tmp_path / "run.yaml")).megatron.moe_layer_freq == expected
