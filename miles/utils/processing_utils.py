"""Published path of `miles.rollout.tokenizer`."""

from miles.rollout.tokenizer import (
    DEFAULT_PATCH_SIZE,
    encode_image_for_rollout_engine,
    load_processor,
    load_tokenizer,
    process_vision_info,
)

__all__ = [
    "DEFAULT_PATCH_SIZE",
    "encode_image_for_rollout_engine",
    "load_processor",
    "load_tokenizer",
    "process_vision_info",
]
