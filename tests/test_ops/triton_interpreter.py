"""Running test files under Triton's interpreter, shared by the tests of Triton kernels on CPU."""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def run_interpreted(*files, slow=False):
    """Run test files, or the slow tests in them, in a process of its own: kernels read TRITON_INTERPRET at once."""
    mark = 'slow' if slow else 'not slow'
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', mark, *files]
    environment = {**os.environ, 'TRITON_INTERPRET': '1'}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and ' passed' in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]


def patch_interpreter():
    """Let a one-element array be an integer, dot read bfloat16, and prepare Triton's language once a module.

    Triton 3.6 uses int(), which numpy >= 2.4 refuses, and prepares it at each call of a function in a kernel: a sixth
    of the time.  Its dot multiplies the bits of bfloat16 as integers.
    """
    import numpy as np
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.data.dtype != np.uint16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def dot_in_float(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    interpreter.InterpreterBuilder.create_dot = dot_in_float

    patch_tensor, patch_language, prepared = interpreter._patch_lang_tensor, interpreter._patch_lang, set()

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: self.handle.data.item())

    def patch_once(function):
        module = function.__globals__['__name__']
        if module not in prepared:
            prepared.add(module)
            patch_language(function)
        return interpreter._LangPatchScope()  # of no changes, so that a kernel's end restores none

    interpreter._patch_lang_tensor, interpreter._patch_lang = patched, patch_once
