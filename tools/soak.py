"""Run models of all three kinds through one process for a long time: no error, no wrong result, no growing memory.

python tools/soak.py [--minutes 20] [--report soak.json]

Each turn takes one of several small models (the demo's classifier, detector and segmentor as a whole, and backbones in
their scan modes), a size and a precision at random, and infers or trains. Every model answers a fixed question again
and again; the answer may not change. Memory is read after a warm-up (a third of the time and 100 turns) and at the end,
which comes after 200 turns at the earliest.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

# each new size is compiled anew on CPU; a small cache of those kernels is full before the warm-up ends
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '64')

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData

from mmvmamba.models import VSSMBackbone

ARCHS = {
    'backbone': dict(arch=dict(dims=16, depths=(1, 1, 1, 1)), out_indices=(3,)),
    'backbone with a gate': dict(
        arch=dict(dims=16, depths=(1, 1, 2, 1), d_state=2, gate='silu'), out_indices=(0, 1, 2, 3)
    ),
    'backbone in cascade': dict(arch=dict(dims=16, depths=(1, 1), scan_mode='cascade2d'), out_indices=(0, 1)),
    'backbone both ways': dict(arch=dict(dims=16, depths=(1, 1), scan_mode='bidi', norm_layer='bn'), out_indices=(1,)),
}
DEMO = Path(__file__).resolve().parents[1] / 'configs/demo'
TASKS = {
    'classifier': DEMO / 'vmamba-nano_1xb64_digits-32px.py',
    'detector': DEMO / 'mask-rcnn_vmamba-nano_fpn_1xb8-1e_digits.py',
    'segmentor': DEMO / 'vmamba-nano_upernet_1xb4-4k_digits-128x128.py',
}
CODEBASES = dict(classifier='mmpretrain', detector='mmdet', segmentor='mmseg')
CLASSES = 10
PRECISIONS = ('float32', 'bfloat16', 'float16', 'float64')
WARM_UP_TURNS = 100
ALLOWED_GROWTH = 32  # MiB, of which allocators may keep some back


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=20.0, help='minimum duration in minutes (default: 20)')
    parser.add_argument('--report', help='write the results to this .json file')
    parser.add_argument('--seed', type=int, default=0, help='of the order of turns')
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f'--minutes is {args.minutes}, expected more than 0')
    return args


def memory() -> dict:
    """MiB that the process holds, and on the GPU if there is one."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory is no growth
    pages = int(Path('/proc/self/statm').read_text().split()[1]) if Path('/proc/self/statm').exists() else 0
    held = pages * resource.getpagesize() / 2**20
    gpu = torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return dict(resident=held, gpu=gpu, objects=len(gc.get_objects()))


class Backbone:
    """A backbone that is fed random numbers.

    Args:
        options (dict): Of :class:`VSSMBackbone`.
        device (str): Where it runs.
    """

    def __init__(self, options: dict, device: str):
        self.device, self.model = device, frozen(VSSMBackbone(**options).to(device))
        self.question = torch.rand(2, 3, 64, 48, device=device)

    def answer(self) -> torch.Tensor:
        """What the model makes of its fixed question."""
        self.model.eval()
        with torch.inference_mode():
            return torch.cat([out.float().flatten() for out in self.model(self.question)])

    def turn(self, chance: random.Random) -> None:
        """One inference or training step of random size and precision."""
        model, precision, training = self.model, chance.choice(PRECISIONS), chance.random() < 0.5
        size = (chance.choice((1, 2, 3)), 3, chance.randrange(17, 130), chance.randrange(17, 130))
        model.train(training)
        x = torch.rand(size, device=self.device)
        if precision == 'float64':
            # in double the weights are cast too; functional_call leaves the model as it is
            weights = {key: value.double() if value.is_floating_point() else value for key, value in state(model)}
            outs = torch.func.functional_call(model, weights, (x.double(),))
        else:
            with autocast(self.device, precision):
                outs = model(x)
        assert_finite('an output', outs, size, precision)
        if training:
            backward(model, sum(out.float().square().mean() for out in outs), size, precision)


class Task:
    """A whole model of a demo config, with losses in training and predictions otherwise.

    Args:
        name (str): A key of :data:`TASKS`.
        device (str): Where it runs.
    """

    def __init__(self, name: str, device: str):
        self.name, self.device, self.scope = name, device, CODEBASES[name]
        # mmcv's RoIAlign takes no bfloat16, and on CPU no half precision at all
        self.precisions = ('float32',) if name == 'detector' else ('float32', 'bfloat16', 'float16')
        cfg = Config.fromfile(TASKS[name])
        if 'data_preprocessor' in cfg:
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        with DefaultScope.overwrite_default_scope(self.scope):
            model = importlib.import_module(f'{self.scope}.registry').MODELS.build(cfg.model)
        self.model = frozen(revert_sync_batchnorm(model).to(device))
        self.question = self.batch(2, 64, 48, random.Random(0))

    def batch(self, images: int, height: int, width: int, chance: random.Random) -> dict:
        """Random images and annotations as a data loader gives them."""
        return dict(
            inputs=[torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(images)],
            data_samples=[getattr(self, f'_{self.name}_sample')(height, width, chance) for _ in range(images)],
        )

    def answer(self) -> torch.Tensor:
        """What the model makes of its fixed question."""
        return torch.cat([value.float().flatten() for value in self._predict(self.question, 'float32')])

    def turn(self, chance: random.Random) -> None:
        """One prediction or training step of random size and precision."""
        precision, training = chance.choice(self.precisions), chance.random() < 0.5
        # batch norm cannot be trained on one value, which pooling makes of one image
        size = (chance.choice((2, 3) if training else (1, 2, 3)), chance.randrange(33, 129), chance.randrange(33, 129))
        data = self.batch(*size, chance)
        if not training:
            assert_finite('a prediction', self._predict(data, precision), size, precision)
            return
        self.model.train()
        with DefaultScope.overwrite_default_scope(self.scope), autocast(self.device, precision):
            losses = self.model(**self.model.data_preprocessor(data, True), mode='loss')
        loss, values = self.model.parse_losses(losses)
        assert_finite('a loss', values.values(), size, precision)
        backward(self.model, loss, size, precision)

    def _predict(self, data: dict, precision: str) -> list:
        self.model.eval()
        data = dict(inputs=data['inputs'], data_samples=[sample.clone() for sample in data['data_samples']])
        with (
            DefaultScope.overwrite_default_scope(self.scope),
            autocast(self.device, precision),
            torch.inference_mode(),
        ):
            samples = self.model(**self.model.data_preprocessor(data, False), mode='predict')
        if self.name == 'classifier':
            return [sample.pred_score for sample in samples]
        if self.name == 'segmentor':
            return [sample.seg_logits.data for sample in samples]
        return [value for sample in samples for _, value in sorted(sample.pred_instances.items())]

    def _classifier_sample(self, height, width, chance):
        from mmpretrain.structures import DataSample

        return DataSample().set_gt_label(chance.randrange(CLASSES))

    def _detector_sample(self, height, width, chance):
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks

        masks, boxes = torch.zeros(chance.randrange(3), height, width, dtype=torch.uint8), []
        for mask in masks:
            left, top = chance.randrange(width - 16), chance.randrange(height - 16)
            right, bottom = chance.randrange(left + 8, width), chance.randrange(top + 8, height)
            mask[top:bottom, left:right] = 1
            boxes.append([left, top, right, bottom])
        sample = DetDataSample(metainfo=_meta(height, width))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([chance.randrange(CLASSES) for _ in boxes], dtype=torch.long),
            masks=BitmapMasks(masks.numpy(), height, width),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        return sample

    def _segmentor_sample(self, height, width, chance):
        from mmseg.structures import SegDataSample

        sample = SegDataSample(metainfo=_meta(height, width))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, CLASSES + 1, (1, height, width)))
        return sample


def _meta(height: int, width: int) -> dict:
    shape = (height, width)
    names = dict(img_id=1, img_path='', scale_factor=(1.0, 1.0), flip=False, flip_direction=None)
    return dict(names, ori_shape=shape, img_shape=shape, pad_shape=shape)


def autocast(device: str, precision: str) -> torch.autocast:
    """Mixed precision, or none for float32."""
    return torch.autocast(device, dtype=getattr(torch, precision), enabled=precision != 'float32')


def frozen(model):
    """A model whose answers do not change by training without an optimizer: running averages stay."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return model


def state(model):
    """Names with parameters and copies of the buffers."""
    yield from model.named_parameters()
    for name, value in model.named_buffers():
        yield name, value.clone()


def assert_finite(what: str, tensors, size: tuple, precision: str) -> None:
    """Raise FloatingPointError if one of the tensors is not finite."""
    if not all(torch.as_tensor(tensor).isfinite().all() for tensor in tensors):
        raise FloatingPointError(f'{what} is not finite: {size}, {precision}')


def backward(model, loss: torch.Tensor, size: tuple, precision: str) -> None:
    """Compute gradients, which must be finite, and drop them."""
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    assert_finite('a gradient', gradients, size, precision)


def make_subjects(device: str) -> dict:
    """Backbones and tasks by name, as far as the codebases are installed."""
    subjects = {name: Backbone(options, device) for name, options in ARCHS.items()}
    for name in TASKS:
        if importlib.util.find_spec(CODEBASES[name]) is None:
            print(f'{CODEBASES[name]} is not installed: the {name} is left out', file=sys.stderr)
        else:
            subjects[name] = Task(name, device)
    return subjects


def main(arguments=None) -> int:
    """Soak; returns 0 if nothing was lost."""
    args = parse_args(arguments)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(args.seed)
    chance = random.Random(args.seed)
    subjects = make_subjects(device)
    first = {name: subject.answer() for name, subject in subjects.items()}

    start, warm, warm_up_turns, turns, errors = time.monotonic(), None, 0, Counter(), []
    seconds = args.minutes * 60
    while warm is None or time.monotonic() - start < seconds or turns.total() < 2 * WARM_UP_TURNS:
        name = chance.choice(list(subjects))
        try:
            subjects[name].turn(chance)
            if turns.total() % 10 == 0 and not torch.equal(subjects[name].answer(), first[name]):
                raise ArithmeticError(f'{name} gives another answer than at first')
        except Exception as error:  # go on: the report tells how often it happened
            errors.append(f'turn {turns.total()}, {name}: {type(error).__name__}: {error}')
            print(errors[-1], file=sys.stderr, flush=True)
        turns[name] += 1
        if warm is None and turns.total() >= WARM_UP_TURNS and time.monotonic() - start > seconds / 3:
            warm, warm_up_turns = memory(), turns.total()
        if turns.total() % 200 == 0:
            print(f'{turns.total()} turns, {(time.monotonic() - start) / 60:.1f} minutes, {memory()}', flush=True)

    end = memory()
    growth = end['resident'] - warm['resident']
    report = dict(
        device=device,
        iterations=turns.total(),
        turns=dict(turns),
        warm_up_turns=warm_up_turns,
        errors=len(errors),
        first_errors=errors[:10],
        after_warm_up=warm,
        end=end,
    )
    print(f'{turns.total()} turns on {device}, {len(errors)} errors, resident memory grew by {growth:.1f} MiB')
    if args.report:
        Path(args.report).write_text(json.dumps(report, indent=2) + '\n')
    grew = growth > ALLOWED_GROWTH or end['gpu'] - warm['gpu'] > 1
    if grew:
        print(f'error: memory grew from {warm} to {end}, allowed {ALLOWED_GROWTH} MiB', file=sys.stderr)
    return 1 if errors or grew else 0


if __name__ == '__main__':
    sys.exit(main())
