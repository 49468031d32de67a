"""Write a new optimizer as the mathematics of one update, and learn all of its hyper-parameters.

The rule is signed momentum, smoothed: the sign is replaced by x / sqrt(x^2 + delta^2), so that delta can be learned too.
Run it with `python examples/write_a_rule.py`.
"""

import torch
from torch import Tensor

import hyperopt_nested as hn


@hn.rule(hn.rules.zeros("average"), separable="element")
def soft_sign(
    param: Tensor,
    grad: Tensor,
    state: hn.typing.State,
    *,
    lr: Tensor = hn.Positive(1e-2, via="log"),
    beta: Tensor = hn.UnitInterval(0.9, via="logit"),
    delta: Tensor = hn.Positive(0.1),
) -> tuple[Tensor, hn.typing.State]:
    average = beta * state["average"] + (1 - beta) * grad
    return param - lr * average / (average.square() + delta.square()).sqrt(), {"average": average}


def main() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(20, 20)
    target = torch.randn(20)
    weight = torch.nn.Parameter(torch.zeros(20))
    learner = hn.adam(lr=0.02)
    optimizer = soft_sign(
        lr=hn.learn(1e-2, by=learner), beta=hn.learn(0.9, by=learner), delta=hn.learn(0.1, by=learner, per="element", via="log")
    )
    opt = hn.HyperOptimizer([("weight", weight)], optimizer)
    for step in range(201):
        opt.zero_grad()
        loss = (matrix @ weight - target).square().mean()
        loss.backward()
        opt.step()
        if step % 50 == 0:
            values = {name: next(iter(found.values())).mean().item() for name, found in opt.hypers().items()}
            print(f"step {step:3d}  loss {loss.item():.4f}", *(f"{name} {value:.4f}" for name, value in values.items()), sep="  ")


if __name__ == "__main__":
    main()
