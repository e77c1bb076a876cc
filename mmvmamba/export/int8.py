"""Linear layers in int8, weights and activations, for inference in PyTorch."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import nn
from torch._compile import _disable_dynamo

from mmvmamba.models import VSSMBackbone
from mmvmamba.registry import register_hook

_ENGINE = 'onednn'  # of torch's int8 kernels on the CPU, the one that needs no spare bit


class Int8Linear(nn.Module):
    """A linear layer whose products are of int8 numbers, summed in int32, on the CPU.

    Weights have a scale for each output channel.  Activations get theirs when they come, one for each image, so that
    what a model says of an image does not depend on the rest of its batch.

    Args:
        layer (nn.Linear): The layer, in float32 on the CPU. It is not changed.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer('weight', torch.round(weight / scale[:, None]).to(torch.int8))
        self.register_buffer('scale', scale)
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach().clone())
        self._packed: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) to (..., C_out); where there are three dimensions or more, the first one is that of images.

        Raises:
            RuntimeError: If a gradient is asked for.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError('x requires a gradient, which int8 layers cannot give; expected torch.no_grad()')
        return self._product(x)

    @_disable_dynamo  # torch.compiler.disable, which imports the compiler only when it is called
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            self._packed = self._pack()
        images = x.float().split(1) if x.dim() > 2 and len(x) > 1 else (x.float(),)
        outs = [torch.ops.quantized.linear_dynamic(image, self._packed, False) for image in images]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).to(x.dtype)

    def _pack(self):
        """The weights as torch's kernel keeps them."""
        quantized: Any = torch.backends.quantized
        before, zeros = quantized.engine, torch.zeros(self.out_features, dtype=torch.int64)
        quantized.engine = _ENGINE
        try:
            weight = torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(weight, self.bias)
        finally:
            quantized.engine = before

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_packed': None}

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}'


def to_int8(module: nn.Module) -> nn.Module:
    """Put int8 in the place of a module's linear layers: weights, and activations as they come; for inference.

    On the CPU torch's own int8 kernels compute them (:class:`Int8Linear`), on CUDA those of torchao, where
    ``torch.compile`` makes them fast.  Convolutions, norms and the scan stay as they are.

    Args:
        module (nn.Module): Such as a :class:`~mmvmamba.models.vssm.VSSMBackbone`, in float32 and eval mode. It is
            changed.

    Returns:
        nn.Module: The same module.

    Raises:
        TypeError: If ``module`` is no module.
        ValueError: If it trains, has no linear layer of torch's own class, or one that is not in float32.
        ImportError: If it is on CUDA, and torchao cannot be imported.
        RuntimeError: If this torch has no int8 kernels for the processor.

    Examples:
        >>> backbone = to_int8(VSSMBackbone('nano').eval())
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f'module is a {type(module).__name__}, expected a torch.nn.Module')
    if module.training:
        raise ValueError('module is in training mode, expected module.eval()')
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()  # one layer may stand in several places
        if type(child) is nn.Linear
    ]
    if not places:
        raise ValueError(f'module is a {type(module).__name__} without a torch.nn.Linear inside, expected some')
    for _, name, layer in places:
        if layer.weight.dtype != torch.float32 or type(layer.weight) is not nn.Parameter:
            kind = f'{type(layer.weight).__name__} of {layer.weight.dtype}'
            raise ValueError(f'{name} of module has as weight a {kind}, expected a Parameter of torch.float32')
    devices = {layer.weight.device.type for _, _, layer in places}
    if devices == {'cuda'}:
        return _by_torchao(module)
    if devices != {'cpu'}:
        raise ValueError(f'module has linear layers on {" and ".join(sorted(devices))}, expected cpu or cuda')
    engines = torch.backends.quantized.supported_engines
    if _ENGINE not in engines:
        raise RuntimeError(f'torch {torch.__version__} has the int8 engines {", ".join(engines)}, expected {_ENGINE}')
    made: dict = {}
    for parent, name, layer in places:
        setattr(parent, name, made.setdefault(id(layer), Int8Linear(layer)))
    return module


def _by_torchao(module: nn.Module) -> nn.Module:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ImportError('int8 on CUDA needs torchao, which cannot be imported: pip install torchao') from error
    quantize_(module, Int8DynamicActivationInt8WeightConfig(), lambda child, _: type(child) is nn.Linear)
    return module


@register_hook
class Int8Hook(Hook):
    """Evaluates a model whose VMamba is in int8, see :func:`to_int8`; the rest of the model stays as it is."""

    def before_test(self, runner) -> None:
        """Once the weights are loaded."""
        backbones = [module for module in runner.model.modules() if isinstance(module, VSSMBackbone)]
        if not backbones:
            raise ValueError(f'Int8Hook found no VSSMBackbone in the {type(runner.model).__name__}, expected one')
        for backbone in backbones:
            if any(type(module) is nn.Linear for module in backbone.modules()):  # else it is in int8 already
                to_int8(backbone.eval())
        print_log('the linear layers of the backbone are in int8', logger='current')
