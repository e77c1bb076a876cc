"""tools/soak.py finds what it looks for, and a short soak finds nothing."""

import json
import subprocess
import sys

import pytest
import torch

from tests.test_tools.conftest import ROOT, load_tool


def test_soak_finds_a_leak_and_a_changed_answer(monkeypatch, capsys, tmp_path):
    soak, held = load_tool('soak.py'), []

    class Leaking:
        def turn(self, chance):
            held.append(b'1' * 2**20)

        def answer(self):
            return torch.tensor(len(held) > 150)

    monkeypatch.setattr(soak, 'make_subjects', lambda device: dict(leaking=Leaking()))
    assert soak.main(['--minutes', '0.000001', '--report', str(tmp_path / 'soak.json')]) == 1
    report, text = json.loads((tmp_path / 'soak.json').read_text()), capsys.readouterr().err
    assert (report['iterations'], report['warm_up_turns'], report['errors']) == (200, 100, 5)
    assert 'turn 160, leaking: ArithmeticError: leaking gives another answer' in text
    assert 'memory grew' in text and 90 < report['end']['resident'] - report['after_warm_up']['resident'] < 150


@pytest.mark.slow
def test_short_soak(tmp_path):
    report = tmp_path / 'soak.json'
    command = [sys.executable, str(ROOT / 'tools/soak.py'), '--minutes', '1.5', '--report', str(report)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    content = json.loads(report.read_text())
    assert content['errors'] == 0 and len(content['turns']) == 7 and min(content['turns'].values()) > 5
    # memory was read after the warm-up, and long before the end
    assert 100 <= content['warm_up_turns'] <= content['iterations'] - 50
    assert content['after_warm_up']['resident'] > 0
