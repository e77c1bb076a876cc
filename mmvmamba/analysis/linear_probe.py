"""A linear probe: how well a linear classifier tells classes apart by the features of a frozen backbone."""

from dataclasses import dataclass
from typing import Callable, Optional

import torch
import torch.nn.functional as F

CHUNK = 8192  # rows of one matrix product: logits of 1000 classes take 32 MB


@dataclass(frozen=True)
class LinearClassifier:
    """Logits are ``features @ weight.T + bias``.

    Attributes:
        weight (Tensor): (classes, C), float32 on the CPU.
        bias (Tensor): (classes,), likewise.
        loss (float): Cross-entropy on what it was fitted to, without the penalty.
        iterations (int): How many were made.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    loss: float
    iterations: int

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
        """Share of rows whose label is among the k largest logits, in percent.

        Args:
            features (Tensor): (M, C), float32 on the CPU.
            labels (Tensor): (M,), int64.
            k (int): Between 1 and the number of classes. Default: 1.

        Returns:
            float: 0 to 100.
        """
        right = 0
        for rows, wanted in zip(features.split(CHUNK), labels.split(CHUNK)):
            best = F.linear(rows, self.weight, self.bias).topk(k, dim=1).indices
            right += int((best == wanted[:, None]).any(dim=1).sum())
        return 100 * right / len(labels)


def fit_linear_classifier(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    l2: float = 1e-4,
    max_iterations: int = 100,
    device='cpu',
    progress: Optional[Callable] = None,
) -> LinearClassifier:
    """Multinomial logistic regression by L-BFGS over all rows, from zero: the same input gives the same classifier.

    Channels are brought to mean 0 and standard deviation 1 first, so that the penalty weighs all of them alike; the
    classifier that is returned takes the features as they are. It stops early once the loss falls by less than 1e-7.

    Args:
        features (Tensor): (M, C), float32 on the CPU.
        labels (Tensor): (M,), int64, from 0 to ``classes`` - 1.
        classes (int): Number of classes, at least 2.
        l2 (float): Half of it times the sum of squared weights is added to the mean cross-entropy. Default: 1e-4.
        max_iterations (int): Default: 100.
        device (str | torch.device): Where to compute. Default: cpu.
        progress (Callable, optional): Called without arguments after each iteration.

    Returns:
        LinearClassifier: The classifier.

    Raises:
        ValueError: If there are fewer than two classes, a label lies outside them, or features are not finite.
    """
    if classes < 2:
        raise ValueError(f'classes is {classes}, expected at least 2')
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        found = f'{int(labels.min())} to {int(labels.max())}' if len(labels) else 'none'
        raise ValueError(f'labels are {found}, expected some from 0 to {classes - 1}')
    rows, wanted = features.split(CHUNK), labels.split(CHUNK)
    mean = sum(some.double().sum(dim=0) for some in rows) / len(labels)
    variance = sum((some.double() - mean).square().sum(dim=0) for some in rows) / len(labels)
    if not bool(variance.isfinite().all()):
        raise ValueError('features are not finite; are the weights of the checkpoint?')
    scale = torch.where(variance > 0, variance, torch.ones_like(variance)).rsqrt()  # a constant channel stays 0
    shift, factor = mean.float().to(device), scale.float().to(device)
    weight = torch.zeros(classes, features.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=1, history_size=20, line_search_fn='strong_wolfe')

    def cross_entropy() -> float:
        """Mean over rows; its gradient is added to the parameters' chunk by chunk."""
        total = 0.0
        for some, targets in zip(rows, wanted):
            logits = F.linear((some.to(device) - shift) * factor, weight, bias)
            loss = F.cross_entropy(logits, targets.to(device), reduction='sum') / len(labels)
            loss.backward()
            total += float(loss)
        return total

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * l2 * weight.square().sum()
        penalty.backward()
        return penalty.detach() + cross_entropy()

    before, iterations = float('inf'), 0
    for _ in range(max_iterations):
        loss = float(optimizer.step(closure))  # at the start of the iteration
        if before - loss < 1e-7:
            break
        before, iterations = loss, iterations + 1
        if progress is not None:
            progress()
    last = cross_entropy()
    folded = weight.detach().cpu().double() * scale
    offset = bias.detach().cpu().double() - folded @ mean
    return LinearClassifier(folded.float(), offset.float(), last, iterations)
