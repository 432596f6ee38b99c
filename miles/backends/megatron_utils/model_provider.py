"""Published import path of the function that builds models: what a provider of one's own starts from."""

from miles.trainer.megatron.provided import get_model_provider_func

__all__ = ["get_model_provider_func"]
