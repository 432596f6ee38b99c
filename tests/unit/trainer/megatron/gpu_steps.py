"""`gpu_steps.py MODEL DTYPE FOLDER`: three optimizer steps of the megatron backend and of Hugging Face with AdamW on
this machine's GPU; prints the losses and gradient norms of both as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "parallel"))

from megatron_models import make_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from miles.batch import PackedBatch, from_published_dict, pack
from miles.config import parse
from miles.hooks import bind
from miles.trainer.backend import MicroLoss, ModelOutput
from miles.trainer.models import Models
from miles.trainer.ranks import Ranks

LENGTHS, RESPONSES = [17, 5, 40, 2, 33], [6, 3, 20, 1, 30]
LR = 5e-3


def main(model: str, dtype: str, folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    make_folder(folder / "model", model)
    narrow = ["--bf16"] if dtype == "bfloat16" else ["--no-bf16"]
    flags = ["--hf-checkpoint", str(folder / "model"), "--train-backend", "megatron", "--num-rollout", "1"]
    more = ["--rollout-batch-size", "1", "--global-batch-size", "1", "--prompt-data", "none", "--rm-type", "math"]
    config, args = parse([*flags, *more, *narrow, "--lr", str(LR), "--adam-eps", "1e-4"])
    ranks = Ranks.join(0, 1, folder / "store", backend="nccl", cpu_backend="gloo", timeout_s=60, device="cuda")
    backend = Models(config, args, bind(args), ranks).actor
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 53, (n,), generator=generator) for n in LENGTHS]
    batch = from_published_dict(
        {
            "tokens": [row.tolist() for row in rows],
            "response_lengths": RESPONSES,
            "loss_masks": [[1] * n for n in RESPONSES],
        }
    )
    micros = [pack(batch, part, device="cuda") for part in ([0, 1], [2, 3, 4])]
    own = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).cuda()
    optimizer = torch.optim.AdamW(own.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    steps = []
    for _ in range(3):
        backend.zero_grad()
        loss = sum(float(result.loss) for result in backend.forward_backward(micros, likelihood))
        norm = backend.optimizer_step().grad_norm
        optimizer.zero_grad()
        expected = torch.zeros((), device="cuda")
        for row, length in zip(rows, RESPONSES):
            tokens = row.cuda()
            log_p = own(tokens[None]).logits[0].log_softmax(-1)[-length - 1 : -1]
            expected = expected - log_p.gather(1, tokens[-length:, None]).sum() / sum(RESPONSES)
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(own.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        found = {"loss": loss, "norm": norm, "expected loss": float(expected), "expected norm": float(expected_norm)}
        steps.append(found)
    print(json.dumps(steps))


def likelihood(micro: PackedBatch, output: ModelOutput) -> MicroLoss:
    values: Tensor = output.log_probs(micro, temperature=1.0, with_entropy=False, chunk_tokens=None).log_probs
    return MicroLoss(-values.sum() / sum(RESPONSES), {})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
