"""Stands in for `megatron.training.global_vars`."""

from miles.trainer.megatron.provided import get_args

__all__ = ["get_args"]
