"""The commands of the documentation, run as a reader runs them; tests/docs_commands.py says how each one is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs_commands import CLASSES, TABLE, Row
from tests.test_tools.conftest import load_tool

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
PROGRAMS = r'(?:make|python|pip|mim \w+|source|pre-commit|tools/\w+\.sh|[A-Z_]+=\S+ python) '
MINE = """
_base_ = 'configs/demo/mask-rcnn_vmamba-nano_fpn_1xb8-1e_digits.py'
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=12, val_interval=12)
param_scheduler = None
"""


def documented() -> dict:
    """Every command of the pages, in blocks and in the text, with the page that has it."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r'^ *```bash\n(.*?)^ *```', text, re.MULTILINE | re.DOTALL)
        lines = [line.split('  #')[0].split(' # ')[0].strip() for block in blocks for line in block.splitlines()]
        prose = re.sub(r'^ *```.*?^ *```', '', text, flags=re.MULTILINE | re.DOTALL)
        spans = [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', prose)]
        for line in [*filter(None, lines), *(span for span in spans if re.match(PROGRAMS, span))]:
            found.setdefault(line, page.name)
    return found


def test_every_command_has_a_row_and_every_row_a_command():
    assert {line: page for line, page in documented().items() if line not in TABLE} == {}
    assert set(TABLE) - set(documented()) == set()
    assert {row.how for row in TABLE.values()} == set(CLASSES)


class Reader:
    """Someone at the root of the repository, who runs a command once and remembers what it said."""

    def __init__(self, folder: Path):
        self.folder, self.said = folder, {}

    def run(self, line: str) -> str:
        """Run a command, after those whose results it needs."""
        if line not in self.said:
            row = TABLE[line]
            for earlier in row.after:
                self.run(earlier)
            command = f'{line.replace(*row.changed)} {row.more}'.strip()
            if line.startswith('make '):
                command += f' ENV_PYTHON={sys.executable}'
            folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
            result = subprocess.run(
                ['bash', '-c', command],
                cwd=self.folder,
                env={**os.environ, 'PATH': folders, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'},
                capture_output=True,
                text=True,
                timeout=1800,
            )
            said = result.stdout + result.stderr
            assert result.returncode == (2 if row.how == 'no_data' else 0), f'{command}\n{said[-4000:]}'
            self.said[line] = said
        return self.said[line]


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    """A reader in a folder with links to the repository, a small data set and a config of their own."""
    folder = tmp_path_factory.mktemp('reader')
    for path in ROOT.iterdir():
        if not re.match(r'(\.|data$|build$|work_dirs$|analysis$|demo_output|.*\.(onnx|pt2|pth)$)', path.name):
            (folder / path.name).symlink_to(path)
    data = ['--num-train', '16', '--num-val', '4', '--out-dir', str(folder / 'data/digits')]
    assert load_tool('dataset_converters/digits.py').main(data) == 0
    (folder / 'my_config.py').write_text(MINE)
    return Reader(folder)


RUN = [
    pytest.param(line, id=line, marks=[] if row.quick else [pytest.mark.slow])
    for line, row in TABLE.items()
    if row.how in ('whole', 'reduced', 'no_data')
]


@pytest.mark.parametrize('line', RUN)
def test_command_does_what_the_page_says(reader, line):
    row, said = TABLE[line], reader.run(line)
    assert row.says in said, said[-3000:]
    if row.makes:
        assert list(reader.folder.glob(row.makes)), said[-3000:]
    if row.how == 'no_data':
        assert [text for text in said.splitlines() if text.startswith('error: ')] == said.splitlines()[-1:]


NOT_HERE = [
    pytest.param(line, id=line) for line, row in TABLE.items() if row.how in ('installs', 'templates', 'checks')
]


@pytest.mark.parametrize('line', NOT_HERE)
def test_command_that_is_not_run_here_is_there(line):
    row = TABLE[line]
    assert (ROOT / (row.tests or '.')).exists() and row == Row(row.how, tests=row.tests)
    if line.startswith('make '):
        planned = subprocess.run(['make', '-n', *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
        assert ('tools/setup_env.py' in planned.stdout) == ('ENV_PYTHON' not in line)
