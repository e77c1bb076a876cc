"""The selective scan in NumPy float64, which shares no code with any backend, and what float32 may lose of it."""

import numpy as np
import torch


def _as_numpy(tensor):
    return tensor.detach().double().cpu().resolve_neg().numpy()


def oracle(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, out_dtype=None):
    """The recurrence in NumPy float64.

    Returns:
        tuple[ndarray, ndarray, ndarray]: y (batch, dim, L); the sum of the sizes of its terms, to which rounding is
        relative, infinite from the step on where a state, its decay or, on a GPU, a product of consecutive decays
        leaves the range of float32; and what y may lose where the op's numbers fall below the smallest normal of its
        state, which a growing state amplifies.
    """
    on_gpu = u.is_cuda
    # float32's smallest normal number, and a little more
    smallest = torch.finfo(torch.float64).smallest_normal if u.dtype == torch.float64 else 1.22e-38
    u, delta, A, B, C = (_as_numpy(t) for t in (u, delta, A, B, C))
    D, bias = (None if t is None else _as_numpy(t) for t in (D, delta_bias))
    channels = u.shape[1] // B.shape[1]
    if bias is not None:
        delta = delta + bias[:, None]
    if delta_softplus:
        delta = np.logaddexp(0, delta)
    with np.errstate(over='ignore', invalid='ignore', under='ignore'):
        B, C = (np.moveaxis(np.repeat(t, channels, axis=1), 3, 0) for t in (B, C))  # (L, batch, dim, N)
        u, delta = np.moveaxis(u, 2, 0), np.moveaxis(delta, 2, 0)
        h = np.zeros(B.shape[1:])
        size, floor, outputs, sizes, floors = np.zeros_like(h), np.zeros_like(h), [], [], []
        lost, grown = np.zeros(h.shape[:2], dtype=bool), np.ones_like(h)
        for t in range(len(u)):
            decay, drive = np.exp(delta[t][..., None] * A), (delta[t] * u[t])[..., None] * B[t]
            # the decay, the step, and each product of delta, u and B in any order; where u or B is 0, nothing is lost
            fine = (1 + abs(delta[t][..., None])) * (1 + abs(u[t][..., None])) * (1 + abs(B[t]))
            floor = decay * floor + smallest * (size + np.where(u[t][..., None] * B[t] == 0, 0, fine))
            floor = np.nan_to_num(floor, nan=1e300, posinf=1e300)
            h, size = decay * h + drive, decay * size + abs(drive)
            skip = 0 if D is None else D * u[t]
            outputs.append((h * C[t]).sum(-1) + skip)
            grown = np.maximum(grown, 1) * decay if on_gpu else decay
            lost |= np.maximum(size, grown).max(-1) > 1e36
            sizes.append(np.where(lost, np.inf, (size * abs(C[t])).sum(-1) + abs(skip)))
            floors.append((floor * abs(C[t])).sum(-1) + smallest * C.shape[-1])
    return np.stack(outputs, -1), np.stack(sizes, -1), np.stack(floors, -1)
