"""The effective receptive field: how much each input pixel moves the feature in the middle.

Defined by `Luo et al. <https://arxiv.org/abs/1701.04128>`_; the reading here is that of `RepLKNet
<https://arxiv.org/abs/2203.06717>`_, which VMamba's paper follows: the positive gradient of the rectified middle
feature, summed over channels and averaged over images.
"""

import torch
import torch.nn.functional as F
from torch import nn


def contribution(backbone: nn.Module, x: torch.Tensor, output: int = -1) -> torch.Tensor:
    """Contribution of every pixel of an image to the middle of a feature map.

    Args:
        backbone (nn.Module): Maps images to a tuple of maps (B, C, h, w); in eval mode.
        x (Tensor): One image, (1, channels, H, W).
        output (int): Which of the maps. Default: the last.

    Returns:
        Tensor: Contributions (H, W), float64 on the CPU.
    """
    x = x.detach().requires_grad_()
    feature = backbone(x)[output]
    row, column = (size // 2 for size in feature.shape[2:])
    (gradient,) = torch.autograd.grad(feature[:, :, row, column].relu().sum(), x)
    return gradient.relu().sum(dim=(0, 1)).double().cpu()


def smallest_square(field: torch.Tensor, share: float) -> tuple:
    """The smallest square that holds a share of the whole contribution, wherever it lies.

    A square around the image's middle would depend on the padding of strided convolutions, which moves the middle
    feature's center by up to half its stride.

    Args:
        field (Tensor): Contributions, (H, W).
        share (float): Between 0 and 1.

    Returns:
        tuple[int, int, int]: Side, and row and column of the top left pixel; a square as long as the shorter side of
        the image grows on as a rectangle along the longer one.
    """
    height, width = field.shape
    integral = F.pad(field.cumsum(0).cumsum(1), (1, 0, 1, 0))
    wanted = share * float(integral[-1, -1]) * (1 - 1e-12)  # rounding must not ask for more than there is

    def best(side):
        h, w = min(side, height), min(side, width)
        held = integral[h:, w:] - integral[:-h, w:] - integral[h:, :-w] + integral[:-h, :-w]
        place = int(held.argmax())
        return float(held.max()), place // held.shape[1], place % held.shape[1]

    low, high = 1, max(height, width)
    while low < high:
        side = (low + high) // 2
        low, high = (low, side) if best(side)[0] >= wanted else (side + 1, high)
    return (low, *best(low)[1:])
