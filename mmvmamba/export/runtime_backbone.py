"""RuntimeBackbone: an exported file in the place of a config's backbone."""

from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch._compile import _disable_dynamo

from mmvmamba.checkpoint import CheckpointError, Fitted, backbone_weights, select_weights
from mmvmamba.checkpoint.layouts import shorten
from mmvmamba.models import VSSMBackbone
from mmvmamba.registry import register_backbone

from .origin import MODEL, PART, WEIGHTS, WITH_NECK, missing_weights
from .runtimes import open_file

_NECK = 'neck.'
_OWN = ('file', 'threads', 'device', 'with_neck', 'check_weights', 'runtime')


@register_backbone
class RuntimeBackbone(BaseModule):
    """An exported backbone, or backbone and neck, as the backbone of a config, so that the file is what is evaluated.

    ONNX files run in onnxruntime or OpenVINO, programs of torch.export in torch.  The rest of the model is PyTorch's
    and takes its weights from the checkpoint, whose backbone is left out.  Where the file holds the neck too, the
    config's is to be None.

    Args:
        file (str | Path): The file. Its input are normalised images, its outputs maps.
        threads (int, optional): Threads of the ONNX runtime on the CPU, those of onnxruntime don't spin; None for a
            program. Default: as many as torch uses.
        device (str, optional): Where the file runs; images and maps are copied from and to another one. Default: where
            the images are.
        with_neck (bool, optional): Whether the file holds the neck too. Default: as the file says; one that says
            nothing does not.
        check_weights (bool): Whether to refuse a checkpoint whose backbone is not the one of the file. Files that our
            tools wrote know their weights. Default: True.
        runtime (str, optional): What runs an ONNX file: ``onnxruntime``, or ``openvino``, on the CPU and in float32.
            Default: onnxruntime.
        **config: Options of :class:`~mmvmamba.models.vssm.VSSMBackbone`, as they stand in a config. The number of maps
            and their channels must be the ones of that backbone. Default: none, and nothing is compared.

    Raises:
        TypeError: If an option is unknown or of a wrong type.
        ValueError: If a value is out of range.
        CheckpointError: If the file is missing, can't be read, does not give maps, or is of another arch.
        ImportError: If the file needs onnxruntime or OpenVINO, and that cannot be imported.
        FileNotFoundError: If the file needs the library of that runtime, which is not built; says what to do.

    Note:
        For evaluation only.  A copy and an unpickled one open the file again.

    Examples:
        >>> backbone = RuntimeBackbone('backbone.onnx', arch='nano').eval()  # of to_onnx.py --part backbone
        >>> [tuple(out.shape) for out in backbone(torch.rand(1, 3, 64, 64))]
        [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2)]
    """

    def __init__(
        self,
        file,
        threads: Optional[int] = None,
        device: Optional[str] = None,
        with_neck: Optional[bool] = None,
        check_weights: bool = True,
        runtime: Optional[str] = None,
        **config,
    ):
        super().__init__()
        if not isinstance(file, (str, Path)):
            raise TypeError(f'file is {file!r}, expected the path of an exported file')
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise TypeError(f'threads is {threads!r}, expected an integer')
        if threads is not None and threads < 1:
            raise ValueError(f'threads is {threads}, expected at least 1')
        for name, value in dict(with_neck=with_neck, check_weights=check_weights).items():
            if not isinstance(value, bool) and not (value is None and name == 'with_neck'):
                raise TypeError(f'{name} is {value!r}, expected a bool')
        self.file = Path(file).absolute()  # a copy may be opened in another folder
        self.threads, self.check_weights, self.runtime = threads, check_weights, runtime
        self.device = None if device is None else _device(device)
        self._opened: Any = None
        opened = self._opened = open_file(self.file, self.device, threads, runtime)
        self._origin: dict = opened.metadata
        self.with_neck = self._origin.get(PART) == WITH_NECK if with_neck is None else with_neck
        self._check_values(opened)
        if config:
            self._check_config(opened, _backbone_of(config))

    def forward(self, x: torch.Tensor) -> tuple:
        """Run the file.

        Args:
            x (Tensor): Normalised images, (B, C, H, W), float32; a file of half precision gets them rounded.

        Returns:
            tuple[Tensor]: The file's maps, (B, C, h, w) each, contiguous, float32, on the device of ``x``.

        Raises:
            RuntimeError: If the module is in training mode, a gradient is asked for, or the file fails on ``x``.
            TypeError: If ``x`` is no float32 tensor.
            ValueError: If ``x`` has a shape that the file does not take.
        """
        if self.training:
            raise RuntimeError(
                f'RuntimeBackbone runs {str(self.file)!r}, which cannot be trained; expected model.eval()'
            )
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            raise TypeError(f'x is {getattr(x, "dtype", type(x).__name__)}, expected images of torch.float32')
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f'x requires a gradient, which {str(self.file)!r} cannot give; expected torch.no_grad()')
        return self._run(x)

    @_disable_dynamo  # torch.compiler.disable, which imports the compiler only when it is called
    def _run(self, x: torch.Tensor) -> tuple:
        opened = self._open(self.device or x.device)
        taken = opened.inputs[0]
        fits = x.dim() == len(taken.shape) and all(want in (None, size) for want, size in zip(taken.shape, x.shape))
        if not fits:
            sizes = ', '.join('any' if size is None else str(size) for size in taken.shape)
            raise ValueError(f'x has shape {tuple(x.shape)}, expected ({sizes}), which {str(self.file)!r} takes')
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            try:
                maps = opened.run(x.to(opened.device, taken.dtype))
            except Exception as error:  # each runtime has errors of its own
                raise RuntimeError(f'{str(self.file)!r} fails on images of shape {tuple(x.shape)}: {error}') from error
            # mmcv's ops read memory as contiguous, whatever the strides say
            return tuple(value.to(x.device, torch.float32).contiguous() for value in maps)

    def _open(self, device: torch.device):
        if self._opened is None or self._opened.device != device:
            self._opened = None  # one device at a time, for its memory
            self._opened = open_file(self.file, device, self.threads, self.runtime)
        return self._opened

    def _check_values(self, opened) -> None:
        name, maps = str(self.file), [value for value in opened.outputs if len(value.shape) == 4]
        if len(opened.inputs) != 1 or len(opened.inputs[0].shape) != 4:
            found = '; '.join(f'{value.name} {value.shape}' for value in opened.inputs)
            raise CheckpointError(f'{name!r} takes {found}; expected one input, images (B, C, H, W)')
        for value in (*opened.inputs, *opened.outputs):
            if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise CheckpointError(f'{name!r} has {value.name} of {value.dtype}, expected float32 or half precision')
        scores = [value.name for value in opened.outputs] == ['scores'] or self._origin.get(PART) == MODEL
        if not maps or len(maps) < len(opened.outputs) or scores:
            shapes = '; '.join(f'{value.name} {value.shape}' for value in opened.outputs)
            raise CheckpointError(
                f'{name!r} gives {shapes}, expected maps (B, C, h, w), one a stage; --part backbone exports them'
            )

    def _check_config(self, opened, backbone: VSSMBackbone) -> None:
        taken = opened.inputs[0].shape[1]
        if taken not in (None, backbone.in_channels):
            raise CheckpointError(
                f'{str(self.file)!r} takes images of {taken} channels, expected {backbone.in_channels} by the config'
            )
        if self.with_neck:
            return
        channels = [value.shape[1] for value in opened.outputs]
        dims = backbone.num_features
        expected = [dims[0] // 2] * backbone.out_stem + [dims[i] for i in backbone.out_indices]
        if len(channels) != len(expected) or any(have not in (None, want) for have, want in zip(channels, expected)):
            raise CheckpointError(
                f'{str(self.file)!r} gives {len(channels)} maps of {channels} channels, expected {len(expected)} of '
                f'{expected}, those of the config with out_indices={backbone.out_indices}; a file that holds the neck '
                'too needs with_neck=True'
            )

    # ---- the weights of a checkpoint --------------------------------------------------------------------------------
    def fit_weights(self, content: dict, name: str, options: dict) -> Fitted:
        """The weights of a checkpoint that are not of the backbone, for a model whose head has other names.

        Args:
            content (dict): A file's content.
            name (str): What to call it in errors.
            options (dict): ``prefix``, where the backbone's names begin, or None.

        Raises:
            CheckpointError: If there are none, or the backbone is not the one of the file.
        """
        found, source = select_weights(content, name)
        prefix = options.get('prefix')
        if prefix is None:
            weights, others = backbone_weights(found, name)
        else:
            weights = {key: value for key, value in found.items() if key.startswith(prefix)}
            others = {key: value for key, value in found.items() if key not in weights}
        left_out = list(weights)
        if self.with_neck:
            left_out += [key for key in others if key.startswith(_NECK)]
        self._leave_out(weights, left_out)
        return Fitted({}, source, left_out, [], {key: others[key] for key in others if key not in left_out})

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        """Take no weights, but leave out those that the file holds: the backbone's, and those of its neck."""
        weights = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not weights:
            return
        left_out = dict(weights)
        if self.with_neck and prefix:
            place = prefix[:-1].rpartition('.')[0]
            place = f'{place}.{_NECK}' if place else _NECK
            of_neck = [key for key in unexpected if key.startswith(place)]
            if not of_neck:
                raise CheckpointError(
                    f'{str(self.file)!r} holds backbone and neck, but the model has a neck too, or the checkpoint '
                    'none; expected neck=None in the config, and a checkpoint of the model that was exported'
                )
            unexpected[:] = [key for key in unexpected if key not in of_neck]
            left_out.update(dict.fromkeys(of_neck))
        self._leave_out(weights, list(left_out))

    def _leave_out(self, weights: dict, names: list) -> None:
        """Compare a checkpoint's backbone with the one that was exported; a log line tells what is left out."""
        known = self._origin.get(WEIGHTS) if self.check_weights else None
        if known:
            missing, count = missing_weights(known, weights)
            if missing:
                raise CheckpointError(
                    f'{str(self.file)!r} was exported from other weights: {missing} of its {count} are not in the '
                    'backbone of the checkpoint; expected the checkpoint that was exported, or check_weights=False'
                )
        told = 'which was made of them' if known else 'whose weights are not compared with them'
        print_log(
            f'left out {len(names)} weights ({shorten(names, limit=1)}); {str(self.file)!r} runs instead, {told}',
            logger='current',
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_opened': None}

    def extra_repr(self) -> str:
        return f'file={str(self.file)!r}, with_neck={self.with_neck}'


def _device(name) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device is {name!r}, expected cpu or cuda: {str(error).splitlines()[0]}') from error
    if device.type not in ('cpu', 'cuda'):
        raise ValueError(f'device is {name!r}, expected cpu or cuda')
    return torch.device('cuda', device.index or 0) if device.type == 'cuda' else torch.device('cpu')


def _backbone_of(config: dict) -> VSSMBackbone:
    """The backbone of a config, without memory for its weights."""
    try:
        with torch.device('meta'):
            return VSSMBackbone(**{key: value for key, value in config.items() if key != 'init_cfg'})
    except TypeError as error:
        raise TypeError(
            f'RuntimeBackbone takes {", ".join(_OWN)} and options of VSSMBackbone: {error}; of another backbone, '
            '_delete_=True drops the options'
        ) from error
