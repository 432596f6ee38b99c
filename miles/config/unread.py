"""Flags that nothing reads beside the others that were given: one notice each, so that nobody waits for an effect."""

from __future__ import annotations

from collections.abc import Callable

from miles.config.draft import Draft
from miles.config.sections import FLAGS


def unread(draft: Draft) -> None:
    """One notice for each explicit flag that nothing reads in this run."""
    for names, is_read, why in READ_WHEN:
        for name in names:
            value = draft[name]
            if not draft.given(name) or value == FLAGS[name].default or is_read(draft):
                continue
            shown = draft.option(name) if value is True else f"{draft.option(name)} {value}"
            draft.notices.append(f"{shown}: no meaning here, {why}")


def _estimator_in(*names: str) -> Callable[[Draft], bool]:
    return lambda draft: draft["advantage_estimator"] in names


def _has_reference(draft: Draft) -> bool:
    return bool(draft["use_kl_loss"] or draft["kl_coef"])


READ_WHEN: list[tuple[tuple[str, ...], Callable[[Draft], bool], str]] = [
    (
        ("gamma",),
        _estimator_in("ppo", "reinforce_plus_plus"),
        "only ppo and reinforce_plus_plus discount (--advantage-estimator).",
    ),
    (
        ("lambd", "value_clip", "num_critic_only_steps", "critic_lr", "critic_lr_warmup_iters", "critic_load")
        + ("critic_save",),
        _estimator_in("ppo"),
        "there is a critic only with --advantage-estimator ppo.",
    ),
    (
        ("kl_coef",),
        _estimator_in("ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"),
        "the advantages of this --advantage-estimator have no KL in them; --use-kl-loss puts it into the loss.",
    ),
    (("kl_loss_coef", "use_unbiased_kl"), lambda d: bool(d["use_kl_loss"]), "without --use-kl-loss."),
    (
        ("kl_loss_type", "ref_load", "ref_ckpt_step", "ref_update_interval"),
        _has_reference,
        "without --use-kl-loss and --kl-coef there is no KL, and no reference model.",
    ),
    (("opsm_delta",), lambda d: bool(d["use_opsm"]), "without --use-opsm."),
]
"""Flags, when something reads them, and why nothing does otherwise."""
