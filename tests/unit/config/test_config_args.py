"""`args` belongs to the plug-ins: complete, plain, writable, and without effect on the core. Sections are frozen."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from config_helpers import REQUIRED, settings

from miles.config import AlgorithmConfig, DataConfig, parse
from miles.config.flags import flags_of
from miles.config.sections import FLAGS, SECTIONS
from miles.errors import FlagError


def test_every_flag_is_an_attribute_with_the_value_of_its_section() -> None:
    config, args = parse(REQUIRED)
    for name, section in SECTIONS.items():
        for flag in flags_of(section):
            if flag.name != "offload":
                assert getattr(args, flag.name) == getattr(config.section(name), flag.name)


def test_names_are_unique_across_sections() -> None:
    assert sum(len(flags_of(section)) for section in SECTIONS.values()) == len(FLAGS)
    options = [option for flag in FLAGS.values() for option in (flag.option, *flag.aliases)]
    assert len(options) == len(set(options))


def test_plug_ins_may_copy_pickle_and_write() -> None:
    config, args = parse([*REQUIRED, "--rollout-stop", "END", "--eval-prompt-data", "a", "b"])
    assert vars(copy.deepcopy(args)) == vars(args)
    assert vars(pickle.loads(pickle.dumps(args))) == vars(args)
    args.lr, args.anything = 1.0, {"new": 1}
    args.rollout_stop.append("more")
    args.apply_chat_template_kwargs["x"] = 1
    args.eval_datasets[0].temperature = 9.0
    assert config.optimizer.lr == 1e-6 and config.rollout.rollout_stop == ["END"]
    assert config.data.apply_chat_template_kwargs == {} and config.eval.eval_datasets[0].temperature == 1.0


def test_runs_share_nothing() -> None:
    first, second = settings(), settings()
    first.data.apply_chat_template_kwargs["x"] = 1
    first.debug.profile_target.append("x")
    assert second.data.apply_chat_template_kwargs == {} and second.debug.profile_target == ["train_overall"]
    assert FLAGS["profile_target"].default == ["train_overall"]


def test_sections_are_frozen_and_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().optimizer.lr = 1.0  # type: ignore[misc]
    with pytest.raises(FlagError, match="--eps-clip: expected a value >= 0, got -1"):
        AlgorithmConfig(eps_clip=-1)
    assert DataConfig(rollout_batch_size=2, n_samples_per_prompt=3).samples_per_rollout == 6


def test_plug_points_of_the_catalogue_are_the_hooks_section() -> None:
    from miles.hooks.catalog import CATALOG

    assert [flag.option for flag in flags_of(SECTIONS["hooks"])] == [point.flag for point in CATALOG.values()]
    hooks = settings("--custom-rm-path", "my.grade").hooks
    assert hooks.custom_rm_path == "my.grade" and hooks.buffer_filter_path is None
