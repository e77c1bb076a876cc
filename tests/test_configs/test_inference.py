"""The codebases' own inference functions take our configs with a local checkpoint; test-time augmentation averages."""

import copy

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope

from mmvmamba.cli.launch import set_test_time_augmentation
from tests.fill import fill_module
from tests.test_configs.zoo import ROOT, build, load

CONFIGS = dict(
    mmpretrain='classification/vmamba-tiny-s1l8_8xb128_in1k',
    mmdet='detection/mask-rcnn_vmamba-t-s1l8_fpn_1x_coco',
    mmseg='segmentation/vmamba-tiny-s1l8-in1k-pre_upernet_4xb4-160k_ade20k-512x512',
)


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    """Path of a picture of 96x64 pixels."""
    path = tmp_path_factory.mktemp('image') / 'picture.png'
    rng = np.random.default_rng(0)
    picture = mmcv.imresize(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8), (96, 64))
    mmcv.imwrite(picture, str(path))
    return str(path)


@pytest.fixture
def trained(tmp_path):
    """Function (scope) -> a config file of the zoo at small size, its checkpoint, and the model."""

    def make(scope):
        cfg = load(ROOT / f'configs/{CONFIGS[scope]}.py')
        # mmseg's inference_model reads test_pipeline, the others the data loader's
        for step in [*cfg.test_dataloader.dataset.pipeline, *cfg.test_pipeline]:
            if step.type == 'Resize':
                step.scale = (96, 64)
        if scope == 'mmseg':  # narrower heads, for speed
            cfg.model.decode_head.channels = cfg.model.auxiliary_head.channels = 32
        cfg.dump(tmp_path / 'config.py')
        model = fill_module(build(copy.deepcopy(cfg))).eval()
        classes = tuple(f'class {i}' for i in range(1000))[: dict(mmpretrain=1000, mmdet=80, mmseg=150)[scope]]
        meta = dict(dataset_meta=dict(classes=classes, palette=[[i, i, i] for i in range(len(classes))]))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'weights.pth')
        return str(tmp_path / 'config.py'), str(tmp_path / 'weights.pth'), model

    return make


def assert_same_weights(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def test_mmpretrain(trained, image):
    from mmpretrain import ImageClassificationInferencer, get_model

    config, weights, expected = trained('mmpretrain')
    model = get_model(Config.fromfile(config), pretrained=weights, device='cpu')
    assert_same_weights(model, expected)
    (result,) = ImageClassificationInferencer(model)(image)
    assert result['pred_class'] == f'class {result["pred_label"]}' and 0 < result['pred_score'] <= 1


def test_mmdet(trained, image):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    config, weights, expected = trained('mmdet')
    model = init_detector(config, weights, device='cpu')
    assert_same_weights(model, expected)
    instances = inference_detector(model, image).pred_instances
    inferencer = DetInferencer(model=config, weights=weights, device='cpu', show_progress=False)
    (result,) = inferencer(image, no_save_vis=True)['predictions']
    assert len(instances) > 0 and instances.masks.shape[1:] == (64, 96)
    np.testing.assert_allclose(result['scores'], instances.scores.numpy(), rtol=1e-5)
    np.testing.assert_allclose(result['bboxes'], instances.bboxes.numpy(), rtol=1e-4, atol=1e-3)


def test_mmseg(trained, image):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    config, weights, expected = trained('mmseg')
    model = init_model(config, weights, device='cpu')
    assert_same_weights(model, expected)
    labels = inference_model(model, image).pred_sem_seg.data[0].numpy()
    inferencer = MMSegInferencer(model=config, weights=weights, device='cpu')
    result = inferencer(image, show=False)['predictions']
    assert labels.shape == (64, 96) and len(np.unique(labels)) > 1
    assert np.array_equal(result, labels)


# ---- test-time augmentation -----------------------------------------------------------------------------------------
@pytest.fixture
def demo():
    """The demo segmentor's config with filled weights, and its model."""
    (path,) = (ROOT / 'configs/demo').glob('vmamba-nano_upernet_*.py')
    cfg = Config.fromfile(path)
    model = fill_module(build(cfg)).eval()
    return cfg, model


def without_annotations(pipeline):
    """A pipeline for an image without labels."""
    pipeline = copy.deepcopy(pipeline)
    for step in pipeline:
        if step.type == 'TestTimeAug':
            step.transforms = [branch for branch in step.transforms if branch[0].type != 'LoadAnnotations']
    return Compose([step for step in pipeline if step.type != 'LoadAnnotations'])


def augmented(model, picture, ratio, flip):
    """Probabilities (classes, H, W) of a picture at a ratio, perhaps flipped: resize, predict, turn and resize back."""
    height, width = picture.shape[:2]
    x = mmcv.imrescale(picture, ratio)
    x = x[:, ::-1] if flip else x
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))
    preprocessor = model.data_preprocessor
    x = x[[2, 1, 0]].float() if preprocessor.channel_conversion else x.float()
    x = (x - preprocessor.mean) / preprocessor.std
    logits = model.encode_decode(x[None], [dict(img_shape=x.shape[1:])])
    logits = logits.flip(3) if flip else logits
    return torch.nn.functional.interpolate(logits, (height, width), mode='bilinear')[0].softmax(0)


@torch.no_grad()
def test_augmentation_averages(demo, image):
    cfg, model = demo
    init_default_scope('mmseg')
    from mmseg.registry import MODELS

    set_test_time_augmentation(cfg)
    cfg.model.module = model
    tta = MODELS.build(cfg.model)
    data = without_annotations(cfg.tta_pipeline)(dict(img_path=image))
    (result,) = tta.test_step(pseudo_collate([data]))

    picture = mmcv.imread(image)
    flips = [
        step.prob == 1 for branch in cfg.tta_pipeline[1].transforms for step in branch if step.type == 'RandomFlip'
    ]
    ratios = [step.scale_factor for step in cfg.tta_pipeline[1].transforms[0]]
    maps = [augmented(model, picture, ratio, flip) for ratio in ratios for flip in flips]
    assert len(maps) == len(data['inputs']) > 2
    probabilities = torch.stack(maps).mean(0)
    top = probabilities.topk(2, dim=0).values
    clear = (top[0] - top[1]) > 1e-4  # rounding may decide the rest
    assert clear.float().mean() > 0.95
    labels = result.pred_sem_seg.data.squeeze()
    assert torch.equal(labels[clear], probabilities.argmax(0)[clear]) and len(labels.unique()) > 1


@torch.no_grad()
def test_results_do_not_depend_on_the_batch(demo, tmp_path):
    cfg, model = demo
    init_default_scope('mmseg')
    pipeline = without_annotations(cfg.test_dataloader.dataset.pipeline)
    rng = np.random.default_rng(1)
    data = []
    for i in range(3):
        mmcv.imwrite(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), str(tmp_path / f'{i}.png'))
        data.append(pipeline(dict(img_path=str(tmp_path / f'{i}.png'))))
    together = model.test_step(pseudo_collate(copy.deepcopy(data)))
    for one, sample in zip(data, together):
        (alone,) = model.test_step(pseudo_collate([one]))
        torch.testing.assert_close(alone.seg_logits.data, sample.seg_logits.data, rtol=1e-4, atol=1e-4)
