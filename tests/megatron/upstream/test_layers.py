"""The norm of a CPU against its formula in float64."""

import pytest
import torch

from moe_replay.megatron.upstream.layers import _rms_norm

EPS = 1e-5


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_and_gradients(norm, x, weight, gradient):
    """Return y, and the gradients of x and the weight for ``gradient`` of y."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = norm(x, weight, EPS)
    y.backward(gradient.to(y.dtype))
    return y.detach(), x.grad, weight.grad


def by_formula(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def without_the_mean(x, weight, eps):
    """Take the scale of a row for a constant, as a wrong backward pass would."""
    x, weight = x.double(), weight.double()
    return x / (x.detach().square().mean(-1, keepdim=True) + eps).sqrt() * weight


def closeness(norm, *, transposed=False):
    """Return the largest difference of values and gradients between our norm and ``norm``."""
    x, weight = drawn(6, 3, 8, seed=1), drawn(8, seed=2)
    gradient = drawn(3, 6, 8, seed=3).transpose(0, 1) if transposed else drawn(6, 3, 8, seed=3)
    ours = norm_and_gradients(_rms_norm, x, weight, gradient)
    theirs = norm_and_gradients(norm, x, weight, gradient)
    return [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_those_of_the_formula(transposed):
    assert max(closeness(by_formula, transposed=transposed)) < 1e-5


def test_a_gradient_without_the_mean_is_seen():
    values, of_x, of_weight = closeness(without_the_mean)
    assert values < 1e-5 and of_weight < 1e-5 and of_x > 0.1


def test_a_row_of_zeros_has_a_finite_gradient():
    x, weight = torch.zeros(1, 4), torch.full((4,), 2.0)
    _, of_x, of_weight = norm_and_gradients(_rms_norm, x, weight, torch.ones(1, 4))
    # The scale is 1 / sqrt(1e-5) = 316.23, times the weight 2.
    torch.testing.assert_close(of_x, torch.full((1, 4), 632.4555))
    torch.testing.assert_close(of_weight, torch.zeros(4))
