"""The library that computes the scan inside onnxruntime; setup.py builds it from ``csrc/`` and ``ops/csrc``."""

from pathlib import Path

from mmvmamba.ops.extension import REBUILD, build_info

NAME = 'mmvmamba_onnxruntime.so'


def onnxruntime_library() -> Path:
    """The library with the operator ``mmvmamba::SS2DScan``, which a file of ``to_onnx(..., scan='custom-op')`` needs.

    It takes onnxruntime 1.17 or newer on a CPU, and links neither to it nor to torch.

    Returns:
        Path: The file, for ``SessionOptions.register_custom_ops_library(str(path))``.

    Raises:
        FileNotFoundError: If the package was installed without a C++ compiler; says why and what to do.
    """
    path = Path(__file__).parent / NAME
    if not path.is_file():
        reason = build_info().get('onnxruntime') or 'the package was built before it had this library'
        raise FileNotFoundError(f'{path} is not built: {reason}; rebuild it with a C++ compiler: {REBUILD}')
    return path
