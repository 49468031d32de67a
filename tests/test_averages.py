"""Averaged weights where trainers and users want them: `eval` and `train` around evaluation, checkpoints, state dicts of models."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ftp
import hyperopt_nested as hn
from hyperopt_nested.rule import Optimizer

RULES: dict[str, Callable[[], Optimizer]] = {
    "schedule-free": lambda: hn.schedule_free_adamw(hn.learn(0.05, by=hn.sgd(1e-4))),
    "average": lambda: hn.ema(hn.adamw(hn.learn(0.05)), decay=0.8),
    "slow": lambda: hn.lookahead(hn.sgd(0.1, momentum=0.5), k=3),
}


class Language(nn.Module):
    """Tied weights, buffers, and a tensor that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.full((1,), 2.0), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.embed(tokens))) * self.scale
        return out


def made(rule: str, backend: Any = "auto") -> tuple[Language, hn.HyperOptimizer]:
    torch.manual_seed(0)
    model = Language()
    return model, hn.HyperOptimizer(model.named_parameters(), RULES[rule](), backend=backend)


def train(model: nn.Module, opt: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        opt.zero_grad()
        model(torch.tensor([step % 5, (step + 2) % 5])).square().mean().backward()
        opt.step()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found.state_dict().values(), expected.state_dict().values(), strict=True))


@pytest.mark.parametrize(("rule", "backend"), [*((rule, "reference") for rule in RULES), ("average", "foreach"), ("average", "fused")])
def test_a_trainer_evaluates_averages_and_trains_on_as_if_it_had_not(rule: str, backend: str) -> None:
    model, opt = made(rule, backend)
    plain, other = made(rule, backend)
    for begin, steps in ((0, 4), (4, 4), (8, 3)):
        opt.train()
        train(model, opt, steps, begin)
        train(plain, other, steps, begin)
        averages = {name: value.clone() for name, value in opt.eval_params().items()}
        opt.eval()
        opt.eval()
        assert all(torch.equal(param, averages[name]) for name, param in model.named_parameters() if name in averages)
        assert all(torch.equal(value, averages[name]) for name, value in opt.eval_params().items())
        assert not torch.equal(model.embed.weight, plain.embed.weight)
        with pytest.raises(RuntimeError, match=r"step\(\): averages are in the place .* since eval\(\): call train\(\) first"):
            opt.step()
    opt.train()
    assert_same(model, plain)
    assert opt.learned() == other.learned()
    assert not opt.changed
    assert all("train_params" not in entries for entries in opt.state.values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("saved_by", ["state_dict", "deepcopy"])
def test_a_checkpoint_that_is_saved_while_evaluating_goes_on(rule: str, saved_by: str) -> None:
    plain, other = made(rule)
    train(plain, other, 8)
    model, opt = made(rule)
    train(model, opt, 5)
    opt.eval()
    if saved_by == "deepcopy":
        model, opt = copy.deepcopy((model, opt))
    else:
        file = io.BytesIO()
        torch.save([model.state_dict(), opt.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file)
        torch.manual_seed(1)
        model = Language()
        opt = hn.HyperOptimizer(model.named_parameters(), RULES[rule]())
        model.load_state_dict(weights)
        opt.load_state_dict(state)
    with pytest.raises(RuntimeError, match="call train"):
        opt.step()
    opt.train()
    train(model, opt, 3, 5)
    assert_same(model, plain)


def test_a_model_loads_averages_with_tied_names_buffers_and_frozen_tensors() -> None:
    model, opt = made("average")
    train(model, opt, 3)
    shadow = Language()
    shadow.load_state_dict(opt.averaged_state_dict(model))
    torch.testing.assert_close(shadow.embed.weight, opt.eval_params()["embed.weight"], rtol=0, atol=0)
    assert shadow.head.weight is shadow.embed.weight
    assert torch.equal(shadow.norm.running_mean, model.norm.running_mean)  # type: ignore[arg-type]
    assert float(shadow.scale) == 2.0


def test_nothing_is_replaced_without_averages_or_before_the_first_step() -> None:
    for model, opt in ((m := Language(), hn.optim.AdamW(m.named_parameters())), made("average")):
        before = copy.deepcopy(model)
        opt.eval()
        assert_same(model, before)
        train(model, opt, 1)


def test_the_wrapper_passes_it_on() -> None:
    model = nn.Linear(3, 1)
    inner = hn.HyperOptimizer(model.named_parameters(), hn.ema(hn.sgd(0.1), decay=0.8))
    opt = ftp.FTP(inner)
    model(torch.ones(2, 3)).square().mean().backward()
    opt.step()
    before = model.weight.detach().clone()
    opt.eval()
    assert not torch.equal(model.weight, before)
    opt.train()
    assert torch.equal(model.weight, before)
