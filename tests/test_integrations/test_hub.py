"""Saving and loading by huggingface_hub's mixin, in a local folder."""

import json

import pytest
import torch

from mmvmamba.integrations.hub import HubBackbone


@pytest.mark.parametrize('arch', ['nano', dict(dims=8, depths=(1, 1), scan_mode='bidi')])
def test_a_folder_holds_the_model(arch, tmp_path, filled):
    model = filled(HubBackbone(arch, out_indices=(1,), in_channels=4)).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / 'model.safetensors').is_file()
    assert json.loads((tmp_path / 'config.json').read_text())['in_channels'] == 4
    loaded = HubBackbone.from_pretrained(tmp_path).eval()
    assert loaded.arch == model.arch and loaded.out_indices == (1,)
    x = torch.rand(1, 4, 64, 64)
    assert torch.equal(loaded(x)[0], model(x)[0])
