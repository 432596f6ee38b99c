"""Published import path of the loss functions; the work is in `miles.loss`."""

from miles.loss.importance import icepop_function, vanilla_tis_function
from miles.loss.published import get_log_probs_and_entropy, get_responses

__all__ = ["get_log_probs_and_entropy", "get_responses", "icepop_function", "vanilla_tis_function"]
