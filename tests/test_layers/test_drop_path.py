"""DropPath keeps or drops whole samples, and the mean."""

import torch

from mmvmamba.layers.drop_path import DropPath


def test_samples_are_dropped_as_wholes_and_the_mean_is_kept():
    x = torch.rand(4000, 2, 3) + 0.5
    ratio = DropPath(0.25)(x) / x
    torch.testing.assert_close(ratio.amin(dim=(1, 2)), ratio.amax(dim=(1, 2)))
    torch.testing.assert_close(ratio[ratio > 0], torch.full_like(ratio[ratio > 0], 1 / 0.75))
    assert abs((ratio > 0).float().mean().item() - 0.75) < 0.03


def test_is_the_identity_in_evaluation_and_without_a_rate():
    x = torch.rand(3, 2)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert not DropPath(1.0)(x).any()
