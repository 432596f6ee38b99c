"""A data source of its own, as such plug-ins are written: the shipped class with more metadata and state."""

from miles.rollout.data_source import RolloutDataSourceWithBuffer
from miles.utils.types import Sample

INSTANCES = []


class TaggingDataSource(RolloutDataSourceWithBuffer):
    def __init__(self, args):
        super().__init__(args)
        self.handed_out = 0
        INSTANCES.append(self)

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        groups = super().get_samples(num_samples)
        for group in groups:
            self.handed_out += 1
            for sample in group:
                sample.metadata = {**(sample.metadata or {}), "round_number": 1 + sample.index % 2}
                sample.train_metadata = {"task": f"t{sample.group_index}"}
        self.update_metadata({"handed_out": self.handed_out})
        return groups

    def add_samples(self, samples):
        super().add_samples(samples)
        assert self.get_buffer_length() == len(self.buffer)


def keep_train_metadata(args, samples):
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [sample.reward for sample in samples],
        "raw_reward": [sample.reward for sample in samples],
        "truncated": [1 if sample.status == Sample.Status.TRUNCATED else 0 for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [[1] * sample.response_length for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
        "metadata": [sample.train_metadata for sample in samples],
        "difficulty": [len(sample.label) for sample in samples],
        "note": "for the whole batch",
    }


LOSS_SAW = []


def loss(args, parallel_state, batch, logits, sum_of_sample_mean):
    from miles.backends.training_utils.loss import policy_loss_function

    names = ("metadata", "difficulty", "note", "sample_indices", "round_number")
    LOSS_SAW.append({name: batch.get(name) for name in names})
    return policy_loss_function(args, parallel_state, batch, logits, sum_of_sample_mean)
