"""An ONNX file in OpenVINO, with the interface of the other kinds of files in :mod:`mmvmamba.export.runtimes`."""

import functools
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from mmvmamba.checkpoint import CheckpointError

from ..runtimes import Value
from . import openvino_library
from .build import import_openvino

_NO_RULE = 'mmvmamba.SS2DScan'  # OpenVINO names an operator that it does not know


class OpenVinoFile:
    """An ONNX file in OpenVINO on the CPU, in float32.

    Arguments and attributes are those of :class:`mmvmamba.export.runtimes.OnnxFile`.

    Raises:
        ImportError: If OpenVINO can't be imported.
        FileNotFoundError: If the file needs our library, and that is not built for the installed OpenVINO.
        CheckpointError: If OpenVINO cannot read the file.
        RuntimeError: If ``device`` is not the CPU.
    """

    def __init__(self, path: Path, device: Optional[torch.device] = None, threads: Optional[int] = None):
        self.device = device or torch.device('cpu')
        if self.device.type != 'cpu':
            raise RuntimeError(f"the images are on {self.device}, and OpenVINO runs on the CPU; expected device='cpu'")
        core = shared_core()
        model = _read(core, path)
        options = dict(PERFORMANCE_HINT='LATENCY', INFERENCE_PRECISION_HINT='f32')
        options['INFERENCE_NUM_THREADS'] = str(threads or torch.get_num_threads())
        try:
            self._model = core.compile_model(model, 'CPU', options)
        except RuntimeError as error:
            raise _unreadable(path, error) from error
        self.inputs, self.outputs = (tuple(map(_value, ports)) for ports in (model.inputs, model.outputs))
        info = model.get_rt_info()
        texts = info['framework'] if 'framework' in info else {}  # noqa: SIM401  (a map without get)
        self.metadata = {key: str(text.value) for key, text in texts.items()}

    def run(self, x: torch.Tensor) -> tuple:
        """Run it on images of the file's type on the CPU; returns a tuple of tensors there."""
        return tuple(torch.from_numpy(value) for value in self._model([x.contiguous().numpy()]).values())


def shared_core() -> Any:
    """The process's one ``openvino.Core``, which stays until the process ends.

    On a CPU with AMX each core gives its thread a stack for signal handlers, and on leaving puts back the one that it
    found. Of two cores that leave in the order in which they came, the second puts back the freed stack of the first:
    the next signal, such as the end of a data loader's worker, kills the process (seen with OpenVINO 2026.4.1).

    Raises:
        ImportError: If OpenVINO can't be imported.
    """
    return _core(import_openvino())


@functools.cache
def _core(openvino: Any) -> Any:
    return openvino.Core()


def _read(core: Any, path: Path) -> Any:
    try:
        try:
            return core.read_model(path)
        except RuntimeError as error:
            if _NO_RULE not in str(error):
                raise
        core.add_extension(str(openvino_library()))
        return core.read_model(path)
    except RuntimeError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f'{str(path)!r} cannot be read by OpenVINO: {" ".join(str(error).split())[:400]}')


def _value(port: Any) -> Value:
    shape = tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
    try:
        dtype: Any = torch.from_numpy(np.empty(0, port.element_type.to_dtype())).dtype
    except (TypeError, RuntimeError):  # a type that numpy or torch lacks
        dtype = port.element_type.to_string()
    return Value(port.any_name, shape, dtype)
