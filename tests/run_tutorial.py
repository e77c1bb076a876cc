"""Run docs/tutorial.ipynb in the current folder, which holds what `make demo` made, and keep what its cells show.

python tools/docs/run_tutorial.py
"""

import base64
import contextlib
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import matplotlib

NOTEBOOK = Path(__file__).resolve().parents[1] / 'docs/tutorial.ipynb'


def execute(notebook: dict) -> dict:
    """Run the cells of a notebook one after the other, and put text and pictures into their outputs.

    Args:
        notebook (dict): The notebook, which is changed.

    Returns:
        dict: The names that the cells defined.
    """
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    namespace: dict = {}
    shown: list = []

    def show():
        picture = io.BytesIO()
        plt.gcf().savefig(picture, format='png', dpi=72, metadata=dict(Software=None))
        plt.close()
        data = {'image/png': base64.b64encode(picture.getvalue()).decode()}
        shown.append(dict(output_type='display_data', data=data, metadata={}))

    original, plt.show = plt.show, show
    try:
        for count, cell in enumerate((c for c in notebook['cells'] if c['cell_type'] == 'code'), 1):
            shown.clear()
            said = io.StringIO()
            with contextlib.redirect_stdout(said), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                exec(compile(''.join(cell['source']), f'cell {count}', 'exec'), namespace)
            lines = [
                line for line in said.getvalue().splitlines(keepends=True) if not line.startswith('Loads checkpoint')
            ]
            text = [dict(output_type='stream', name='stdout', text=lines)] if lines else []
            cell.update(execution_count=count, outputs=[*text, *shown])
    finally:
        plt.show = original
    return namespace


def main() -> int:
    """Run the notebook and write it; returns the exit code."""
    logging.disable(logging.WARNING)
    notebook = json.loads(NOTEBOOK.read_text())
    execute(notebook)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
