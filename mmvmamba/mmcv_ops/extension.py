"""What ``mmcv._ext`` holds where mmcv was not compiled: the functions with a stand-in, and a refusal for each other."""

import torch
import torchvision

from . import attention, deform, losses, nms, overlaps, roi
from .finder import COMPILE, NAME


def get_compiler_version() -> str:
    """Stands where mmcv names its compiler, in the environment that mmengine logs."""
    return f'none (mmvmamba, over torchvision {torchvision.__version__})'


def get_compiling_cuda_version() -> str:
    """The CUDA version that torchvision's ops were built with."""
    number = torch.ops.torchvision._cuda_version()
    return f'{number // 1000}.{number % 1000 // 10}' if number > 0 else 'not available'


FUNCTIONS = {
    function.__name__: function
    for function in (
        nms.nms,
        nms.softnms,
        nms.nms_match,
        overlaps.bbox_overlaps,
        roi.roi_align_forward,
        roi.roi_align_backward,
        roi.roi_pool_forward,
        roi.roi_pool_backward,
        losses.sigmoid_focal_loss_forward,
        losses.sigmoid_focal_loss_backward,
        losses.softmax_focal_loss_forward,
        losses.softmax_focal_loss_backward,
        deform.deform_conv_forward,
        deform.deform_conv_backward_input,
        deform.deform_conv_backward_parameters,
        deform.modulated_deform_conv_forward,
        deform.modulated_deform_conv_backward,
        attention.ms_deform_attn_forward,
        attention.ms_deform_attn_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}


def refusal(name: str):
    """A function that says which compiled op was called, and how to get it."""

    def refuse(*args, **kwargs):
        raise NotImplementedError(
            f'{name} is one of the ops of mmcv that have no stand-in over torchvision; build mmcv with its ops: '
            f'pip uninstall -y mmcv-lite; {COMPILE}'
        )

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


def fill(namespace: dict) -> None:
    """Make a module's namespace that of ``mmcv._ext``.

    Raises:
        ImportError: If torchvision's ops do not load beside this torch.
    """
    if not hasattr(torch.ops.torchvision, 'nms'):
        raise ImportError(
            f'torchvision {torchvision.__version__} has no ops for torch {torch.__version__}; install the torchvision '
            'that belongs to this torch'
        )

    def get(name):  # mmcv asks for 116 names at import, and calls few of them
        if name.startswith('__'):
            raise AttributeError(f'module {NAME!r} has no attribute {name!r}')
        return namespace.setdefault(name, refusal(name))

    namespace.update(FUNCTIONS, __stand_in__=True, __getattr__=get)
