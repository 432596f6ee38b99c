"""Published path of the sample types in `miles.types`."""

from miles.types import MultimodalType, MultimodalTypes, ParamInfo, RolloutBatch, Sample

__all__ = ["MultimodalType", "MultimodalTypes", "ParamInfo", "RolloutBatch", "Sample"]
