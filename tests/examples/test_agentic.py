"""An agent around OpenAI's client: a run records it, trains on its own tokens only, and learns."""

from __future__ import annotations

from tool_runs import NO_EVAL, SMALL, TOKENIZER, by_loss, check_samples, rewards_vary, trained, weights_changed

AGENTIC = "examples/agentic/agentic.yaml"
MULTI_TURN = "examples/retool/multi_turn.yaml"


def test_a_run_records_masks_and_learns(train, metrics) -> None:
    run = train(AGENTIC, *SMALL, *NO_EVAL, "--num-rollout", 2)
    samples = trained(run)
    assert len(samples) == 32
    check_samples(samples)
    pieces = [piece for sample in samples for piece in by_loss(sample)]
    tools = [text for learned, text in pieces if not learned]
    assert len(tools) > 16, "most conversations call the tool"
    assert all(text.startswith("<|tool|>") and text.endswith("<|end|><|assistant|>") for text in tools)
    assert not any("<|tool|>" in text for learned, text in pieces if learned)
    for sample in (s for s in samples if s.reward == 1.0):
        assert f"<answer>{sample.label}</answer>" in sample.response
    assert {s.metadata["round_number"] for s in samples} >= {1, 2}
    assert all(s.weight_versions and set(s.weight_versions) <= {"0", "1", "2"} for s in samples)
    assert rewards_vary(samples)
    # The engine's log-probs are those of the tokens that the trainer sees: nothing was tokenized anew.
    assert max(metrics(run, "train/train_rollout_logprob_abs_diff")) < 1e-4
    assert weights_changed(run)


def test_a_sample_of_each_answer(train) -> None:
    samples = trained(train(AGENTIC, *SMALL, *NO_EVAL, "--num-rollout", 1, "--generate-multi-samples"))
    prompts = [TOKENIZER.decode(sample.tokens[: -sample.response_length]) for sample in samples]
    assert any("<|tool|>" in prompt for prompt in prompts) and any("<|tool|>" not in prompt for prompt in prompts)
    for sample in samples:
        sample.validate()
        assert sample.loss_mask == [1] * sample.response_length
