"""Published name of the evaluation of one data set; the work is in `miles.rollout.evaluate`."""

from miles.rollout.evaluate import evaluate_dataset as eval_rollout_single_dataset

__all__ = ["eval_rollout_single_dataset"]
