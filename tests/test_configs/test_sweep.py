"""Every config builds, trains an iteration and tests an iteration on synthetic data."""

import contextlib

import pytest
import torch

from tests.test_configs.zoo import (
    ablation_paths,
    arch_of,
    baseline_paths,
    build,
    build_optimizer,
    config_paths,
    load,
    synthetic_data,
)


def _cases():
    """The tiny archs in full precision are quick; the larger ones and mixed precision are slow."""
    for path in config_paths():
        quick = arch_of(path).startswith('tiny') and 'amp' not in path.name and '3x' not in path.name
        yield pytest.param(path, id=path.stem, marks=[] if quick else pytest.mark.slow)
    for path in baseline_paths():
        yield pytest.param(path, id=path.stem, marks=pytest.mark.slow)
    for path in ablation_paths():
        yield pytest.param(path, id=path.stem, marks=[] if 'posembed' in path.name else pytest.mark.slow)


def mix_precision(model, scope) -> contextlib.AbstractContextManager:
    """Autocast as in training; mmcv has no bfloat16 NMS on CPU, where a detector's heads stay in float32."""
    autocast = torch.autocast('cpu', torch.bfloat16)
    if scope != 'mmdet':
        return autocast
    extract = model.extract_feat

    def extract_mixed(inputs):
        with autocast:
            maps = extract(inputs)
        assert all(value.dtype == torch.bfloat16 for value in maps)
        return tuple(value.float() for value in maps)

    model.extract_feat = extract_mixed
    return contextlib.nullcontext()


@pytest.mark.parametrize('path', _cases())
def test_one_iteration(path):
    cfg = load(path, drop_path_rate=0.0)
    model = build(cfg).train()
    model.init_weights()
    optimizer = build_optimizer(model, cfg)
    mixed = cfg.optim_wrapper.get('dtype') == 'float16'
    autocast = mix_precision(model, cfg.default_scope) if mixed else contextlib.nullcontext()

    data = model.data_preprocessor(synthetic_data(cfg), training=True)
    with autocast:
        loss, _ = model.parse_losses(model(**data, mode='loss'))
    assert loss.isfinite() and loss > 0
    optimizer.backward(loss)
    for name, parameter in model.backbone.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    before = {name: parameter.detach().clone() for name, parameter in model.backbone.named_parameters()}
    optimizer.step()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name

    with torch.no_grad(), autocast:
        results = model.eval().test_step(synthetic_data(cfg))
    assert len(results) == 2
    if cfg.default_scope == 'mmpretrain':
        score = results[0].pred_score
        assert score.shape == (cfg.model.head.num_classes,)
        rounding = torch.finfo(score.dtype).eps / 2  # relative, of each score; 0.004 in bfloat16
        assert score.double().sum().sub(1).abs() < max(1e-5, rounding)
    elif cfg.default_scope == 'mmdet':
        instances = results[0].pred_instances
        assert instances.bboxes.shape[1] == 4 and instances.masks.shape[1:] == (64, 64)
        assert instances.bboxes.isfinite().all()
    else:
        assert results[0].pred_sem_seg.data.shape == (1, 64, 64)
        assert results[0].seg_logits.data.shape == (cfg.model.decode_head.num_classes, 64, 64)
        assert results[0].seg_logits.data.isfinite().all()
