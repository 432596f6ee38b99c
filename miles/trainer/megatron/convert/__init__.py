"""Weights between Hugging Face folders and Megatron-Core models.

    rules.py      one kind of parameter as data: names, joins, cuts -> ranges that both directions copy
    families/     one table per architecture
    layout.py     the rules over a whole model: which rank holds what
    folder.py     config.json and slices of *.safetensors
    load.py       folder -> local parameters
    export.py     local parameters of all ranks -> whole tensors on rank 0, bucket after bucket

`rules` and `families` import no Megatron; nothing here imports the backend.
"""

from __future__ import annotations

from miles.trainer.megatron.convert.export import Exporter
from miles.trainer.megatron.convert.layout import local_parameters
from miles.trainer.megatron.convert.load import differences, load_hf, read_hf

__all__ = ["Exporter", "differences", "load_hf", "local_parameters", "read_hf"]
