"""The norm of training against Hugging Face's module and against numerical gradients."""

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from miles.trainer.fsdp.norm import use_in
from miles.trainer.rms_norm import RMSNorm


def test_equals_the_module_forward_and_backward() -> None:
    torch.manual_seed(0)
    module = Qwen3RMSNorm(48, eps=1e-6)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(3, 5, 48, requires_grad=True)
    weights = torch.randn(3, 5, 48)
    want = torch.autograd.grad((module(x) * weights).sum(), (x, module.weight))
    got = torch.autograd.grad((RMSNorm.apply(x, module.weight, 1e-6) * weights).sum(), (x, module.weight))
    torch.testing.assert_close(RMSNorm.apply(x, module.weight, 1e-6), module(x))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_gradients_are_right() -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((4, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-3), (x, w))


def test_bfloat16_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    module = Qwen3RMSNorm(64).to(torch.bfloat16)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    out = RMSNorm.apply(x, module.weight, module.variance_epsilon)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, module(x), rtol=0, atol=0.02)


def test_only_norms_of_that_kind_are_replaced() -> None:
    class OtherRMSNorm(torch.nn.Module):
        eps = 1e-6

    model = torch.nn.ModuleList([Qwen3RMSNorm(8), OtherRMSNorm(), torch.nn.LayerNorm(8)])
    assert use_in(model) == 1
