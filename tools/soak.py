"""Run models of all three kinds through one process for a long time: no error, no wrong result, no growing memory.

python tools/soak.py [--minutes 20] [--report soak.json]

Each turn takes one of several small models (a classifier's, a detector's and a segmentor's backbone in their
scan modes), a size and a precision at random, and infers or trains. Every model answers a fixed question again and
again; the answer may not change. Memory is read after a warm-up (a third of the
time and 100 turns) and at the end.
"""

import argparse
import gc
import json
import random
import resource
import sys
import time
from pathlib import Path

import torch

from mmvmamba.models import VSSMBackbone

ARCHS = {
    'classifier': dict(arch=dict(dims=16, depths=(1, 1, 1, 1)), out_indices=(3,)),
    'detector': dict(arch=dict(dims=16, depths=(1, 1, 2, 1), d_state=2, gate='silu'), out_indices=(0, 1, 2, 3)),
    'segmentor': dict(arch=dict(dims=16, depths=(1, 1), scan_mode='cascade2d'), out_indices=(0, 1)),
    'both ways': dict(arch=dict(dims=16, depths=(1, 1), scan_mode='bidi', norm_layer='bn'), out_indices=(1,)),
}
PRECISIONS = ('float32', 'bfloat16', 'float16', 'float64')
WARM_UP_TURNS = 100
ALLOWED_GROWTH = 32  # MiB, of which allocators may keep some back


def parse_args(arguments=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=20.0, help='how long (default: 20)')
    parser.add_argument('--report', help='write what was seen to this .json file')
    parser.add_argument('--seed', type=int, default=0, help='of the order of turns')
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f'--minutes is {args.minutes}, expected more than 0')
    return args


def memory() -> dict:
    """MiB that the process holds, and on the GPU if there is one."""
    gc.collect()
    pages = int(Path('/proc/self/statm').read_text().split()[1]) if Path('/proc/self/statm').exists() else 0
    held = pages * resource.getpagesize() / 2**20
    gpu = torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return dict(resident=held, gpu=gpu, objects=len(gc.get_objects()))


def answer(model, question) -> torch.Tensor:
    """What a model makes of its fixed question."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([out.float().flatten() for out in model(question)])


def turn(model, device: str, chance: random.Random) -> None:
    """One inference or training step of random size and precision.

    Raises:
        FloatingPointError: If an output or a gradient is not finite.
    """
    precision, training = chance.choice(PRECISIONS), chance.random() < 0.5
    size = (chance.choice((1, 2, 3)), 3, chance.randrange(17, 130), chance.randrange(17, 130))
    model.train(training)
    x = torch.rand(size, device=device)
    if precision == 'float64':
        # in double the weights are cast too; functional_call leaves the model as it is
        weights = {name: value.double() if value.is_floating_point() else value for name, value in state(model).items()}
        outs = torch.func.functional_call(model, weights, (x.double(),))
    else:
        half = getattr(torch, precision)
        with torch.autocast(device, dtype=half, enabled=precision != 'float32'):
            outs = model(x)
    if not all(out.isfinite().all() for out in outs):
        raise FloatingPointError(f'an output is not finite: {size}, {precision}')
    if training:
        sum(out.float().square().mean() for out in outs).backward()
        if not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f'a gradient is not finite: {size}, {precision}')
        model.zero_grad(set_to_none=True)


def state(model) -> dict:
    """Parameters and copies of the buffers by name."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return {**dict(model.named_parameters()), **buffers}


def main(arguments=None) -> int:
    """Soak; returns 0 if nothing was lost."""
    args = parse_args(arguments)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(args.seed)
    chance = random.Random(args.seed)
    models = {name: VSSMBackbone(**options).to(device) for name, options in ARCHS.items()}
    for model in models.values():
        for module in model.modules():  # training must not change what a question is answered with
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
    question = torch.rand(2, 3, 64, 48, device=device)
    first = {name: answer(model, question) for name, model in models.items()}

    start, warm, iterations, errors = time.monotonic(), None, 0, []
    seconds = args.minutes * 60
    while time.monotonic() - start < seconds:
        name = chance.choice(list(models))
        try:
            turn(models[name], device, chance)
            if iterations % 10 == 0 and not torch.equal(answer(models[name], question), first[name]):
                raise ArithmeticError(f'{name} answers its question in another way than at first')
        except Exception as error:  # go on: the report tells how often it happened
            errors.append(f'turn {iterations}, {name}: {type(error).__name__}: {error}')
            print(errors[-1], file=sys.stderr, flush=True)
        iterations += 1
        if warm is None and iterations >= WARM_UP_TURNS and time.monotonic() - start > seconds / 3:
            warm = memory()
        if iterations % 200 == 0:
            print(f'{iterations} turns, {(time.monotonic() - start) / 60:.1f} minutes, {memory()}', flush=True)

    end = memory()
    if warm is None:
        print(f'too short for a statement on memory: {iterations} turns, of which {WARM_UP_TURNS} are the warm-up')
        warm = end
    growth = end['resident'] - warm['resident']
    report = dict(
        device=device, iterations=iterations, errors=len(errors), first_errors=errors[:10], after_warm_up=warm, end=end
    )
    print(f'{iterations} turns on {device}, {len(errors)} errors, resident memory grew by {growth:.1f} MiB')
    if args.report:
        Path(args.report).write_text(json.dumps(report, indent=2) + '\n')
    grew = growth > ALLOWED_GROWTH or end['gpu'] - warm['gpu'] > 1
    if grew:
        print(f'error: memory grew from {warm} to {end}, allowed {ALLOWED_GROWTH} MiB', file=sys.stderr)
    return 1 if errors or grew else 0


if __name__ == '__main__':
    sys.exit(main())
