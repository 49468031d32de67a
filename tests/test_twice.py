"""What has no second derivative is refused by name, before anything is changed."""

from typing import Any

import pytest
import torch
from cases import Tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hyperopt_nested as hn


class Squared(torch.autograd.Function):
    """A function that cannot be differentiated twice; torch would take its second derivative for zero, without a word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


QUERIES = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CALLS: list[int] = []


def attention(params: Tensors, batch: Any, hypers: Any = None) -> Tensor:
    CALLS.append(batch)
    x = QUERIES @ params["w"]
    return torch.nn.functional.scaled_dot_product_attention(x, x, x).square().sum()


def marked(params: Tensors, batch: Any, hypers: Any = None) -> Tensor:
    return Squared.apply(params["w"]).square().sum()


def bag(params: Tensors, batch: Any, hypers: Any = None) -> Tensor:
    return torch.nn.functional.embedding_bag(torch.tensor([[0, 1]]), params["w"], mode="max").square().sum()


def weights() -> Tensors:
    return {"w": torch.randn(4, 4, generator=torch.Generator().manual_seed(1))}


def optimizer() -> hn.Optimizer:
    return hn.sgd(lr=hn.learn(0.01, by=hn.sgd()))


@pytest.mark.parametrize(
    ("loss", "method", "operation"),
    [
        (attention, "reverse", "_scaled_dot_product_flash_attention_for_cpu_backward, which has no double backward"),
        (attention, "forward", "_scaled_dot_product_flash_attention_for_cpu, which has no forward derivative"),
        (attention, "implicit", "_scaled_dot_product_flash_attention_for_cpu_backward, which has no double backward"),
        (marked, "reverse", "SquaredBackward, which has no double backward"),
        (marked, "forward", r"autograd.Function, which has no forward derivative"),
        (bag, "reverse", "_embedding_bag_backward, which has no double backward"),
        (bag, "forward", "_embedding_bag, which has no forward derivative"),
    ],
)
def test_hypergradient_names_the_operation_and_a_remedy_at_once(loss: Any, method: Any, operation: str) -> None:
    CALLS.clear()
    with pytest.raises(NotImplementedError, match=rf"the loss uses {operation}.*sdpa_kernel\(SDPBackend.MATH\).*curvature='none'"):
        hn.hypergradient(optimizer(), weights(), [0] if method == "implicit" else range(50), loss, loss, method=method)
    assert set(CALLS) <= {0}


def test_the_remedy_for_attention_helps() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        found = [hn.hypergradient(optimizer(), weights(), range(3), attention, attention, method=m) for m in ("reverse", "forward")]  # type: ignore[arg-type]
    torch.testing.assert_close(found[0]["lr"]["model"], found[1]["lr"]["model"], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("loss", "operation"), [(attention, "_scaled_dot_product_flash"), (marked, "SquaredBackward"), (bag, "_embedding_bag")]
)
def test_exact_curvature_names_it_too_and_changes_nothing(loss: Any, operation: str) -> None:
    weight = torch.nn.Parameter(weights()["w"])
    opt = hn.HyperOptimizer([("w", weight)], optimizer(), horizon=hn.Discounted(1.0, curvature="exact"))
    before, state = weight.detach().clone(), {key: leaf.clone() for key, leaf in opt.state[weight].items()}
    with pytest.raises(NotImplementedError, match=operation):
        opt.step(lambda: loss({"w": weight}, 0))
    assert torch.equal(weight.detach(), before)
    assert weight.grad is None
    assert all(torch.equal(leaf, state[key]) for key, leaf in opt.state[weight].items())
    plain = hn.HyperOptimizer([("w", weight)], optimizer(), horizon=hn.Discounted(1.0))  # the remedy
    loss({"w": weight}, 0).backward()
    plain.step()
    assert not torch.equal(weight.detach(), before)


def test_an_error_of_another_kind_is_not_renamed() -> None:
    def wrong(params: Tensors, batch: Any, hypers: Any = None) -> Tensor:
        return (params["w"] @ torch.ones(3)).sum()

    with pytest.raises(RuntimeError, match="size mismatch"):
        hn.hypergradient(optimizer(), weights(), range(3), wrong, wrong)
