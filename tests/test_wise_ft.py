"""Learned WiSE-FT: the share that a validation loss wants, exact derivatives, and what survives."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftp
import hyperopt_nested as hn
from ftp import WiSEFT


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def moved(model: nn.Module) -> nn.Module:
    """As training moves it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return model


def near(model: nn.Module, wanted: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A validation loss that has its minimum where the weights are these."""

    def closure() -> Tensor:
        loss = torch.stack([(p - wanted[name]).square().sum() for name, p in model.named_parameters()]).sum()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("anchor", ["start", "mapping", "zero"])
def test_the_share_is_what_the_validation_loss_wants(per: Any, anchor: str) -> None:
    model = network()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    anchors = {"start": start, "mapping": start, "zero": {name: torch.zeros_like(p) for name, p in start.items()}}[anchor]
    given: Any = {"start": None, "mapping": start, "zero": "zero"}[anchor]
    wise = WiSEFT(model.named_parameters(), per=per, lr=0.02, updates=600, anchor=given)
    tuned = {name: p.detach().clone() for name, p in moved(model).named_parameters()}
    shares = dict.fromkeys(start, 0.3) if per == "model" else {name: 0.2 + 0.2 * i for i, name in enumerate(start)}
    wanted = {name: anchors[name] + share * (tuned[name] - anchors[name]) for name, share in shares.items()}
    wise.step(near(model, wanted))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), wanted[name], rtol=0, atol=1e-3)
    expected = {"share": 0.3} if per == "model" else {f"share/{name}": value for name, value in shares.items()}
    assert wise.learned() == pytest.approx(expected, abs=1e-3)


def test_excluded_tensors_stay_and_failures_change_nothing() -> None:
    model = network()
    wise = WiSEFT(model.named_parameters(), exclude="2.*", updates=5, lr=0.1)
    before = copy.deepcopy(moved(model).state_dict())

    def fails() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        wise.step(fails)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert wise.learned() == {"share": 1.0}
    wise.step(near(model, dict(network().named_parameters())))
    assert torch.equal(model[2].weight, before["2.weight"])
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert wise.learned()["share"] < 0.6


def test_interpolation_passes_the_kit() -> None:
    hn.testing.check_rule(ftp.interpolate(hn.adam(lr=0.05), share=hn.learn(0.4, by=hn.sgd(lr=1e-3))), examples=5)


def test_bad_arguments_are_named() -> None:
    named = [*network().named_parameters()]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"per": "row"}, "per='row'"),
        ({"updates": 0}, "updates=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"exclude": "head"}, "'head' matches none"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            WiSEFT(named, **settings)
