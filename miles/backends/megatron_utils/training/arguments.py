"""Stands in for `megatron.training.arguments`."""

from miles.trainer.megatron.provided import core_transformer_config_from_args

__all__ = ["core_transformer_config_from_args"]
