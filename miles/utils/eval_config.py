"""Published import path; see `miles.config.evaluation`."""

from miles.config.evaluation import (
    DATASET_RUNTIME_SPECS,
    DATASET_SAMPLE_SPECS,
    EvalDatasetConfig,
    _apply_dataset_field_overrides,
    build_eval_dataset_configs,
    ensure_dataset_list,
    pick_from_args,
)

__all__ = [
    "DATASET_RUNTIME_SPECS",
    "DATASET_SAMPLE_SPECS",
    "EvalDatasetConfig",
    "_apply_dataset_field_overrides",
    "build_eval_dataset_configs",
    "ensure_dataset_list",
    "pick_from_args",
]
