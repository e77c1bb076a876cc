"""Layer normalisation by torch's own layers."""

import torch
import torch.nn.functional as F


def layer_norm(x, weight, bias, eps, out_dtype, shift, gelu) -> torch.Tensor:
    """Arguments as in :func:`mmvmamba.ops.layer_norm`."""
    dtype = torch.promote_types(x.dtype, weight.dtype)  # torch wants one dtype
    x = x.to(dtype) if shift is None else x.to(dtype) + shift.to(dtype)
    # a number also while a shape is traced
    y = F.layer_norm(x, [int(x.shape[-1])], weight.to(dtype), bias.to(dtype), eps)
    return (F.gelu(y) if gelu else y).to(out_dtype)


def add_branch(x, branch, factors) -> torch.Tensor:
    """``x + factors * branch``, with a factor for each sample or None."""
    if factors is not None:
        branch = branch * factors.to(branch.dtype).view(-1, *(1,) * (branch.dim() - 1))
    return x + branch
