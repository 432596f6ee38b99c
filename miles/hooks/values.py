"""What a plug-in returned, checked: rewards above all. A value that cannot be used is a `BadReturn`, never a number."""

from __future__ import annotations

import math
import numbers
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from miles.types import DynamicFilterOutput, GenerateFnOutput, Group, Sample

Kind = Literal["none", "nan", "type", "length"]


class BadReturn(Exception):
    """A plug-in returned something that cannot be used. `kind` is that of `miles.types.Failure`."""

    def __init__(self, kind: Kind, message: str, hint: str = "") -> None:
        self.kind, self.hint = kind, hint
        super().__init__(message)


# Rewards become float32 columns.
FLOAT32_MAX = 3.4e38

_NO_RETURN = "does every branch of the function return a value?"


def reward_problem(value: Any, args: Namespace) -> BadReturn | None:
    """What is wrong with the score of one sample, if anything.

    Legal are finite numbers, bools, numpy scalars, 0-dim and 1-D tensors and arrays; with `--reward-key` a dict that
    has such a value under the key; without it a dict where a plug-in turns rewards into numbers later.
    """
    settings = vars(args)
    key = settings.get("reward_key")
    if isinstance(value, dict):
        return _dict_problem(value, [k for k in (key, settings.get("eval_reward_key")) if k], settings)
    problem = _number_problem(value)
    if problem is None and key:
        return BadReturn("type", f"returned {_short(value)}, expected a dict with {key!r}", f"--reward-key is {key!r}")
    return problem


def _dict_problem(value: dict[Any, Any], keys: Sequence[str], settings: dict[str, Any]) -> BadReturn | None:
    if keys:
        present = [k for k in keys if k in value]
        if not present:
            have = ", ".join(map(repr, value)) or "none"
            hint = f"--reward-key is {keys[0]!r}; the dict has {have}"
            return BadReturn("type", f"returned a dict without {keys[0]!r}", hint)
        return next((p for p in (_number_problem(value[k]) for k in present) if p is not None), None)
    if settings.get("custom_reward_post_process_path") or settings.get("custom_convert_samples_to_train_data_path"):
        return None
    have = ", ".join(map(repr, value)) or "none"
    return BadReturn("type", "returned a dict, expected a number", f"name the score: --reward-key; keys: {have}")


def _number_problem(value: Any) -> BadReturn | None:
    if value is None:
        return BadReturn("none", "returned None, expected a number", _NO_RETURN)
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Real) and not hasattr(value, "ndim"):
        return _real_problem(value)
    dimensions = getattr(value, "ndim", None)
    if dimensions is None or not hasattr(value, "dtype"):
        return BadReturn("type", f"returned {_short(value)}, expected a number", _type_hint(value))
    if dimensions > 1:
        return BadReturn("type", f"returned an array of {dimensions} dimensions, expected a number or a 1-D tensor")
    return _array_problem(value)


def _real_problem(value: numbers.Real) -> BadReturn | None:
    try:
        number = float(value)
    except OverflowError:  # an int or a Fraction that no float can hold
        return _too_large(value)
    if not math.isfinite(number):
        return _not_finite(value)
    return _too_large(value) if abs(number) > FLOAT32_MAX else None


def _array_problem(value: Any) -> BadReturn | None:
    try:
        as_number = value * 1.0
        finite = bool((as_number - as_number == 0).all())
        small = bool((abs(as_number) <= FLOAT32_MAX).all())
    except (TypeError, RuntimeError, ValueError):
        return BadReturn("type", f"returned {_short(value)}, expected a number")
    if not finite:
        return _not_finite(value)
    return None if small else _too_large(value)


def _not_finite(value: Any) -> BadReturn:
    return BadReturn("nan", f"returned {_short(value)}, expected a finite number", "look for a division or a log of 0")


def _too_large(value: Any) -> BadReturn:
    return BadReturn("type", f"returned {_short(value)}, expected a number that float32 can hold", "scale the rewards")


def _type_hint(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "one sample has one reward; a function that scores several names its second parameter samples"
    if isinstance(value, (str, Decimal)):
        return "convert it: float(...)"
    return ""


def kind_of(value: Any) -> str:
    """What a value is: `an int`, `a Sample`, `None`."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _short(value: Any) -> str:
    text = safely(repr, value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def safely(show: Callable[[Any], str], value: Any) -> str:
    """`show(value)`, which is `repr` or `str`; objects of plug-ins may fail even there."""
    try:
        return show(value)
    except Exception as error:
        return f"({show.__name__} of it raised {type(error).__name__})"


def reward_list(values: Any, count: int) -> list[Any]:
    """The scores of a batch as a list of `count` values. Raises BadReturn for another length or type."""
    if values is None:
        raise BadReturn("none", f"returned None for {count} samples, expected a list of {count} rewards", _NO_RETURN)
    if isinstance(values, (str, bytes, dict)) or getattr(values, "ndim", 1) == 0 or not hasattr(values, "__len__"):
        raise BadReturn(
            "type", f"returned {_short(values)} for {count} samples, expected a list of {count} rewards",
            "a group arrives as a list: annotate the parameter `sample: Sample` to be called once per sample",
        )  # fmt: skip
    if len(values) != count:
        found = f"returned a list of length {len(values)}, expected {count}"
        raise BadReturn("length", found, "one reward per sample, in the order of the samples")
    return list(values)


def generate_output(value: Any) -> GenerateFnOutput:
    """Wrap what a generate function returned. Raises BadReturn for anything but samples."""
    if isinstance(value, GenerateFnOutput):
        value = value.samples
    if isinstance(value, list) and value and all(isinstance(s, Sample) for s in value):
        if len({id(sample) for sample in value}) < len(value):
            hint = "each entry needs a sample of its own: copy.deepcopy(sample)"
            raise BadReturn("type", "returned one Sample object several times", hint)
        return GenerateFnOutput(samples=value)
    if isinstance(value, Sample):
        return GenerateFnOutput(samples=value)
    if isinstance(value, list) and not value:
        raise BadReturn("length", "returned no samples, expected at least one", "a sample that failed: raise instead")
    if value is None:
        raise BadReturn("none", "returned None, expected the Sample", "end the function with `return sample`")
    raise BadReturn("type", f"returned {_short(value)}, expected a Sample, a list of Samples or a GenerateFnOutput")


def evaluation_data(data: Any) -> None:
    """Raises BadReturn where `data` is not: data set name -> a dict with the list `rewards`, one number per sample, or
    with the list `conversations`, finished samples."""
    for name, entry in of_type(data, dict, "a dict: data set name -> {'rewards': [...]}").items():
        if isinstance(entry, dict) and "conversations" in entry and "rewards" not in entry:
            finished_samples(entry["conversations"], f"conversations of data set {name!r}")
            continue
        if not isinstance(entry, dict) or "rewards" not in entry:
            raise BadReturn("type", f"data set {name!r} has no 'rewards'", "each data set needs a list of rewards")
        rewards = entry["rewards"]
        if isinstance(rewards, (str, bytes, dict)) or not hasattr(rewards, "__len__"):
            raise BadReturn("type", f"rewards of data set {name!r}: got {_short(rewards)}, expected a list of numbers")
        for position, value in enumerate(rewards):
            bad = _number_problem(value)
            if bad is not None:
                found = str(bad).replace("returned ", "")
                raise BadReturn(bad.kind, f"rewards[{position}] of data set {name!r}: {found}")
        for key in ("truncated", "samples"):
            if entry.get(key) is not None and not hasattr(entry[key], "__len__"):
                raise BadReturn("type", f"{key!r} of data set {name!r}: got {_short(entry[key])}, expected a list")


def finished_samples(value: Any, what: str) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(entry, Sample) for entry in value):
        raise BadReturn("type", f"{what}: got {_short(value)}, expected a list of Samples that is not empty")


def filter_verdict(value: Any) -> DynamicFilterOutput:
    """What a dynamic filter returned as DynamicFilterOutput; other values count by their truth.

    Raises BadReturn for values whose truth is surely not meant: containers, text, NaN.
    """
    if isinstance(value, DynamicFilterOutput):
        return value
    if value is None:
        return DynamicFilterOutput(keep=False, reason="returned_none")
    wanted = "expected a DynamicFilterOutput or a bool"
    if isinstance(value, (list, tuple, dict, set, str, bytes)):
        hint = "return DynamicFilterOutput(keep=..., reason=...)"
        raise BadReturn("type", f"returned {_short(value)}, {wanted}", hint)
    keep = truth_of(value, "a DynamicFilterOutput or a bool")
    if bool(value != value):
        raise BadReturn("nan", f"returned {_short(value)}, {wanted}", "a spread of one reward is NaN")
    return DynamicFilterOutput(keep=keep)


def truth_of(value: Any, wanted: str) -> bool:
    """Whether `value` is true. Raises BadReturn for arrays of several, which are neither."""
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadReturn("type", f"returned {_short(value)}, expected {wanted}", "an array: .all() or .any()") from error


def buffer_groups(value: Any, size: int | None) -> list[Group]:
    """The groups that a buffer filter returned: lists of `size` samples (any number where None), each once."""
    groups: list[Group] = of_type(value, list, "a list of groups")
    for group in groups:
        if not isinstance(group, list):
            hint = "one inner list per prompt"
            raise BadReturn("type", f"returned a list of {type(group).__name__}, expected a list of groups", hint)
        if size is not None and len(group) != size:
            raise BadReturn("length", f"returned a group of {len(group)} samples, expected groups of {size}")
    if len({id(group) for group in groups}) < len(groups):
        raise BadReturn("type", "returned one group several times", "each group is trained once")
    return groups


def tis_result(value: Any, given: Mapping[str, Any]) -> Any:
    """`(pg_loss, masks, metrics)` with the shapes of what the function was given. Raises BadReturn otherwise."""
    pg_loss, masks, metrics = tuple_of(value, 3, "(pg_loss, masks, metrics)")
    shape = tuple(given["pg_loss"].shape)
    metrics = of_type(metrics, dict, "(pg_loss, masks, metrics) with a dict of metrics")
    for name, tensor in (("pg_loss", pg_loss), *((f"metric {name!r}", tensor) for name, tensor in metrics.items())):
        if not hasattr(tensor, "shape"):
            raise BadReturn("type", f"{name} is {_short(tensor)}, expected a tensor with one value per response token")
        if tuple(tensor.shape) != shape:
            found = f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
            raise BadReturn("length", found, "one value per response token, all samples one after the other")
    before = given["loss_masks"]
    masks = of_type(masks, (list, tuple), "(pg_loss, masks, metrics) with a list of masks")
    if len(masks) != len(before):
        raise BadReturn("length", f"returned {len(masks)} masks for {len(before)} samples")
    for position, (mask, old) in enumerate(zip(masks, before)):
        if not hasattr(mask, "shape") or tuple(mask.shape) != tuple(old.shape):
            shown = list(mask.shape) if hasattr(mask, "shape") else _short(mask)
            raise BadReturn("length", f"masks[{position}] is {shown}, expected a tensor of shape {list(old.shape)}")
    return pg_loss, list(masks), metrics


def tuple_of(value: Any, count: int, names: str) -> Any:
    """`value` if it is a tuple (or list) of `count` entries. Raises BadReturn otherwise."""
    if value is None:
        raise BadReturn("none", f"returned None, expected {names}", _NO_RETURN)
    if not isinstance(value, (tuple, list)):
        raise BadReturn("type", f"returned {_short(value)}, expected {names}")
    if len(value) != count:
        raise BadReturn("length", f"returned {len(value)} values, expected {names}")
    return value


def of_type(value: Any, expected: type | tuple[type, ...], name: str) -> Any:
    """`value` if it is an instance. Raises BadReturn otherwise."""
    if value is None:
        raise BadReturn("none", f"returned None, expected {name}", _NO_RETURN)
    if not isinstance(value, expected):
        raise BadReturn("type", f"returned {_short(value)}, expected {name}")
    return value


def scalar_problem(value: Any) -> BadReturn | None:
    """What is wrong with a value that must be a tensor of one number, if anything."""
    numel = getattr(value, "numel", None)
    if callable(numel) and numel() == 1:
        return None
    found = f"a tensor of shape {list(value.shape)}" if callable(numel) else _short(value)
    hint = "sum or average it" if callable(numel) else "compute it from the tensors that are passed in"
    return BadReturn("type", f"returned {found}, expected a scalar tensor", hint)


def loss_of(value: Any) -> Any:
    """`value` if it is a scalar tensor with a gradient. Raises BadReturn otherwise."""
    problem = scalar_problem(value)
    if problem is not None:
        raise problem
    if not value.requires_grad:
        hint = "compute it from `logits`; add 0 * logits.sum() where no token is trained"
        raise BadReturn("type", "returned a loss without gradient", hint)
    return value


def metrics_of(value: Any) -> Any:
    """`value` if it is a dict of numbers and scalar tensors. Raises BadReturn otherwise."""
    for name, metric in of_type(value, dict, "(loss, metrics) with a dict of metrics").items():
        if not isinstance(metric, numbers.Real) and scalar_problem(metric) is not None:
            raise BadReturn("type", f"metric {name!r} is {_short(metric)}, expected a number or a scalar tensor")
    return value
