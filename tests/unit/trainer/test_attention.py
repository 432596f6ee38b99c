"""Packed attention: rows never see each other, gradients included; a packed model equals separate forward passes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from miles.batch import from_published_dict, pack
from miles.trainer import packed_attention as attention
from miles.trainer.fsdp import norm
from miles.trainer.fsdp.attention import NAME, packed_attention
from miles.trainer.packed_attention import Packing

LENGTHS = [17, 5, 40, 1]


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(lengths: list[int]) -> Packing:
    return Packing.of(cumulative(lengths), torch.arange(sum(lengths)))


def test_packing_example_of_the_docstring() -> None:
    packing = Packing.of(cumulative([3, 3]), torch.tensor([0, 1, 2, 0, 1, 3]))
    assert (packing.rows, packing.width) == (2, 3)
    assert packing.to_padded.tolist() == [0, 1, 2, 0, 1, 3]
    assert packing.to_packed.tolist() == [0, 1, 2, 5]
    assert packing.again.tolist() == [3, 4]


def test_padding_is_at_the_end_of_shorter_rows() -> None:
    packing = plain([2, 3])
    assert packing.to_packed.tolist() == [0, 1, 3, 4, 5]
    assert packing.to_padded.view(2, 3)[0, :2].tolist() == [0, 1]
    assert packing.to_padded.view(2, 3)[1].tolist() == [2, 3, 4]
    assert packing.again.tolist() == []


@pytest.mark.parametrize("short_rows", [0, 64])
@pytest.mark.parametrize("window", [None, 4])
def test_equals_attention_row_by_row_with_gradients(
    window: int | None, short_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT_ROWS", short_rows)
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q, k, v = (torch.randn(1, h, total, 8, dtype=torch.double, requires_grad=True) for h in (4, 2, 2))
    out, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, packing=plain(LENGTHS), sliding_window=window
    )

    expected = []
    for row_q, row_k, row_v in zip(*(x.split(LENGTHS, dim=2) for x in (q, k, v))):
        n = row_q.shape[2]
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        row = F.scaled_dot_product_attention(row_q, row_k, row_v, attn_mask=mask, enable_gqa=True)
        expected.append(row.transpose(1, 2))
    reference = torch.cat(expected, dim=1)
    torch.testing.assert_close(out, reference)

    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    want = torch.autograd.grad((reference * weights).sum(), (q, k, v))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_packed_model_equals_separate_rows(kind: str) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"intermediate_size": 48, "vocab_size": 19, "max_position_embeddings": 64}
    config, cls = (
        (Qwen3Config(head_dim=8, **small), Qwen3ForCausalLM)
        if kind == "qwen3"
        else (Qwen2Config(**small), Qwen2ForCausalLM)
    )
    packed = cls(copy.deepcopy(config)).eval()
    separate = cls(copy.deepcopy(config)).eval()
    separate.load_state_dict(packed.state_dict())
    packed.set_attn_implementation(NAME)

    rows = [torch.randint(0, 19, (n,)) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    with torch.no_grad():
        got = packed(
            input_ids=torch.cat(rows)[None],
            position_ids=positions[None],
            use_cache=False,
            packing=plain(LENGTHS),
        ).logits[0]
        want = torch.cat([separate(input_ids=row[None]).logits[0] for row in rows])
    torch.testing.assert_close(got, want, atol=1.5e-6, rtol=0)


def test_shared_prompts_give_the_same_states_and_gradients() -> None:
    """Three rows, two with one prompt: the model run on shared and on repeated prompts, in double precision."""
    torch.manual_seed(0)
    batch = from_published_dict(
        {
            "tokens": [[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 2, 3, 8, 9, 10]],
            "response_lengths": [2, 1, 3],
            "loss_masks": [[1, 1], [1], [1, 1, 1]],
        }
    )
    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=19, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).double()
    model.set_attn_implementation(NAME)
    assert norm.use_in(model) == 9  # in double precision throughout, unlike the model's own

    def states(share: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        micro = pack(batch, [0, 1, 2], share_prompts=share)
        hidden = model.base_model(
            input_ids=micro.tokens[None],
            position_ids=micro.position_ids[None],
            use_cache=False,
            packing=Packing.of(micro.cu_seqlens, micro.row_places),
        ).last_hidden_state[0]
        predicting = hidden.index_select(0, micro.predicting)
        weights = torch.linspace(-1, 1, predicting.numel(), dtype=torch.double).view_as(predicting)
        grads = torch.autograd.grad((predicting * weights).sum(), list(model.base_model.parameters()))
        return predicting, list(grads), len(micro.tokens)

    shared, shared_grads, shared_size = states(True)
    repeated, repeated_grads, repeated_size = states(False)
    assert (shared_size, repeated_size) == (12, 15)
    torch.testing.assert_close(shared, repeated, rtol=0, atol=1e-12)
    for a, b in zip(shared_grads, repeated_grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
