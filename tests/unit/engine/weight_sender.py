"""Rank 0 of a weight update group, as a program: joins, broadcasts the tensors of a safetensors file, leaves.

    python weight_sender.py PORT GROUP FILE [flattened]

Prints "joined" once all members are there. The tensors go in the order of the file's names.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from miles.weights.process_group import init_process_group


def main(port: str, name: str, file: str, form: str = "plain") -> None:
    group = init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=name)
    print("joined", flush=True)
    tensors = dict(sorted(load_file(file).items()))
    if form == "flattened":
        row = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])
        dist.broadcast(row, group_src=0, group=group)
    else:
        for tensor in tensors.values():
            dist.broadcast(tensor, group_src=0, group=group)
    sys.stdin.readline()  # until the engine has them


if __name__ == "__main__":
    main(*sys.argv[1:])
