"""Keep the newest complete checkpoint's name in a file, for the job that copies it away.

    miles train --config examples/quickstart/carry.yaml --save runs/ckpt --save-interval 10 \
        --custom-megatron-post-save-hook-path examples/plug_ins/custom_megatron_post_save_hook.py:announce

It runs when the last byte is written, so whoever waits for the file never sees half of a checkpoint.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path


def announce(args: Namespace, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None) -> None:
    newest = {"rollout": rollout_id, "checkpoint": checkpoint_dir, "hf": hf_checkpoint_dir}
    file = Path(checkpoint_dir).parent / "newest.json"
    written = file.with_suffix(".tmp")
    written.write_text(json.dumps(newest), encoding="utf-8")
    written.replace(file)
