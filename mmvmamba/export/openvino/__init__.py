"""The library that computes the scan inside OpenVINO; ``python -m mmvmamba.export.openvino`` builds it."""

from pathlib import Path

from .build import FOLDER, PREFIX, build_library, file_name, find_openvino

__all__ = ['BUILD', 'build_library', 'openvino_library']

BUILD = 'python -m mmvmamba.export.openvino'


def openvino_library() -> Path:
    """The library with the operator ``mmvmamba::SS2DScan``, which a file of ``to_onnx(..., scan='custom-op')`` needs.

    It runs on a CPU, and fits the release of OpenVINO that it was built with.

    Returns:
        Path: The file, for ``openvino.Core().add_extension(str(path))``.

    Raises:
        ImportError: If OpenVINO cannot be imported; says how to get it.
        FileNotFoundError: If the library is not built, or for another release only; says what to do.
    """
    path = FOLDER / file_name()
    if path.is_file():
        return path
    release = find_openvino().release
    others = [file.name[len(PREFIX) :].partition('-')[0] for file in sorted(FOLDER.glob(f'{PREFIX}*.so'))]
    if release in others:
        reason = f'is there for OpenVINO {release}, but of other sources or another build of it'
    elif others:
        reason = f'is built for OpenVINO {" and ".join(others)}, and {release} is installed'
    else:
        reason = 'is not built'
    raise FileNotFoundError(f"mmvmamba's library for OpenVINO {reason}; build it with a C++ compiler: {BUILD}")
