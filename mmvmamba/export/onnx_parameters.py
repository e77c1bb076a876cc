"""Parameters of a scan as constants of a graph, already in the shapes that its operators take."""

import numpy as np
import torch


class Parameters:
    """Arrays, which a tracer takes as they are: what is computed of them here costs nothing at run time.

    Args:
        x_proj_weight (Tensor): (K, R + 2N, D); this and what follows as in :func:`mmvmamba.ops.ss2d_scan`.
        dt_projs_weight (Tensor): (K, D, R).
        dt_projs_bias (Tensor): (K, D).
        A_logs (Tensor): (K * D, N).
        Ds (Tensor): (K * D,).

    Attributes:
        rank (int): R.
        states (int): N.
        projection (Tensor): (D, K * (R + 2N)), a constant to multiply with.
        dt_weight (ndarray): (K, R, D).
        dt_bias (ndarray): (K, D).
        A (ndarray): (K, N, D), negative.
        skip (Tensor): (D,), a constant: the sum over the routes.
    """

    def __init__(self, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds):
        weight, dt_weight, self.dt_bias, A_logs, Ds = (
            t.detach().numpy() for t in (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
        )
        routes, channels, self.rank = dt_weight.shape
        self.states = A_logs.shape[1]
        self.dt_weight = dt_weight.transpose(0, 2, 1)
        self.A = -np.exp(A_logs).reshape(routes, channels, self.states).transpose(0, 2, 1)
        self.projection = torch.from_numpy(np.ascontiguousarray(weight.reshape(-1, channels).T))
        self.skip = torch.from_numpy(Ds.reshape(routes, channels).sum(0))
