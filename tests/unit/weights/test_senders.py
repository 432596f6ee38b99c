"""What the senders of weights put before an engine: payloads, folders, and who drops out of an update."""

from __future__ import annotations

import base64
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from miles.engine.member import Member
from miles.errors import EngineError, FlagError
from miles.weights.disk import DiskDelivery
from miles.weights.sglang_tensor import TensorDelivery, serialised

# What SGLang's unpickler admits of the names that a payload may use (its list is longer).
ADMITTED = {
    ("types", "SimpleNamespace"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch", "uint8"),
    ("torch", "Tensor"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
    ("torch.multiprocessing.reductions", "rebuild_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
}

READER = """
import base64, io, json, pickle, sys
ADMITTED = {tuple(pair) for pair in json.loads(sys.argv[1])}
class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        assert (module, name) in ADMITTED, (module, name)
        return super().find_class(module, name)
read = Reader(io.BytesIO(base64.b64decode(sys.stdin.read()))).load()
if isinstance(read, dict):
    whole = read["flattened_tensor"]
    pairs = [(m.name, whole[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)) for m in read["metadata"]]
else:
    pairs = read
print(json.dumps({name: tensor.float().tolist() for name, tensor in pairs}))
"""

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0]),
    "c": torch.tensor([[0.25]], dtype=torch.bfloat16),
}


class Recorded(Member):
    """An engine that notes what it is asked, and fails where `fails` says so."""

    def __init__(self, rank: int, fails: str = "") -> None:
        super().__init__(rank, f"http://engine{rank}")
        self.fails, self.calls, self.served = fails, [], "old"

    def call(self, path: str, body: Any = None, *, method: str = "POST", timeout_s: float = 0.0) -> Any:
        self.calls.append((path, body))
        if path == self.fails:
            raise EngineError(f"{self.name} refuses {path}")
        self.served = (body or {}).get("weight_version", self.served)
        return {"weight_version": self.served}

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def __hash__(self) -> int:
        return id(self)


def read_elsewhere(payload: str) -> dict[str, Any]:
    """What another process makes of a payload with the names that SGLang admits."""
    command = [sys.executable, "-c", READER, json.dumps(sorted(ADMITTED))]
    done = subprocess.run(command, input=payload, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("flattened", [True, False])
def test_a_payload_is_read_with_admitted_names_alone(flattened: bool) -> None:
    sender = TensorDelivery(2**20, flattened=flattened)
    for names in (("a", "b"), ("c",)):
        part = {name: TENSORS[name] for name in names}
        read = read_elsewhere(serialised(sender._payload(part)))
        assert read == {name: tensor.float().tolist() for name, tensor in part.items()}


def test_a_payload_holds_names_and_no_values() -> None:
    payload = base64.b64decode(serialised(TensorDelivery(2**20)._payload({"x": torch.zeros(100_000)})))
    assert len(payload) < 2000 and pickle.Unpickler(io.BytesIO(payload)) is not None


def test_an_update_in_parts_names_the_version_last_and_drops_who_fails() -> None:
    good, bad = Recorded(0), Recorded(1, fails="/update_weights_from_tensor")
    failures = TensorDelivery(24, ranks=2).deliver([good, bad], TENSORS, "3")
    assert {member.rank: str(error) for member, error in failures.items()} == {
        1: "engine 1 refuses /update_weights_from_tensor"
    }
    parts = [body for path, body in good.calls if path == "/update_weights_from_tensor"]
    assert [part.get("weight_version") for part in parts] == [None, None, "3"]
    assert {len(part["serialized_named_tensors"]) for part in parts} == {2}
    assert good.paths[:3] == ["/pause_generation", "/flush_cache", "/begin_weight_update"]
    assert good.paths[-3:] == ["/end_weight_update", "/get_model_info", "/continue_generation"]
    assert bad.paths[-1] == "/update_weights_from_tensor" and "/continue_generation" not in bad.paths


def test_who_serves_another_version_does_not_go_on() -> None:
    class Forgetful(Recorded):
        def serves_version(self, timeout_s: float = 0.0) -> str:
            return "old"

    member = Forgetful(0)
    failures = TensorDelivery(2**20).deliver([member], TENSORS, "3")
    assert "serves version old after an update to 3" in str(failures[member])
    assert "/continue_generation" not in member.paths


def test_a_bucket_must_fit_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    room = type("Room", (), {"f_bavail": 1, "f_frsize": 4096})()
    monkeypatch.setattr("os.statvfs", lambda _: room)
    with pytest.raises(FlagError, match=r"--update-weight-buffer-size: a bucket of .* does not fit the 4096 bytes"):
        TensorDelivery(2**20).deliver([Recorded(0)], {"x": torch.zeros(10_000)}, "3")


def test_a_folder_per_version_and_none_left_behind(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"not to be copied")
    sender, member = DiskDelivery(tmp_path / "weights", model, 24), Recorded(0)
    for version in ("1", "2"):
        assert sender.deliver([member], TENSORS, version) == {}
        [folder] = (tmp_path / "weights").iterdir()
        assert folder.name == f"weights_{version}" and (folder / "config.json").read_text() == "{}"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(TENSORS) and index["metadata"]["total_size"] == 34
        read = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    [body] = [body for path, body in member.calls if path == "/update_weights_from_disk"][1:]
    assert body == {"model_path": str(folder), "weight_version": "2", "flush_cache": True}
    late = Recorded(1)  # an engine that was replaced gets the folder that is there
    before = folder.stat().st_mtime_ns
    assert sender.deliver([late], TENSORS, "2") == {} and folder.stat().st_mtime_ns == before
