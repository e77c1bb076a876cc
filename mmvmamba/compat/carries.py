"""The tensor ``x`` between ``fwd`` and ``bwd``: the last state for callers, and the carries of our kernels.

Callers expect (batch, dim, chunks of 2048 steps, 2N), contiguous, and read the last state as ``x[:, :, -1, 1::2]``;
fake kernels of theirs promise that shape to the compiler.  Our kernels save a state more often.  Those states lie
behind ``x`` in its storage, where they go wherever ``x`` goes uncopied: through ``save_for_backward``, ``detach`` and
custom ops.  A copy of ``x`` loses them, and backward computes them again.
"""

import functools
from typing import Callable, Optional

import torch

from mmvmamba.ops.checks import check_float, check_same_device, check_shape
from mmvmamba.ops.extension import load_extension

CHUNK = 2048  # steps of a chunk as callers count them


def pack(states: torch.Tensor, length: int) -> torch.Tensor:
    """Make ``x`` of the saved states.

    Args:
        states (Tensor): State before each chunk of a kernel, and the last, (batch, dim, saved, N).
        length (int): Steps L of the scan.

    Returns:
        Tensor: (batch, dim, chunks, 2N); each chunk has the last state at 1::2 of its last dimension.  In a graph that
        is being traced, where storages do not exist, the chunks are the kernel's own.
    """
    if torch.compiler.is_compiling():
        return states[:, :, 1:].repeat_interleave(2, dim=3)
    chunks = (length + CHUNK - 1) // CHUNK
    compiled = _compiled_pack()
    if compiled is not None:
        return compiled(states, chunks)
    batch, dim, saved, d_state = states.shape
    row = saved * d_state
    last = states.as_strided((batch, dim, chunks, d_state, 2), (dim * row, row, 0, 1, 0), row - d_state)
    if saved == 2:  # the first is zero, the second the last
        return last.reshape(batch, dim, chunks, 2 * d_state)
    both = torch.cat((last.reshape(-1), states.view(-1)))
    width = 2 * chunks * d_state
    return both.as_strided((batch, dim, chunks, 2 * d_state), (dim * width, width, 2 * d_state, 1))


@functools.cache
def _compiled_pack() -> Optional[Callable]:
    """The extension's :func:`pack`, which costs the host less; None without one, or with one built before it was."""
    if load_extension() or not hasattr(torch.ops.mmvmamba, 'pack_carries'):
        return None
    return torch.ops.mmvmamba.pack_carries.default


def check(name: str, x: torch.Tensor, u: torch.Tensor, d_state: int, saved: int) -> None:
    """Check that ``x`` may be what a forward of ``u`` returned, in eager mode or from a graph.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If its shape or its device is another.
    """
    check_float(name, 'x', x, 'batch, dim, chunks, 2N')
    batch, dim, length = u.shape
    if x.shape != (batch, dim, saved - 1, 2 * d_state):
        check_shape(name, 'x', x, (batch, dim, (length + CHUNK - 1) // CHUNK, 2 * d_state), 'what fwd returned')
    check_same_device(name, 'u', dict(u=u, x=x))


def unpack(x: torch.Tensor, saved: int) -> Optional[torch.Tensor]:
    """The saved states (batch, dim, saved, N) from ``x``; None if it was copied and lost them."""
    batch, dim, chunks, width = x.shape
    if chunks == saved - 1:
        after = x[..., 1::2]
        return torch.cat((torch.zeros_like(after[:, :, :1]), after), dim=2)
    if saved == 2:
        return torch.stack((torch.zeros_like(x[:, :, 0, 1::2]), x[:, :, -1, 1::2]), dim=2)
    d_state = width // 2
    row, size = saved * d_state, x.numel() + batch * dim * saved * d_state
    if not x.is_contiguous() or x.storage_offset() or x.untyped_storage().nbytes() != size * x.element_size():
        return None
    return x.as_strided((batch, dim, saved, d_state), (dim * row, row, d_state, 1), x.numel())
