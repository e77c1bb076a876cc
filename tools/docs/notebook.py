"""Hook of mkdocs: renders docs/*.ipynb as pages, and the links and roles of docstrings as HTML."""

import html
import json
import re
from pathlib import Path

from mkdocs.structure.files import File


def cell_markdown(cell: dict) -> str:
    """A cell of a notebook, with its outputs, as Markdown."""
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        return source
    parts = [f'```python\n{source}\n```']
    for output in cell.get('outputs', ()):
        data = output.get('data', {})
        if 'image/png' in data:
            image = ''.join(data['image/png']).replace('\n', '')
            parts.append(f'<img alt="what the cell draws" src="data:image/png;base64,{image}">')
        else:
            text = ''.join(output.get('text') or data.get('text/plain', ''))
            parts.append(f'<div class="output"><pre>{html.escape(text.rstrip())}</pre></div>')
    return '\n\n'.join(parts)


def on_files(files, config):
    """Give mkdocs a Markdown page for each notebook."""
    for path in sorted(Path(config.docs_dir).glob('*.ipynb')):
        old = files.get_file_from_path(path.name)
        if old is not None:
            files.remove(old)
        cells = json.loads(path.read_text())['cells']
        content = '\n\n'.join(cell_markdown(cell) for cell in cells) + '\n'
        files.append(File.generated(config, f'{path.stem}.md', content=content))
    return files


def _allow_breaks(cell):
    """Let the names in a cell of a table break after / and _, and nowhere else."""
    return re.sub(r'<code>[^<]*</code>', lambda code: re.sub(r'(?<!<)([/_])(?=\w)', r'\1<wbr>', code[0]), cell[0])


def on_page_content(content, page, config, files):
    """Names in tables break where a reader expects it; roles and links of docstrings become HTML."""
    content = re.sub(r'<td.*?</td>', _allow_breaks, content, flags=re.DOTALL)
    content = re.sub(r'(?<=:<code>)~[\w.]*\.(?=\w+</code>)', '', content)  # the last part alone
    content = re.sub(r':(?:func|class|data|mod|meth):(?=<code>)', '', content)
    return re.sub(r'<code>([^<]*?) &lt;(https://[^<]*?)&gt;</code>_', r'<a href="\2">\1</a>', content)
