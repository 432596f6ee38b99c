"""A rollout function that fills samples as plug-ins do: arrays and tensors for lists, attributes of any kind."""

import numpy as np
import torch

from miles.utils.types import Sample


def generate_rollout(args, rollout_id, data_buffer, evaluation=False):
    samples = []
    for i in range(16):
        sample = Sample(index=i, response="abc", response_length=np.int64(3), label=object())
        sample.tokens = torch.tensor([12, 9, 13, 4, 8, 10]) if i % 2 else np.array([12, 9, 13, 4, 8, 10])
        sample.loss_mask = [np.ones(3, dtype=bool), torch.ones(3), (1, 1, 0), [1.0, 0.0, 1.0]][i % 4]
        sample.rollout_log_probs = [torch.zeros(3), np.zeros(3), (0.0, -1, -2), [-0.5] * 3][i % 4]
        sample.reward = [torch.tensor(1.0), np.float32(0), True, np.int64(1)][i % 4]
        sample.status = ["won", "truncated", None, Sample.Status.FAILED][i % 4]
        sample.metadata = None if i % 3 == 0 else {"environment": object()}
        sample.on_done = lambda result: result
        samples.append(sample)
    return samples  # no groups
