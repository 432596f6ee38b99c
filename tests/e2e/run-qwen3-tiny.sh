#!/bin/bash
# A launch script as published ones are, for the quickstart's model: GRPO with Megatron under tensor parallelism.
# RUN_DIR, MODEL, DATA and PYTHON come from the environment; further flags follow those below.

set -e
cd "$(dirname -- "${BASH_SOURCE[0]}")/../.."

MODEL_ARGS=(
   --swiglu
   --num-layers 3
   --hidden-size 128
   --ffn-hidden-size 384
   --num-attention-heads 4
   --group-query-attention
   --num-query-groups 2
   --use-rotary-position-embeddings
   --disable-bias-linear
   --normalization "RMSNorm"
   --norm-epsilon 1e-6
   --rotary-base 10000
   --vocab-size 53
   --kv-channels 32
   --qk-layernorm
)

CKPT_ARGS=(
   --hf-checkpoint "$MODEL"
   --ref-load "$MODEL"
   --load "$RUN_DIR/ck/"
   --save "$RUN_DIR/ck/"
   --save-interval 1
)

ROLLOUT_ARGS=(
   --prompt-data "$DATA"
   --input-key prompt
   --label-key label
   --rollout-shuffle
   --custom-rm-path examples/quickstart/carry.py:reward
   --num-rollout 2
   --rollout-batch-size 4
   --n-samples-per-prompt 4
   --rollout-max-response-len 36
   --rollout-temperature 1
   --global-batch-size 16
   --balance-data
)

EVAL_ARGS=(
   --eval-interval 2
   --eval-prompt-data heldout "$DATA@[0:4]"
   --n-samples-per-eval-prompt 2
   --eval-max-response-len 36
   --eval-top-p 1
)

PERF_ARGS=(
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-4
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
   --use-distributed-optimizer
)

SGLANG_ARGS=(
   --rollout-num-gpus-per-engine 1
   --sglang-mem-fraction-static 0.7
)

MISC_ARGS=(
   # default dropout in megatron is 0.1
   --attention-dropout 0.0
   --hidden-dropout 0.0
   # should be good for model performance
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
   --attention-backend flash
)

exec "${PYTHON:-python3}" train.py \
   --train-backend megatron \
   --actor-num-nodes 1 \
   --actor-num-gpus-per-node 2 \
   --colocate \
   --run-dir "$RUN_DIR" \
   "${MODEL_ARGS[@]}" \
   "${CKPT_ARGS[@]}" \
   "${ROLLOUT_ARGS[@]}" \
   "${EVAL_ARGS[@]}" \
   "${PERF_ARGS[@]}" \
   "${GRPO_ARGS[@]}" \
   "${OPTIMIZER_ARGS[@]}" \
   "${SGLANG_ARGS[@]}" \
   "${MISC_ARGS[@]}" \
   "$@"
