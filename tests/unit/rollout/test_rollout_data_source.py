from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.quickstart import make_tokenizer
from miles.errors import CheckpointError, FlagError, UsageError
from miles.hooks import function_registry
from miles.rollout import data_state
from miles.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer, pop_first, state_path
from miles.types import Failure, Group, Sample

NUM_PROMPTS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer.save(folder)
    return str(folder)


@pytest.fixture
def args(tmp_path: Path, model: str) -> Namespace:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"input": str(i), "label": i}) + "\n" for i in range(NUM_PROMPTS)))
    return Namespace(
        rollout_global_dataset=True, prompt_data=str(data), hf_checkpoint=model, dump_details=None,
        rollout_max_prompt_len=None, input_key="input", label_key="label", metadata_key="metadata", tool_key="tools",
        multimodal_keys=None, rollout_seed=42, rollout_shuffle=False, apply_chat_template=False,
        apply_chat_template_kwargs={}, n_samples_per_prompt=2, buffer_filter_path=None,
        save=str(tmp_path / "ckpt"), load=str(tmp_path / "ckpt"),
    )  # fmt: skip


def labels(groups: list[Group]) -> list[int]:
    return [group[0].label for group in groups]


def test_groups_are_numbered_over_the_whole_job(args: Namespace) -> None:
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(2) + source.get_samples(1)
    assert [[(s.group_index, s.index, s.prompt) for s in g] for g in groups] == [
        [(0, 0, "0"), (0, 1, "0")],
        [(1, 2, "1"), (1, 3, "1")],
        [(2, 4, "2"), (2, 5, "2")],
    ]


def test_one_call_may_pass_through_several_epochs(args: Namespace) -> None:
    source = RolloutDataSource(args)
    source.get_samples(1)
    assert labels(source.get_samples(12)) == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    assert (source.epoch_id, source.sample_offset) == (2, 3)


def test_the_epoch_ends_when_the_next_prompt_is_wanted(args: Namespace) -> None:
    source = RolloutDataSource(args)
    source.get_samples(NUM_PROMPTS)
    assert (source.epoch_id, source.sample_offset) == (0, NUM_PROMPTS)
    source.get_samples(1)
    assert (source.epoch_id, source.sample_offset) == (1, 1)


def test_epochs_are_shuffled_each_in_its_own_way(args: Namespace) -> None:
    args.rollout_shuffle = True
    source = RolloutDataSource(args)
    first, second = labels(source.get_samples(NUM_PROMPTS)), labels(source.get_samples(NUM_PROMPTS))
    assert first == [3, 1, 2, 4, 0]
    assert sorted(second) == sorted(first) and second != first


def test_samples_share_nothing_that_can_change(args: Namespace) -> None:
    source = RolloutDataSource(args)
    source.dataset.samples[0].metadata = {"tools": [{"name": "f"}]}
    one, other = source.get_samples(1)[0]
    one.tokens.append(1)
    one.weight_versions.append("1")
    one.metadata["tools"][0]["name"] = "g"
    one.spec_info.completion_token_num = 5
    one.prefix_cache_info.cached_tokens = 5
    untouched = Sample(group_index=0, index=1, prompt="0", label=0, metadata={"tools": [{"name": "f"}]})
    assert other == untouched
    assert source.dataset[0].metadata == {"tools": [{"name": "f"}]}


def test_without_a_file_samples_are_empty_and_nothing_is_saved(args: Namespace) -> None:
    args.rollout_global_dataset = False
    source = RolloutDataSourceWithBuffer(args)
    assert source.get_samples(2)[1] == [Sample(group_index=1, index=2), Sample(group_index=1, index=3)]
    source.save(0)
    assert not Path(args.save).exists()


def test_missing_prompt_data_names_the_flag(args: Namespace) -> None:
    args.prompt_data = None
    with pytest.raises(FlagError, match="--prompt-data"):
        RolloutDataSource(args)


def test_dump_details_keeps_the_tokenizer(args: Namespace, tmp_path: Path) -> None:
    args.dump_details = str(tmp_path / "details")
    RolloutDataSource(args)
    assert (tmp_path / "details" / "tokenizer" / "tokenizer.json").is_file()


# ---- the buffer --------------------------------------------------------------------------------------------------


def test_the_buffer_comes_before_the_file(args: Namespace) -> None:
    source = RolloutDataSourceWithBuffer(args)
    back = source.get_samples(3)
    source.add_samples(back)
    source.add_samples([])
    assert source.get_buffer_length() == 3
    assert source.get_samples(0) == []
    assert source.get_samples(2) == back[:2]
    assert labels(source.get_samples(3)) == [2, 3, 4]


def test_the_plain_source_takes_back_nothing_but_nothing(args: Namespace) -> None:
    source = RolloutDataSource(args)
    source.add_samples([])
    with pytest.raises(RuntimeError, match="takes no samples back"):
        source.add_samples(source.get_samples(1))


@pytest.mark.parametrize("bad", [[Sample(), Sample()], [[Sample()]], ([Sample(), Sample()],)])
def test_only_whole_groups_are_taken_back(args: Namespace, bad: Any) -> None:
    source = RolloutDataSourceWithBuffer(args)
    with pytest.raises(AssertionError):
        source.add_samples(bad)
    assert source.get_buffer_length() == 0


def newest_first(args: Namespace, rollout_id: None, buffer: list[Group], num_samples: int) -> list[Group]:
    return [buffer.pop() for _ in range(min(num_samples, len(buffer)))]


def test_a_buffer_filter_from_the_flag_or_set_by_the_run(args: Namespace) -> None:
    with function_registry.temporary("test:newest", newest_first):
        args.buffer_filter_path = "test:newest"
        source = RolloutDataSourceWithBuffer(args)
    source.add_samples(source.get_samples(3))
    assert labels(source.get_samples(2)) == [2, 1]
    source.buffer_filter = pop_first
    source.add_samples(RolloutDataSource(args).get_samples(2))
    assert labels(source.get_samples(2)) == [0, 0]


def test_a_buffer_filter_that_returns_too_much(args: Namespace) -> None:
    source = RolloutDataSourceWithBuffer(args)
    source.add_samples(source.get_samples(3))
    source.buffer_filter = lambda args, rollout_id, buffer, num_samples: list(buffer)
    with pytest.raises(UsageError, match=r"--buffer-filter-path .* returned 3 groups, expected at most the 1"):
        source.get_samples(1)


# ---- save and load -----------------------------------------------------------------------------------------------


def partial_sample(source: RolloutDataSourceWithBuffer) -> Sample:
    sample = source.get_samples(1)[0][0]
    sample.tokens, sample.response, sample.response_length = [1, 2, 3], "23", 2
    sample.rollout_log_probs, sample.status = [-0.5, np.float64(-0.25)], Sample.Status.ABORTED
    sample.rollout_routed_experts = np.arange(8, dtype=np.int32).reshape(2, 2, 2)
    sample.multimodal_train_inputs = {"pixel_values": torch.arange(3.0)}
    sample.metadata = {"start_rollout_id": 1, "turns": (1, 2), "seen": {"a"}, 3: b"\x00\xff", "__kind__": "mine"}
    sample.failure = Failure("--custom-rm-path", "a.b", "nan", "was NaN", "a.py:1")
    sample.teacher_log_probs = [0.5]
    return sample


def test_a_loaded_source_continues_exactly(args: Namespace) -> None:
    args.rollout_shuffle, args.n_samples_per_prompt = True, 1
    source = RolloutDataSourceWithBuffer(args)
    source.get_samples(6)
    partial = partial_sample(source)
    source.add_samples([[partial], [Sample(index=9)]])
    source.update_metadata({"stage": 2, "best": (1, 0.5)})
    source.save(3)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(3)
    assert resumed.get_metadata() == {"stage": 2, "best": (1, 0.5)}
    (got,), (other,) = resumed.get_samples(2)
    source.get_samples(2)
    assert other == Sample(index=9)
    for name, value in vars(partial).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(got, name), value, strict=True)
        elif name == "multimodal_train_inputs":
            assert torch.equal(got.multimodal_train_inputs["pixel_values"], value["pixel_values"])
        else:
            assert getattr(got, name) == value, name
    assert resumed.get_samples(9) == source.get_samples(9)


def test_the_file_is_a_weights_only_torch_file(args: Namespace) -> None:
    source = RolloutDataSourceWithBuffer(args)
    source.get_samples(2)
    source.save(0)
    path = Path(args.save) / "rollout" / "global_dataset_state_dict_0.pt"
    assert torch.load(path, weights_only=True)["sample_offset"] == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_published_file_is_read(args: Namespace) -> None:
    path = state_path(args.load, 7)
    path.parent.mkdir(parents=True)
    torch.save(
        {"sample_offset": 1, "epoch_id": 2, "sample_group_index": 11, "sample_index": 22, "metadata": {"a": 1}}, path
    )
    source = RolloutDataSourceWithBuffer(args)
    source.load(7)
    first = source.get_samples(1)[0][0]
    assert (first.prompt, first.group_index, first.index, source.epoch_id) == ("1", 11, 22, 2)


@pytest.mark.parametrize("load", [None, "elsewhere"])
def test_without_a_file_the_data_starts_at_the_beginning(args: Namespace, load: str | None) -> None:
    args.load = load
    source = RolloutDataSourceWithBuffer(args)
    source.load(-1)
    assert labels(source.get_samples(1)) == [0]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"torn", "not readable as the state of a data source"), (None, "sample_offset, epoch_id")],
)
def test_a_damaged_file_is_named(args: Namespace, content: bytes | None, said: str) -> None:
    path = state_path(args.load, 0)
    path.parent.mkdir(parents=True)
    if content is None:
        torch.save({"metadata": {}, "sample_index": 0, "sample_group_index": 0}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        RolloutDataSource(args).load(0)
    assert str(path) in str(caught.value)


def test_a_save_that_fails_leaves_the_old_file(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RolloutDataSourceWithBuffer(args)
    source.save(0)
    source.get_samples(3)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_state.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        source.save(0)
    monkeypatch.undo()
    again = RolloutDataSourceWithBuffer(args)
    again.load(0)
    assert again.sample_offset == 0
    assert len(list(state_path(args.save, 0).parent.iterdir())) == 1


def test_what_a_checkpoint_cannot_hold_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sample = Sample(prompt="p")
    sample.socket = object()
    assert data_state.decode_sample(data_state.encode_sample(sample)) == Sample(prompt="p")
    assert "attribute socket is a builtins.object" in caplog.text
    with pytest.raises(TypeError, match=r"metadata holds a builtins.object"):
        data_state.encode_metadata({"x": [object()]})


def test_images_survive() -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (2, 3), (255, 0, 0))
    got = data_state.decode_sample(data_state.encode_sample(Sample(multimodal_inputs={"images": [image]})))
    assert got.multimodal_inputs["images"][0].tobytes() == image.tobytes()


def test_a_data_set_of_another_size_is_reported(args: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    RolloutDataSource(args).save(0)
    args.prompt_data += "@[:3]"
    RolloutDataSource(args).load(0)
    assert "has 3 prompts, 5 when the checkpoint was written" in caplog.text


@pytest.mark.parametrize("folder", ["iter_0000008", "iter_0000007"], ids=["fsdp", "megatron"])
def test_weights_without_their_data_position_are_refused(folder: str, args: Namespace) -> None:
    """A resumed run would go through its data from the start; before the first rollout there is nothing to miss."""
    source = RolloutDataSourceWithBuffer(args)
    Path(args.load, folder).mkdir(parents=True)
    Path(args.load, folder, "meta.json").write_text('{"rollout_id": 7}')
    missing = re.escape(str(state_path(args.load, 7)))
    with pytest.raises(CheckpointError, match=rf"--load .*{folder} has weights, but {missing}.*does not exist"):
        source.load(7)
    source.load(-1)
    source.load(None)
    assert source.sample_offset == 0


def test_weights_of_others_have_no_data_position(args: Namespace) -> None:
    """Megatron's own training wrote them: the data starts at the beginning."""
    Path(args.load, "iter_0000007").mkdir(parents=True)
    source = RolloutDataSourceWithBuffer(args)
    source.load(7)
    assert source.sample_offset == 0


class OwnSource(RolloutDataSource):
    """A source that keeps its position elsewhere."""

    def load(self, rollout_id: int | None = None) -> None:
        self.sample_offset = 3


def test_another_data_source_decides_itself(args: Namespace) -> None:
    Path(args.load, "iter_0000008", "model").mkdir(parents=True)
    source = OwnSource(args)
    source.load(7)
    assert source.sample_offset == 3
