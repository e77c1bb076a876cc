"""Focal losses: cross entropy in which easy examples count little, -alpha (1 - p)^gamma log(p)."""

import torch

from .plain import plain, widen


def _log(value):
    """Logarithm that stays finite at 0, as mmcv's does."""
    return value.clamp(min=torch.finfo(torch.float32).tiny).log()


def _weigh(value, target, weight):
    """``value`` times the weight of each row's class; 1 for a background row, whose target is no class."""
    if weight.numel() == 0:
        return value
    known = (target >= 0) & (target < len(weight))
    factor = torch.where(known, widen(weight)[target.clamp(0, len(weight) - 1)], 1)
    return value * factor.view(-1, *[1] * (value.dim() - 1))


def _positives(target, classes: int):
    """(N, classes) mask of the class that each row belongs to, if any."""
    return target[:, None] == torch.arange(classes, device=target.device)


@plain
def sigmoid_focal_loss_forward(input, target, weight, output, gamma: float, alpha: float) -> None:
    """Loss of each class on its own.

    Args:
        input (torch.Tensor): (N, C) logits.
        target (torch.Tensor): (N,) classes; C means background.
        weight (torch.Tensor): (C,) weights of the targets, or empty.
        output (torch.Tensor): (N, C), written.
        gamma (float): How much easy examples are held back.
        alpha (float): Weight of positives; negatives get 1 - alpha.
    """
    p = widen(input).sigmoid()
    positive = -alpha * (1 - p) ** gamma * _log(p)
    negative = -(1 - alpha) * p**gamma * _log(1 - p)
    loss = torch.where(_positives(target, input.shape[1]), positive, negative)
    output.copy_(_weigh(loss, target, weight))


@plain
def sigmoid_focal_loss_backward(input, target, weight, grad_input, gamma: float, alpha: float) -> None:
    """Gradient of each logit into ``grad_input``; the arguments are those of the forward."""
    p = widen(input).sigmoid()
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * _log(p))
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * _log(1 - p) - p)
    grad = torch.where(_positives(target, input.shape[1]), positive, negative)
    grad_input.copy_(_weigh(grad, target, weight))


def _own(softmax, target):
    """Probability of each row's class, and whether it has one."""
    known = (target >= 0) & (target < softmax.shape[1])
    return softmax.gather(1, target.clamp(0, softmax.shape[1] - 1)[:, None])[:, 0], known


@plain
def softmax_focal_loss_forward(input, target, weight, output, gamma: float, alpha: float) -> None:
    """Loss of each row; 0 where the target is no class.

    Args:
        input (torch.Tensor): (N, C) probabilities.
        target (torch.Tensor): (N,) classes.
        weight (torch.Tensor): (C,) weights of the targets, or empty.
        output (torch.Tensor): (N,), written.
        gamma (float): How much easy examples are held back.
        alpha (float): Factor of all.
    """
    p, known = _own(widen(input), target)
    loss = -alpha * (1 - p) ** gamma * _log(p)
    output.copy_(_weigh(loss.masked_fill(~known, 0), target, weight))


@plain
def softmax_focal_loss_backward(input, target, weight, buff, grad_input, gamma: float, alpha: float) -> None:
    """Gradient of each logit into ``grad_input``; ``buff`` (N,) gets each row's factor."""
    softmax = widen(input)
    p, known = _own(softmax, target)
    easy = 1 - p
    slope = gamma * easy ** (gamma - 1) * p * _log(p) if gamma else 0
    factor = _weigh((alpha * (slope - easy**gamma)).masked_fill(~known, 0), target, weight)
    buff.copy_(factor)
    grad_input.copy_(factor[:, None] * (_positives(target, softmax.shape[1]).to(softmax) - softmax))
