"""Published path of `miles.rollout.loss_mask`."""

from miles.rollout.loss_mask import MultiTurnLossMaskGenerator, get_response_lengths

__all__ = ["MultiTurnLossMaskGenerator", "get_response_lengths"]
