"""Stands in for `megatron.training.utils`."""

from miles.trainer.megatron.ranks import print_rank_0

__all__ = ["print_rank_0"]
