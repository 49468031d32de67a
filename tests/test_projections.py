"""Laws of the projections."""

from typing import Any

import pytest
import torch
from cases import EXACT, randn
from hypothesis import given
from hypothesis import strategies as st

import hyperopt_nested as hn

BALLS = {ball.name: ball for ball in (hn.mars, hn.frobenius, hn.row_l2, hn.linf)}
shapes = st.sampled_from([(), (1,), (4,), (3, 5), (2, 3, 2), (2, 1, 3, 2), (0, 3), (3, 0)])
radii = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))
pytestmark = pytest.mark.parametrize("ball", BALLS)


@st.composite
def points(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A point and a center, some entries of which are equal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(shapes)
    scale = 10.0 ** draw(st.integers(-4, 4))
    center = randn(shape, generator)
    moved = randn(shape, generator) * (torch.rand(shape, generator=generator) > 0.2) * scale
    return center + moved, center


@given(points(), radii)
def test_feasible(ball: str, at: Any, radius: float) -> None:
    point, center = at
    result = BALLS[ball].project(point, torch.tensor(radius), center=center)
    slack = EXACT * max(radius, float(center.abs().amax()) if center.numel() else 0.0) * max(1, point.numel())
    assert float(BALLS[ball].norm(result - center)) <= radius + slack
    assert result.shape == point.shape


@given(points(), radii)
def test_idempotent(ball: str, at: Any, radius: float) -> None:
    point, _ = at
    once = BALLS[ball].project(point, torch.tensor(radius))
    torch.testing.assert_close(BALLS[ball].project(once, torch.tensor(radius)), once, rtol=EXACT, atol=0)


@given(points(), radii)
def test_the_center_is_a_fixed_point(ball: str, at: Any, radius: float) -> None:
    _, center = at
    assert torch.equal(BALLS[ball].project(center, torch.tensor(radius), center=center), center)


@given(points())
def test_radius_zero_is_the_center(ball: str, at: Any) -> None:
    point, center = at
    assert torch.equal(BALLS[ball].project(point, torch.tensor(0.0), center=center), center)


@given(points(), radii, radii)
def test_monotone_in_the_radius(ball: str, at: Any, one: float, other: float) -> None:
    point, _ = at
    small, large = (BALLS[ball].project(point, torch.tensor(radius)).abs() for radius in sorted((one, other)))
    assert bool((small <= large * (1 + EXACT)).all())


@pytest.mark.parametrize("saturation", ["exact", "straight-through"])
@given(points(), radii)
def test_blocks_inside_stay_bit_for_bit_and_others_keep_their_direction(ball: str, saturation: Any, at: Any, radius: float) -> None:
    point, center = at
    result = BALLS[ball].project(point, torch.tensor(radius), center=center, saturation=saturation)
    inside = (BALLS[ball].norms(point - center) <= radius).expand(point.shape)
    assert torch.equal(result[inside], point[inside])
    assert bool(((result - center) * (point - center) >= -EXACT * center.abs().amax() ** 2 if center.numel() else result >= result).all())


@given(points(), st.floats(1e-3, 1e2))
def test_nearest_point(ball: str, at: Any, radius: float) -> None:
    """No point of the ball is nearer in the Euclidean norm, by the variational inequality; MARS scales whole rows."""
    point, _ = at
    result = BALLS[ball].project(point, torch.tensor(radius))
    other = BALLS[ball].project(torch.randn(point.shape), torch.tensor(radius))
    inner = float(((point - result) * (other - result)).sum())
    size = float(point.square().sum()) + radius**2 * max(1, point.numel())
    if ball == "mars":
        scaled = point * (radius / hn.mars.norms(point)).clamp(max=1)  # a row of zeros stays
        torch.testing.assert_close(result, scaled, rtol=1e-7 + 1e-8 / radius, atol=1e-30)
    else:
        assert inner <= 1e-6 * size


def test_norm_by_hand(ball: str) -> None:
    matrix = torch.tensor([[3.0, -4.0], [1.0, 1.0]])
    expected = {"mars": 7.0, "frobenius": 27.0**0.5, "row_l2": 5.0, "linf": 4.0}
    assert float(BALLS[ball].norm(matrix)) == pytest.approx(expected[ball])
    assert float(BALLS[ball].norm(torch.tensor([1.0, -2.0]))) == pytest.approx({"mars": 3.0, "linf": 2.0}.get(ball, 5**0.5))
    kernel = matrix.reshape(2, 1, 2, 1)
    assert float(BALLS[ball].norm(kernel)) == pytest.approx(expected[ball])
