"""How each command of README.md, CONTRIBUTING.md and docs/ is run by tests/test_docs_commands.py.

Commands run in a folder like the root of the repository with a small data set, in the order that ``after`` gives. The
table is whole: a command that a page gains or loses fails a test.
"""

from dataclasses import dataclass
from typing import Optional

DIGITS = 'configs/demo/vmamba-nano_1xb64_digits-32px.py'
SWIN = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
FEW_IMAGES = (
    '--cfg-options train_dataloader.dataset.indices=16 train_dataloader.batch_size=8 train_dataloader.num_workers=0 '
    'train_dataloader.persistent_workers=False val_dataloader.num_workers=0 val_dataloader.persistent_workers=False '
    'test_dataloader.num_workers=0 test_dataloader.persistent_workers=False'
)
ONE_EPOCH = f'{FEW_IMAGES} train_cfg.max_epochs=1 train_cfg.val_interval=1 param_scheduler=None'
CPU_SIZE = (
    '--precisions fp32 --batch-size 1 --sizes 224 --mixed-sizes 224 256 --warmup 0 --steps 1 --device cpu --force '
    '--out-dir figures'
)
# every class of command, from most to least of what is run
CLASSES = dict(
    whole='as it is written',
    reduced='as written, with fewer images, steps or processes, or without what only a GPU has',
    no_data='as written, up to the line that says that the data set is not there (each config trains in test_configs)',
    installs='not here: it changes an environment or needs a network; the tests that are named run what it does',
    templates='not here: CONFIG and the like stand for yours; the tests that are named run it',
    checks='not here: it is what runs this test, or checks the style',
)


@dataclass(frozen=True)
class Row:
    """One command.

    Attributes:
        how (str): A key of ``CLASSES``.
        more (str): What is added to the line.
        changed (tuple[str, str]): Words of the line and what stands in their place.
        after (tuple[str, ...]): Lines whose results it needs.
        makes (str, optional): A file or folder that is there afterwards.
        says (str): Words of what it prints.
        quick (bool): Whether ``make test`` runs it too.
        tests (str, optional): For ``installs``: the tests of what it does, where there are any.
    """

    how: str
    more: str = ''
    changed: tuple = ('', '')
    after: tuple = ()
    makes: Optional[str] = None
    says: str = ''
    quick: bool = False
    tests: Optional[str] = None


def _no_data(root: str) -> Row:
    return Row('no_data', says=f'error: data_root {root!r}')


TRAIN = f'python tools/train.py {DIGITS} --work-dir work_dirs/digits'
TO_OFFICIAL = 'python tools/model_converters/mm2vmamba.py work_dirs/digits/epoch_20.pth official.pth'
TRAIN_MINE = 'mim train mmdet my_config.py'
CONFIGS = 'python tools/train.py configs'
MODEL = ('CONFIG CHECKPOINT', f'{DIGITS} work_dirs/digits/epoch_20.pth')
IMAGE = 'data/digits/scenes/val/00000.png'
PROBE = (
    'python tools/analysis/linear_probe.py CONFIG CHECKPOINT --data data/digits/classification --size 32 --crop-ratio 1'
)
ONE = '--model VMamba-T configs/classification/vmamba-tiny-s1l8_8xb128_in1k.py'
THREE = (
    f'{ONE} --model Swin-T mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py '
    '--model ConvNeXt-T mmpretrain::convnext/convnext-tiny_32xb128_in1k.py'
)
MINE = ('CHECKPOINT', 'work_dirs/my_config/epoch_12.pth')

TO_PACKAGE = f'python tools/export/to_package.py {DIGITS} none --out package.pt2 --freezing'
CMAKE = "cmake -S docs/cpp -B build/cpp -DTORCH=$(python -c 'import torch; print(torch.__path__[0])')"
IMAGES_FILE = 'python -c \'import torch; torch.rand(1, 3, 224, 224).numpy().tofile("images.bin")\''

RUNTIME = 'tests/test_tools/test_runtime_backbone.py'
LAUNCHES, ANALYSES = 'tests/test_tools/test_train_test.py', 'tests/test_tools/test_analysis.py'
TEMPLATES = {
    'python tools/train.py CONFIG': LAUNCHES,
    'python tools/train.py CONFIG --resume': LAUNCHES,
    'python tools/test.py CONFIG CHECKPOINT --complexity': LAUNCHES,
    'python tools/export/to_onnx.py CONFIG CHECKPOINT --part backbone --out backbone.onnx': RUNTIME,
    'python tools/test.py CONFIG CHECKPOINT --cfg-options model.backbone.type=mmvmamba.RuntimeBackbone '
    'model.backbone.file=backbone.onnx': RUNTIME,
    'tools/dist_train.sh CONFIG 8': LAUNCHES,
    'tools/dist_train.sh configs/classification/vmamba-tiny-s1l8_8xb128-amp_in1k.py 8': LAUNCHES,
    'tools/dist_test.sh CONFIG CHECKPOINT 1': LAUNCHES,
    'tools/dist_test.sh CONFIG CHECKPOINT 1 --tta': LAUNCHES,
    'python tools/analysis/throughput.py --model NAME CONFIG': 'tests/test_tools/test_analysis_throughput.py',
    'python tools/analysis/get_flops.py CONFIG': 'tests/test_tools/test_flops.py',
    'python -m mmvmamba.compat train.py ARGS': 'tests/test_compat/test_finder.py',
    **{f'python tools/analysis/{name}.py': ANALYSES for name in ('erf', 'attention_map', 'robustness_resolution')},
    'python tools/analysis/linear_probe.py': 'tests/test_tools/test_linear_probe.py',
}
TABLE = {
    **{line: Row('templates', tests=tests) for line, tests in TEMPLATES.items()},
    # ---- make
    'make demo': Row('reduced', 'DEMO_OPTIONS=--quick', makes='demo_output/metrics.md'),
    'make gallery': Row(
        'reduced', 'GALLERY_OPTIONS=--quick', after=('make demo',), makes='demo_output/gallery/erf/erf.png'
    ),
    'make figures': Row('whole', quick=True),
    'make docs-test': Row('checks'),
    'make dist': Row('checks'),
    'make matrix': Row('checks'),
    'make docs': Row('whole', makes='build/docs/index.html'),
    'make test': Row('checks'),
    'make test-all': Row('checks'),
    'make test ENV_PYTHON=/path/to/env/bin/python': Row('checks'),
    'make lint': Row('checks'),
    'make format': Row('checks'),
    'make soak': Row('checks'),
    'make wheels': Row('installs', tests='tests/test_packaging.py'),
    'make setup': Row('installs', tests='tests/test_tools/test_setup_env.py'),
    'make setup MMCV=compiled': Row('installs', tests='tests/test_tools/test_setup_env.py'),
    'make setup PYTHON=/usr/bin/python3.12': Row('installs', tests='tests/test_tools/test_setup_env.py'),
    # ---- installing
    'pip install --no-build-isolation .': Row('installs', tests='tests/test_packaging.py'),
    'pip install --no-build-isolation -e .': Row('installs', tests='tests/test_packaging.py'),
    'pip install onnx onnxruntime': Row('reduced', '--dry-run --no-index', says='already satisfied: onnxruntime'),
    'pip install imaug': Row('installs'),
    'pip install mmvmamba[timm]': Row('installs', tests='tests/test_integrations/test_timm.py'),
    'pip install mmvmamba[openvino]': Row('installs', tests='tests/test_tools/test_openvino.py'),
    'python -m mmvmamba.export.openvino': Row('installs', tests='tests/test_tools/test_openvino.py'),
    'pip install mmvmamba[hub]': Row('installs', tests='tests/test_integrations/test_hub.py'),
    'pip install huggingface_hub': Row('installs'),
    'pip install safetensors': Row('installs'),
    'pip install seaborn': Row('installs'),
    'pip install --no-deps grad-cam==1.4.8 ttach': Row('installs'),
    'pip install --no-deps --require-hashes -r requirements/hashes.txt': Row('installs'),
    'pip install pip-audit': Row('installs'),
    'pip-audit --strict --no-deps --disable-pip -r requirements/torch.txt -r requirements/tested.txt': Row('installs'),
    'pre-commit install': Row('installs'),
    # ---- the doctor
    'source .venv/bin/activate': Row('installs', tests='tests/test_tools/test_setup_env.py'),
    'python -m mmvmamba.doctor': Row('whole', says='mmvmamba', quick=True),
    'python -m mmvmamba.compat': Row('whole', says='selective_scan_cuda_oflex', quick=True),
    'MMVMAMBA_BACKEND=naive python -m mmvmamba.doctor': Row('whole', says='naive'),
    "pip install 'mmcv-lite==2.1.0'": Row('installs'),
    **{
        f'python -m mmvmamba.mmcv_ops {command}': Row('installs', tests='tests/test_mmcv_ops/test_ways_in.py')
        for command in ('place', 'report', 'remove')
    },
    # ---- training and testing
    TRAIN: Row('reduced', FEW_IMAGES, makes='work_dirs/digits/epoch_20.pth'),
    f'{TRAIN} --resume': Row(
        'reduced',
        f'{FEW_IMAGES} train_cfg.max_epochs=21 default_hooks.checkpoint.max_keep_ckpts=-1',
        after=(TRAIN,),
        says='resumed epoch: 20',
    ),
    f'python tools/test.py {DIGITS} work_dirs/digits/epoch_20.pth': Row('whole', after=(TRAIN,), says='accuracy/top1'),
    f'python tools/test.py {DIGITS} work_dirs/digits/epoch_20.pth --complexity': Row(
        'reduced', '--cfg-options test_dataloader.batch_size=2', after=(TRAIN,), says='throughput: '
    ),
    f'mim train mmpretrain {DIGITS} --gpus 0': Row('reduced', ONE_EPOCH, says='accuracy/top1'),
    f'tools/dist_train.sh {DIGITS} 2': Row('reduced', f'{ONE_EPOCH} work_dir=work_dirs/two', says='accuracy/top1'),
    TRAIN_MINE: Row('whole', makes='work_dirs/my_config/epoch_12.pth'),
    'mim test mmdet my_config.py --checkpoint work_dirs/my_config/epoch_12.pth': Row(
        'whole', after=(TRAIN_MINE,), says='coco/segm_mAP'
    ),
    'python tools/train.py my_config.py --amp --resume': Row(
        'reduced', changed=(' --amp', ''), after=(TRAIN_MINE,), says='resumed epoch: 12'
    ),
    'python tools/test.py my_config.py CHECKPOINT': Row('whole', changed=MINE, after=(TRAIN_MINE,), says='segm_mAP'),
    'tools/dist_train.sh my_config.py 8': Row(
        'reduced', '--work-dir work_dirs/dist', changed=('.py 8', '.py 2'), makes='work_dirs/dist/epoch_12.pth'
    ),
    'tools/dist_test.sh my_config.py CHECKPOINT 8': Row(
        'reduced', changed=('CHECKPOINT 8', f'{MINE[1]} 2'), after=(TRAIN_MINE,), says='coco/segm_mAP'
    ),
    f'{CONFIGS}/classification/vmamba-tiny-s1l8_8xb128_in1k.py --amp': _no_data('data/imagenet'),
    f'{CONFIGS}/detection/mask-rcnn_vmamba-t-s1l8_fpn_1x_coco.py --amp': _no_data('data/coco/'),
    f'{CONFIGS}/segmentation/vmamba-tiny-s1l8-in1k-pre_upernet_4xb4-160k_ade20k-512x512.py --amp': _no_data(
        'data/ade/ADEChallengeData2016'
    ),
    f'{CONFIGS}/classification/vmamba-tiny-s1l8_1xb64-50e_custom.py': _no_data('data/custom'),
    f'{CONFIGS}/detection/mask-rcnn_vmamba-t-s1l8_fpn_1xb2-1x_custom.py': _no_data('data/custom/'),
    f'{CONFIGS}/segmentation/vmamba-tiny-s1l8-in1k-pre_upernet_1xb4-20k_custom-512x512.py': _no_data('data/custom'),
    # ---- checkpoints
    TO_OFFICIAL: Row('whole', after=(TRAIN,), makes='official.pth'),
    'python tools/model_converters/vmamba2mm.py vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba-tiny.pth': Row(
        'whole', changed=('vssm1_tiny_0230s_ckpt_epoch_264.pth', 'official.pth'), after=(TO_OFFICIAL,), says='wrote'
    ),
    'python tools/model_converters/clean_checkpoint.py TRAINED.pth CLEAN.pth': Row(
        'whole',
        changed=('TRAINED.pth CLEAN.pth', 'work_dirs/digits/epoch_20.pth clean.pth'),
        after=(TRAIN,),
        makes='clean.pth',
    ),
    'python tools/model_converters/publish_model.py work_dirs/digits/epoch_20.pth published.pth': Row(
        'whole', after=(TRAIN,), makes='published-*.pth'
    ),
    # ---- figures
    'python tools/analysis/get_flops.py configs/classification/vmamba-tiny-s1l8_8xb128_in1k.py': Row(
        'whole', says='30,249,064'
    ),
    'python tools/benchmark/training.py configs/classification/vmamba-tiny-s1l8_8xb128-amp_in1k.py '
    f'{SWIN} train_dataloader.batch_size=128 --amp '
    '--baseline swin-tiny_16xb64_in1k': Row(
        'reduced',
        '--device cpu --batch 1 --warmup 1 --iterations 2 --phases 0 --workers 0 --no-profile --bare',
        changed=(f'-amp_in1k.py {SWIN} train_dataloader.batch_size=128 --amp', f'_in1k.py {SWIN}'),
        says='speed ratio',
    ),
    'python tools/benchmark/models.py --help': Row('whole', says='usage'),
    'python tools/benchmark/ops.py --help': Row('whole', says='usage'),
    f'python tools/analysis/throughput.py {THREE} --precisions tf32 fp16': Row(
        'reduced', CPU_SIZE, says='| ConvNeXt-T |'
    ),
    f'python tools/analysis/throughput.py {ONE} --precisions fp16 --modes inference train --compile max-autotune': Row(
        'reduced', f'{CPU_SIZE} --modes inference --compile default', says='| VMamba-T |'
    ),
    # ---- export
    f'python tools/export/to_onnx.py {DIGITS} none --out model.onnx': Row('whole', makes='model.onnx'),
    f'python tools/export/to_onnx.py {DIGITS} none --scan loop-free --out loop-free.onnx': Row(
        'whole', makes='loop-free.onnx'
    ),
    f'python tools/export/to_program.py {DIGITS} none --out model.pt2': Row('whole', makes='model.pt2'),
    TO_PACKAGE: Row('whole', makes='package.pt2', says='height 33 or more'),
    CMAKE: Row('whole'),
    'cmake --build build/cpp': Row('whole', after=(CMAKE,), makes='build/cpp/run_package'),
    IMAGES_FILE: Row('whole', makes='images.bin'),
    "build/cpp/run_package package.pt2 $(python -c 'import mmvmamba.export as e; print(e.op_library())') images.bin "
    'scores.bin 1 3 224 224': Row(
        'whole', after=(TO_PACKAGE, 'cmake --build build/cpp', IMAGES_FILE), says='[1, 10] of Float', makes='scores.bin'
    ),
    # ---- pictures
    f'python tools/analysis/erf.py --model untrained {DIGITS} none --images data/digits/scenes/val': Row(
        'whole', makes='analysis/erf/erf.png'
    ),
    f'python tools/analysis/attention_map.py CONFIG CHECKPOINT {IMAGE} --pixel 64 64 --stage 0': Row(
        'whole', changed=MODEL, after=(TRAIN,), makes='analysis/attention_map/attention_map.png'
    ),
    f'python tools/analysis/attention_map.py CONFIG CHECKPOINT {IMAGE} --forms CB CwBw ww --stage 1 --matrix '
    '--vit mmpretrain::deit/deit-tiny_4xb256_in1k.py none --out-dir analysis/forms': Row(
        'whole', changed=MODEL, after=(TRAIN,), makes='analysis/forms/attention_matrix.png'
    ),
    PROBE: Row('reduced', '--limit 4', changed=MODEL, after=(TRAIN,), makes='analysis/linear_probe/linear_probe.pth'),
    f'{PROBE} --l2 0.01 --resume --force': Row(
        'reduced', '--limit 4', changed=MODEL, after=(PROBE,), says='features: 2 of 2 shards are there'
    ),
    f'python tools/analysis/feature_map.py CONFIG CHECKPOINT {IMAGE}': Row(
        'whole', changed=MODEL, after=(TRAIN,), makes='analysis/feature_map/feature_map.png'
    ),
    'python tools/analysis/robustness_resolution.py --model VMamba CONFIG CHECKPOINT '
    '--data data/digits/classification/val --sizes 32 48 64 96 128 --crop-ratio 1': Row(
        'reduced',
        '--limit 2',
        changed=MODEL,
        after=(TRAIN,),
        makes='analysis/robustness_resolution/robustness_resolution.png',
    ),
    # both need grad-cam
    f'mim run mmpretrain vis_cam {IMAGE} {DIGITS} work_dirs/digits/epoch_20.pth --target-layers backbone.outnorm3 '
    '--save-path cam.png': Row('installs', tests='tests/test_models/test_module_contract.py'),
    f'mim run mmsegmentation visualization_cam {IMAGE} configs/demo/vmamba-nano_upernet_1xb4-4k_digits-128x128.py '
    'work_dirs/scenes/iter_4000.pth --target-layers backbone.outnorm3 --category-index 3 --device cpu '
    '--cam-file cam.png': Row('installs', tests='tests/test_models/test_module_contract.py'),
    'mim run mmpretrain analyze_logs plot_curve demo_output/work_dirs/classification/*/vis_data/scalars.json '
    '--keys loss --out loss.png': Row('whole', after=('make demo',), makes='loss.png'),
}
