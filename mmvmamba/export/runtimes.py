"""Exported files, opened by the runtime that runs them: onnxruntime or OpenVINO for ONNX, torch for the others.

``RUNTIMES`` lists the kinds of files.  A kind is a class that tells its files (``opens``), opens one for a device, and
says what goes in, what comes out and what the file knows of itself.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from mmvmamba.checkpoint import CheckpointError

from .loading import Package
from .onnxruntime import onnxruntime_library

METADATA = 'mmvmamba.json'  # the file in a program that holds what is metadata in ONNX
_DOMAIN = 'mmvmamba'  # of the ops in ONNX files that need our library
_TYPES = {'tensor(float)': torch.float32, 'tensor(float16)': torch.float16, 'tensor(double)': torch.float64}


@dataclass(frozen=True)
class Value:
    """An input or output of a file.

    Attributes:
        name (str): Its name.
        shape (tuple[int | None, ...]): Its sizes; None is any.
        dtype (torch.dtype | str): Its type; a string for one that no image or map has.
    """

    name: str
    shape: tuple
    dtype: Any


class OnnxFile:
    """An ONNX file in onnxruntime, on the CPU or a CUDA device.

    Args:
        path (Path): The file.
        device (torch.device, optional): Where it runs. Default: on the CPU.
        threads (int, optional): Threads of one operator on the CPU. Default: as many as torch uses.

    Attributes:
        device (torch.device): Where it runs.
        inputs (tuple[Value, ...]): What goes in.
        outputs (tuple[Value, ...]): What comes out.
        metadata (dict[str, str]): What the file says of itself.

    Raises:
        ImportError: If onnxruntime can't be imported.
        CheckpointError: If onnxruntime cannot read the file.
        RuntimeError: If onnxruntime has no CUDA provider, or it does not start.
    """

    def __init__(self, path: Path, device: Optional[torch.device] = None, threads: Optional[int] = None):
        self.device = device or torch.device('cpu')
        self._session = _open_session(path, self.device, threads or torch.get_num_threads())
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs, self.outputs = (tuple(map(_onnx_value, values)) for values in (inputs, outputs))
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)

    @staticmethod
    def opens(path: Path) -> bool:
        """Whether a file is one of these: whatever is no archive."""
        return not zipfile.is_zipfile(path)

    def run(self, x: torch.Tensor) -> tuple:
        """Run it on images of the file's type on its device; returns a tuple of tensors there."""
        x = x.contiguous()
        if self.device.type == 'cpu':
            return tuple(map(torch.from_numpy, self._session.run(None, {self.inputs[0].name: x.numpy()})))
        torch.cuda.current_stream(x.device).synchronize()  # onnxruntime has a stream of its own
        return self.run_bound(x)

    def run_bound(self, x: torch.Tensor) -> tuple:
        """The same, with images and maps that stay where they are on the device."""
        index = self.device.index or 0
        binding, kind = self._session.io_binding(), np.float16 if x.dtype == torch.float16 else np.float32
        binding.bind_input(self.inputs[0].name, self.device.type, index, kind, tuple(x.shape), x.data_ptr())
        for output in self.outputs:
            binding.bind_output(output.name, self.device.type, index)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return tuple(torch.from_dlpack(value._ortvalue) for value in binding.get_outputs())


class ProgramFile:
    """A program of torch.export; it runs on the device that it was exported on, by torch's threads.

    Arguments, attributes and errors are those of :class:`OnnxFile`, but for ``threads``, which must be None, and
    ``device``, whose default is the program's, and another one a RuntimeError.
    """

    def __init__(self, path: Path, device: Optional[torch.device] = None, threads: Optional[int] = None):
        if threads is not None:
            raise ValueError(f"threads is {threads}, expected None: {str(path)!r} runs by torch's own threads")
        with zipfile.ZipFile(path) as archive:
            texts = {METADATA: ''} if any(name.endswith(METADATA) for name in archive.namelist()) else {}
        try:
            program = torch.export.load(path, extra_files=texts)
        except Exception as error:  # each version of torch raises its own
            raise CheckpointError(f'{str(path)!r} cannot be read by torch.export: {_first_line(error)}') from error
        found = next((value.device for value in program.state_dict.values()), torch.device('cpu'))
        if device is not None and device != found:
            raise RuntimeError(
                f'{str(path)!r} runs on {found}, where it was exported, but the images are on {device}; expected one '
                f'exported with --device {device}'
            )
        self.device = found
        nodes, wanted = program.graph.nodes, program.graph_signature.user_inputs
        self.inputs = tuple(_node_value(node) for node in nodes if node.op == 'placeholder' and node.name in wanted)
        last = next(node for node in nodes if node.op == 'output')
        of_user = set(program.graph_signature.user_outputs)
        self.outputs = tuple(_node_value(node) for node in last.args[0] if getattr(node, 'name', None) in of_user)
        self.metadata = json.loads(texts.get(METADATA) or '{}')
        self._call = program.module()

    @staticmethod
    def opens(path: Path) -> bool:
        """Whether a file is one of these: an archive that holds no compiled library."""
        return zipfile.is_zipfile(path) and not _is_package(path)

    def run(self, x: torch.Tensor) -> tuple:
        """Run it on images of the file's type on its device; returns a tuple of tensors there."""
        maps = self._call(x)
        return (maps,) if isinstance(maps, torch.Tensor) else tuple(maps)


class PackageFile:
    """A package of AOTInductor, by :class:`mmvmamba.export.Package`; arguments as in :class:`ProgramFile`.

    A package does not say what comes out: it runs once, on images of its smallest size.
    """

    def __init__(self, path: Path, device: Optional[torch.device] = None, threads: Optional[int] = None):
        if threads is not None:
            raise ValueError(f"threads is {threads}, expected None: {str(path)!r} runs by torch's own threads")
        index = -1 if device is None or device.index is None else device.index
        try:
            self._call = Package(path, index)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        own = self._call.device
        self.device = torch.device('cuda', max(index, own.index or 0)) if own.type == 'cuda' else own
        if device is not None and device != self.device:
            raise RuntimeError(
                f'{str(path)!r} was compiled for {self.device}, but the images are on {device}; expected one for '
                f'{device}'
            )
        self.metadata, sizes = self._call.metadata, tuple(self._call.sizes.values())
        fixed = tuple(least if least == most else None for least, most in sizes)
        self.inputs = (Value('images', fixed, self._call.dtype),)
        maps = self.run(torch.zeros([least for least, _ in sizes], dtype=self._call.dtype, device=self.device))
        self.outputs = tuple(
            Value(f'map{i}', (None, value.shape[1], *[None] * (value.dim() - 2)), value.dtype)
            for i, value in enumerate(maps)
        )

    @staticmethod
    def opens(path: Path) -> bool:
        """Whether a file is one of these: an archive with a compiled library."""
        return zipfile.is_zipfile(path) and _is_package(path)

    def run(self, x: torch.Tensor) -> tuple:
        """Run it on images of the file's type on its device; returns a tuple of tensors there."""
        maps = self._call(x)
        return (maps,) if isinstance(maps, torch.Tensor) else tuple(maps)


RUNTIMES: tuple = (OnnxFile, ProgramFile, PackageFile)
OF_ONNX = ('onnxruntime', 'openvino')


def open_file(
    path: Path, device: Optional[torch.device] = None, threads: Optional[int] = None, runtime: Optional[str] = None
):
    """Open an exported file by the first of ``RUNTIMES`` that knows it; arguments and errors as in :class:`OnnxFile`.

    Args:
        runtime (str, optional): ``openvino``, or ``onnxruntime``, for an ONNX file. Default: onnxruntime.

    Raises:
        CheckpointError: If there is no such file, or its runtime cannot read it.
        ValueError: If ``runtime`` does not run such a file.
    """
    if not path.is_file():
        found = 'is a folder' if path.is_dir() else 'does not exist'
        raise CheckpointError(f'file is {str(path)!r}, which {found}; expected the path of an exported file')
    kind = next(kind for kind in RUNTIMES if kind.opens(path))
    if runtime is not None and (runtime not in OF_ONNX or kind is not OnnxFile):
        expected = f'one of {", ".join(OF_ONNX)}' if kind is OnnxFile else f'None: {str(path)!r} runs in torch'
        raise ValueError(f'runtime is {runtime!r}, expected {expected}')
    if runtime == 'openvino':
        from .openvino.file import OpenVinoFile  # which needs this module

        kind = OpenVinoFile
    return kind(path, device, threads)


def _open_session(path: Path, device: torch.device, threads: int):
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f'{str(path)!r} runs in onnxruntime, which cannot be imported; pip install it') from error
    provider, settings = 'CPUExecutionProvider', dict[str, Any]()
    if device.type == 'cuda':
        provider = 'CUDAExecutionProvider'
        tf32 = torch.backends.cuda.matmul.allow_tf32
        settings = dict(device_id=device.index or 0, use_tf32=int(tf32))
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise RuntimeError(
            f'the images are on {device}, but onnxruntime {onnxruntime.__version__} has only {", ".join(available)}; '
            f"expected {provider}, which pip install onnxruntime-gpu brings, or device='cpu'"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # threads that wait by spinning would take the cores from torch, which computes the rest of the model
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    providers = [(provider, settings)]

    def start():
        return onnxruntime.InferenceSession(str(path), options, providers=providers)

    try:
        try:
            session = start()
        except Exception as error:
            if f'{_DOMAIN}:' not in str(error):
                raise
            options.register_custom_ops_library(str(onnxruntime_library()))
            session = start()
    except FileNotFoundError:  # of the library
        raise
    except Exception as error:  # a class of onnxruntime's for each of its statuses
        raise CheckpointError(f'{str(path)!r} cannot be read by onnxruntime: {_first_line(error)}') from error
    if session.get_providers()[0] != provider:  # onnxruntime goes on with another one
        raise RuntimeError(f'onnxruntime {onnxruntime.__version__} could not start {provider} for images on {device}')
    return session


def _is_package(path: Path) -> bool:
    """Whether an archive is a package of AOTInductor, whose files end in .pt2 as well."""
    with zipfile.ZipFile(path) as archive:
        return any('data/aotinductor/' in name for name in archive.namelist())


def _onnx_value(value) -> Value:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Value(value.name, shape, _TYPES.get(value.type, value.type))


def _node_value(node) -> Value:
    value = node.meta['val']
    return Value(node.name, tuple(size if type(size) is int else None for size in value.shape), value.dtype)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
