"""The inputs of one plug-in call as JSON beside a safetensors file, and back.

JSON carries what JSON can. Everything else is an object with one key that begins with `$`:

    $sample, $tuple, $set, $dict (keys that are no strings), $float (nan, inf), $bytes, $path, $namespace,
    $input (the dataclasses that plug points take), $tensor / $array (an entry of tensors.safetensors),
    $unrecorded (live objects: models, data sources, functions; they come back as `Unrecorded`)

Nothing is pickled: opening a bundle of unknown origin runs no code.
"""

from __future__ import annotations

import base64
import math
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from miles.types import (
    GenerateFnInput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnTrainInput,
    Sample,
)

TENSORS_FILE = "tensors.safetensors"
# A nesting deeper than this is a live object graph, not an input.
MAX_DEPTH = 32
_MAX_REPR = 200

_INPUTS: dict[str, Any] = {
    c.__name__: c for c in (GenerateFnInput, RolloutFnConstructorInput, RolloutFnEvalInput, RolloutFnTrainInput)
}


class Unrecorded:
    """Stands for a live object that a bundle could not hold. Any use of it raises AttributeError."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __repr__(self) -> str:
        return f"<not recorded: {self._what}>"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the bundle does not hold this object ({self._what}), so {name!r} cannot be read")


class Encoder:
    """Collects tensors and arrays while it turns values into JSON."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}

    def encode(self, value: Any, depth: int = 0) -> Any:
        if value is None or isinstance(value, (bool, str)) or type(value) is int:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if depth > MAX_DEPTH:
            return _unrecorded(value)
        if isinstance(value, Sample):
            return {"$sample": {k: self.encode(v, depth + 1) for k, v in value.to_dict().items() if k != "failure"}}
        if isinstance(value, dict):
            return self._mapping(value, depth)
        if isinstance(value, list):
            return [self.encode(v, depth + 1) for v in value]
        if isinstance(value, (tuple, set, frozenset)):
            tag = "$tuple" if isinstance(value, tuple) else "$set"
            return {tag: [self.encode(v, depth + 1) for v in value]}
        return self._other(value, depth)

    def _mapping(self, value: dict[Any, Any], depth: int) -> Any:
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: self.encode(v, depth + 1) for k, v in value.items()}
        return {"$dict": [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in value.items()]}

    def _other(self, value: Any, depth: int) -> Any:
        if isinstance(value, Namespace):
            return {"$namespace": {k: self.encode(v, depth + 1) for k, v in vars(value).items()}}
        if type(value).__name__ in _INPUTS and isinstance(value, _INPUTS[type(value).__name__]):
            return {"$input": type(value).__name__, "fields": self._fields(value, depth)}
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, Path):
            return {"$path": str(value)}
        return self._array(value)

    def _fields(self, value: Any, depth: int) -> dict[str, Any]:
        content = {f.name: self.encode(getattr(value, f.name), depth + 1) for f in fields(value)}
        if isinstance(value, GenerateFnInput):  # the state is live, but its args are not
            content["state"] = self.encode(value.args, depth + 1)
        return content

    def _array(self, value: Any) -> Any:
        torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
        if torch is not None and isinstance(value, torch.Tensor):
            return {"$tensor": self._keep(value.detach().cpu().contiguous().clone())}
        if numpy is not None and isinstance(value, numpy.generic):
            return self.encode(value.item())
        if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
            return {"$array": self._keep(numpy.ascontiguousarray(value))}
        return _unrecorded(value)

    def _keep(self, value: Any) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = value
        return name

    def save_tensors(self, folder: Path) -> None:
        """Write what was collected; no file where there is nothing."""
        if not self.tensors:
            return
        torch = sys.modules.get("torch")
        if torch is not None:
            from safetensors.torch import save_file

            save_file({k: torch.as_tensor(v) for k, v in self.tensors.items()}, folder / TENSORS_FILE)
        else:
            from safetensors.numpy import save_file as save_arrays

            save_arrays(self.tensors, folder / TENSORS_FILE)


def _unrecorded(value: Any) -> dict[str, str]:
    try:
        text = repr(value)
    except Exception as error:  # the object is the user's, and so is its __repr__
        text = f"repr raised {type(error).__name__}"
    return {"$unrecorded": f"{type(value).__module__}.{type(value).__qualname__}: {text[:_MAX_REPR]}"}


class Decoder:
    """The inverse of Encoder; reads tensors from `folder` as it meets them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {k: self.decode(v) for k, v in value.items()}
        return self._tagged(tag, value[tag], value)

    def _tagged(self, tag: str, content: Any, whole: dict[str, Any]) -> Any:
        if tag == "$sample":
            return Sample.from_dict(self.decode(content))
        if tag == "$tuple":
            return tuple(self.decode(content))
        if tag == "$set":
            return set(self.decode(content))
        if tag == "$dict":
            return {self.decode(k): self.decode(v) for k, v in content}
        if tag == "$float":
            return float(content)
        if tag == "$bytes":
            return base64.b64decode(content)
        if tag == "$path":
            return Path(content)
        if tag == "$namespace":
            return Namespace(**self.decode(content))
        if tag == "$input":
            return self._input(content, self.decode(whole["fields"]))
        if tag in ("$tensor", "$array"):
            return self._tensor(tag, content)
        return Unrecorded(str(content))

    def _input(self, name: str, content: dict[str, Any]) -> Any:
        if name == "GenerateFnInput":
            content["state"] = Namespace(args=content["state"])
        return _INPUTS[name](**content)

    def _tensor(self, tag: str, name: str) -> Any:
        from safetensors import safe_open

        with safe_open(self._folder / TENSORS_FILE, framework="pt" if tag == "$tensor" else "np") as file:
            return file.get_tensor(name)
