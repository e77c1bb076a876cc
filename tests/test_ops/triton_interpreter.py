"""Running test files under Triton's interpreter, shared by the tests of Triton kernels on CPU."""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def run_interpreted(file):
    """Run a test file in a process of its own: TRITON_INTERPRET is read when a kernel is defined."""
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', file]
    environment = {**os.environ, 'TRITON_INTERPRET': '1'}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and ' passed' in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]


def patch_loop_bounds():
    """Triton 3.6 turns a one-element array into an integer, which numpy >= 2.4 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
