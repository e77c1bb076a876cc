"""DropPath keeps or drops whole samples, and the mean."""

import torch

from mmvmamba.layers.drop_path import DropPath


def test_samples_are_dropped_as_wholes_and_the_mean_is_kept():
    x = torch.rand(4000, 2, 2, 3) + 0.5
    ratio = (DropPath(0.25)(x) / x).flatten(1)
    torch.testing.assert_close(ratio.amin(dim=1), ratio.amax(dim=1))
    torch.testing.assert_close(ratio[ratio > 0], torch.full_like(ratio[ratio > 0], 1 / 0.75))
    assert abs((ratio > 0).float().mean().item() - 0.75) < 0.03


def test_drops_nothing_in_evaluation_and_without_a_rate_and_everything_at_rate_1():
    x = torch.rand(3, 2)
    assert DropPath(0.5).eval()(x) is x and DropPath(0.5).eval().draw(x) == (None,)
    assert DropPath(0.0)(x) is x and DropPath(0.0).draw(x, 2) == (None, None)
    assert torch.equal(DropPath(1.0)(x), torch.zeros(3, 2))


def test_branches_are_drawn_apart():
    first, second = DropPath(0.5).draw(torch.rand(1000, 2), branches=2)
    assert first.shape == second.shape == (1000,) and 0.4 < (first == second).float().mean().item() < 0.6
