"""A reward that fails for every fifth sample, as services do, and a conversion and a loss that must not see those."""

from miles.backends.training_utils.loss import policy_loss_function

SEEN = {"converted": [], "loss": []}


async def reward_func(args, sample, **kwargs):
    if sample.index % 5 == 0:
        raise ConnectionError("the judge is gone")
    return float(sample.index % 3)


def convert(args, samples):
    SEEN["converted"].append([sample.index for sample in samples])
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "loss_masks": [[1] * sample.response_length for sample in samples],
        "rewards": [sample.reward for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "own": [sample.index for sample in samples],
    }


def loss(args, parallel_state, batch, logits, sum_of_sample_mean):
    SEEN["loss"].append((batch["own"], batch["sample_indices"]))
    return policy_loss_function(args, parallel_state, batch, logits, sum_of_sample_mean)
