"""Samples as columns and back: the format of `rollouts/*.parquet` in a run record.

One row per sample, readable by anything that reads Parquet. What has no column of its own type travels as JSON.
Raw media and processor tensors (`multimodal_inputs`, `multimodal_train_inputs`) are not recorded. Leaves files, threads
and names to `miles.observe.record`; pyarrow is imported on first use.

Columns::

    index, group_index        int64       as on the sample
    kept                      bool        trained on; False = dropped by a filter or left over
    prompt                    string      text, or a message list as JSON where prompt_is_messages
    prompt_is_messages        bool
    response                  string
    label, metadata           string      JSON
    reward                    float64     where the reward is one number
    reward_json               string      JSON, where it is anything but a float
    status                    string      "completed", "truncated", ...
    tokens                    list<int32> prompt and response ids
    response_length           int32
    loss_mask                 list<int8>  per response token; null = all ones
    rollout_log_probs         list<float> per response token, float32
    weight_versions           list<string>
    remove_sample             bool
    non_generation_time       float64     seconds
    routed_experts            binary      int32, little-endian, row-major, with its shape beside it
    routed_experts_shape      list<int32> [len(tokens) - 1, num_layers, topk]
    train_metadata, failure   string      JSON or null
    spec_info, prefix_cache_info  string  JSON; null = no counts
    extra                     string      JSON of the attributes that Sample does not declare, or null
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from miles.errors import MilesError
from miles.observe.jsonable import as_number, to_jsonable
from miles.types import Failure, Sample

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

_DECLARED = {field.name for field in fields(Sample)}


def flatten(groups: Iterable[Any]) -> Iterator[Sample]:
    """The samples of samples, groups, and groups of multi-sample entries, in order."""
    for entry in groups:
        if isinstance(entry, list):
            yield from flatten(entry)
        else:
            yield entry


def _text(text: str) -> str:
    """`text` as valid UTF-8: lone surrogates, which a tokenizer may produce, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _json(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict) and not value:
        return "{}"
    return _text(json.dumps(to_jsonable(value), ensure_ascii=False, allow_nan=False))


def _copy(values: Any) -> list[Any] | None:
    """A copy that later changes to the sample do not reach."""
    if values is None:
        return None
    return list(values.tolist() if callable(getattr(values, "tolist", None)) else values)


def _reward_columns(reward: Any) -> tuple[float | None, str | None]:
    number = as_number(reward)
    plain_float = reward is None or (isinstance(reward, float) and number is not None)
    return (None if number is None else float(number)), (None if plain_float else _json(reward))


def _counters(info: Sample.SpecInfo | Sample.PrefixCacheInfo) -> str | None:
    """The counters as JSON; None while they are all zero."""
    counters = info.to_dict()
    return json.dumps(counters) if any(counters.values()) else None


def _experts_columns(experts: Any) -> tuple[bytes | None, list[int] | None]:
    if experts is None:
        return None, None
    import numpy as np

    array = np.ascontiguousarray(experts, dtype="<i4")
    return array.tobytes(), list(array.shape)


def row_of(sample: Sample, *, kept: bool) -> Row:
    """One row: a snapshot, so that the sample may change while the row waits to be written."""
    reward, reward_json = _reward_columns(sample.reward)
    experts, experts_shape = _experts_columns(sample.rollout_routed_experts)
    is_messages = not isinstance(sample.prompt, str)
    extra = {key: value for key, value in vars(sample).items() if key not in _DECLARED and key != "failure"}
    failure = vars(sample).get("failure")
    return {
        "index": sample.index,
        "group_index": sample.group_index,
        "kept": kept,
        "prompt": _json(sample.prompt) if is_messages else _text(str(sample.prompt)),
        "prompt_is_messages": is_messages,
        "response": _text(sample.response),
        "label": _json(sample.label),
        "metadata": _json(sample.metadata),
        "reward": reward,
        "reward_json": reward_json,
        "status": sample.status.value if isinstance(sample.status, Sample.Status) else str(sample.status),
        "tokens": _copy(sample.tokens),
        "response_length": int(sample.response_length),
        "loss_mask": None if sample.loss_mask is None else [int(entry) for entry in sample.loss_mask],
        "rollout_log_probs": _copy(sample.rollout_log_probs),
        "weight_versions": [str(version) for version in sample.weight_versions],
        "remove_sample": bool(sample.remove_sample),
        "non_generation_time": float(sample.non_generation_time),
        "routed_experts": experts,
        "routed_experts_shape": experts_shape,
        "train_metadata": None if sample.train_metadata is None else _json(sample.train_metadata),
        "spec_info": _counters(sample.spec_info),
        "prefix_cache_info": _counters(sample.prefix_cache_info),
        "failure": None if failure is None else _json(failure),
        "extra": _json(extra) if extra else None,
    }


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    text = ("prompt", "response", "label", "metadata", "status", "reward_json", "train_metadata", "spec_info")
    types: dict[str, pa.DataType] = dict.fromkeys((*text, "prefix_cache_info", "failure", "extra"), pa.string())
    types |= dict.fromkeys(("kept", "prompt_is_messages", "remove_sample"), pa.bool_())
    types |= dict.fromkeys(("index", "group_index"), pa.int64())
    types |= dict.fromkeys(("reward", "non_generation_time"), pa.float64())
    types |= {
        "tokens": pa.list_(pa.int32()),
        "response_length": pa.int32(),
        "loss_mask": pa.list_(pa.int8()),
        "rollout_log_probs": pa.list_(pa.float32()),
        "weight_versions": pa.list_(pa.string()),
        "routed_experts": pa.binary(),
        "routed_experts_shape": pa.list_(pa.int32()),
    }
    order = row_of(Sample(), kept=True)
    return pa.schema([(name, types[name]) for name in order])


def encode(rows: list[Row]) -> memoryview:
    """The rows as the bytes of one Parquet file. Raises MilesError for a value that does not fit its column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, columns = _schema(), []
    for field in schema:
        try:
            columns.append(pa.array([row[field.name] for row in rows], type=field.type))
        except pa.ArrowException as error:
            raise MilesError(
                f"a sample cannot be recorded: its {field.name} must be {field.type}, but {error}. "
                "Set another type where a plug-in fills this field."
            ) from error
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), buffer, compression="zstd")
    return memoryview(buffer.getvalue())


def _prompt(row: Row) -> Any:
    return json.loads(row["prompt"]) if row["prompt_is_messages"] else row["prompt"]


def _experts(row: Row) -> Any:
    if row["routed_experts"] is None:
        return None
    import numpy as np

    return np.frombuffer(row["routed_experts"], dtype="<i4").reshape(row["routed_experts_shape"]).copy()


def sample_of(row: Row) -> Sample:
    """The sample of one row; the inverse of `row_of`, without media."""
    data = {name: row[name] for name in _DECLARED if name in row}
    data |= {
        "prompt": _prompt(row),
        "label": json.loads(row["label"]),
        "metadata": json.loads(row["metadata"]),
        "reward": row["reward"] if row["reward_json"] is None else json.loads(row["reward_json"]),
        "rollout_routed_experts": _experts(row),
    }
    for name in ("train_metadata", "spec_info", "prefix_cache_info"):
        data[name] = None if row[name] is None else json.loads(row[name])
    if row["extra"] is not None:
        data |= json.loads(row["extra"])
    if row["failure"] is not None:
        data["failure"] = Failure(**json.loads(row["failure"]))
    return Sample.from_dict(data)
