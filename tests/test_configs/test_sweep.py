"""Every config builds, trains an iteration and tests an iteration on synthetic data."""

import contextlib

import pytest
import torch

from tests.test_configs.zoo import arch_of, build, build_optimizer, config_paths, load, synthetic_data


def _cases():
    """The tiny archs in full precision are quick; the larger ones and mixed precision are slow."""
    for path in config_paths():
        quick = arch_of(path).startswith('tiny') and 'amp' not in path.name and '3x' not in path.name
        yield pytest.param(path, id=path.stem, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize('path', _cases())
def test_one_iteration(path):
    cfg = load(path, drop_path_rate=0.0)
    model = build(cfg).train()
    model.init_weights()
    optimizer = build_optimizer(model, cfg)
    mixed = cfg.optim_wrapper.get('type') == 'AmpOptimWrapper'
    autocast = torch.autocast('cpu', torch.bfloat16) if mixed else contextlib.nullcontext()

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
        assert results[0].pred_score.shape == (cfg.model.head.num_classes,)
        assert results[0].pred_score.sum().sub(1).abs() < 1e-3
    elif cfg.default_scope == 'mmdet':
        instances = results[0].pred_instances
        assert instances.bboxes.shape[1] == 4 and instances.masks.shape[1:] == (64, 64)
        assert instances.bboxes.isfinite().all()
    else:
        assert results[0].pred_sem_seg.data.shape == (1, 64, 64)
        assert results[0].seg_logits.data.shape == (cfg.model.decode_head.num_classes, 64, 64)
        assert results[0].seg_logits.data.isfinite().all()
