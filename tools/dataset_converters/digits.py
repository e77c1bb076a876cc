"""Make the digits data set: real scanned digits, alone for classification and in scenes for detection and segmentation.

The 1,797 scans ship with scikit-learn (``load_digits``); nothing is downloaded.  Train and val use different scans.

    classification/{train,val}/<digit>/*.png       one digit an image, 32 x 32
    scenes/{train,val}/*.png                       several digits over a texture
    annotations/instances_{train,val}.json         their boxes and masks, COCO format
    semantic/{train,val}/*.png                     the same masks as classes: 0 background, 1 + digit
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
from mmengine.utils import ProgressBar
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mmvmamba.cli import UserError, run_tool

DIGITS = [str(digit) for digit in range(10)]
DIGIT_SIDE = 32  # pixels of a classification image
SIZES = (0.25, 0.45)  # height of a digit in a scene over the scene's side
COUNTS = (2, 5)  # digits in a scene
INK = 0.35  # an upscaled scan is digit where it is darker than this
MIN_VISIBLE = 0.85  # of a digit's pixels, once others lie on it


def upscale(scan: np.ndarray, side: int) -> np.ndarray:
    """Scan (8, 8) with values 0 to 16 to a smooth picture (side, side) with values 0 to 1."""
    return np.clip(cv2.resize(scan / 16.0, (side, side), interpolation=cv2.INTER_CUBIC), 0, 1).astype(np.float32)


def split_scans(seed: int) -> dict:
    """Scans and labels of train and val: (n, 8, 8) and (n,), a fifth of each class held out."""
    digits = load_digits()
    train, val = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=seed, stratify=digits.target
    )
    return {
        name: (digits.images[index], digits.target[index], index) for name, index in (('train', train), ('val', val))
    }


def make_texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """A background (side, side, 3) with values 0 to 1: two colours mixed by blurred noise and stripes."""
    noise = cv2.resize(rng.random((8, 8), dtype=np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(4, 12)
    rows, columns = np.mgrid[:side, :side] / side
    stripes = 0.5 + 0.5 * np.sin(2 * np.pi * frequency * (np.cos(angle) * rows + np.sin(angle) * columns))
    mix = np.clip(0.7 * noise + 0.3 * stripes, 0, 1)[..., None]
    first, second = rng.uniform(0, 0.45, 3), rng.uniform(0.15, 0.6, 3)
    return (first * mix + second * (1 - mix)).astype(np.float32)


def make_scene(rng: np.random.Generator, scans: np.ndarray, labels: np.ndarray, side: int) -> tuple:
    """Draw a scene.

    Returns:
        tuple[ndarray, list]: Image (side, side, 3) uint8, and a list of (digit, visible mask (side, side) bool).
    """
    image, instances = make_texture(rng, side), []
    for _ in range(rng.integers(COUNTS[0], COUNTS[1] + 1)):
        for _ in range(20):  # places that hide too much are drawn again
            scan = rng.integers(len(scans))
            size = int(rng.uniform(*SIZES) * side)
            top, left = rng.integers(0, side - size + 1, 2)
            alpha = np.zeros((side, side), np.float32)
            alpha[top : top + size, left : left + size] = upscale(scans[scan], size)
            ink = alpha > INK
            if all((mask & ~ink).sum() >= MIN_VISIBLE * whole for _, mask, whole in instances):
                break
        else:
            continue
        colour = rng.uniform(0.65, 1.0, 3).astype(np.float32)
        image = image * (1 - alpha[..., None]) + colour * alpha[..., None]
        instances = [(digit, mask & ~ink, whole) for digit, mask, whole in instances]
        instances.append((int(labels[scan]), ink, int(ink.sum())))
    image = image + rng.normal(0, 0.02, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), [(digit, mask) for digit, mask, _ in instances]


def annotate(digit: int, mask: np.ndarray, image_id: int, annotation_id: int) -> dict:
    """COCO annotation of one instance."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    return dict(
        id=annotation_id,
        image_id=image_id,
        category_id=digit,
        bbox=[float(value) for value in coco_mask.toBbox(rle)],
        area=float(coco_mask.area(rle)),
        segmentation=dict(size=[int(value) for value in rle['size']], counts=rle['counts'].decode()),
        iscrowd=0,
    )


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f'cannot write {path}')


def write_classification(root: Path, name: str, scans: np.ndarray, labels: np.ndarray, index: np.ndarray) -> None:
    """Write one folder a digit; a file is named after its scan."""
    for scan, label, number in zip(scans, labels, index):
        image = (upscale(scan, DIGIT_SIDE) * 255).astype(np.uint8)
        write_image(root / 'classification' / name / str(label) / f'{number:04d}.png', image)


def write_scenes(root: Path, name: str, scans, labels, count: int, side: int, seed: int) -> None:
    """Write scenes, semantic masks and the COCO file of one split."""
    rng = np.random.default_rng([seed, name == 'train'])
    coco = dict(images=[], annotations=[], categories=[dict(id=i, name=digit) for i, digit in enumerate(DIGITS)])
    print(f'{count} {name} scenes')
    progress = ProgressBar(count, file=sys.stdout)
    for image_id in range(count):
        image, instances = make_scene(rng, scans, labels, side)
        semantic = np.zeros((side, side), np.uint8)
        for digit, mask in instances:
            semantic[mask] = digit + 1
            coco['annotations'].append(annotate(digit, mask, image_id, len(coco['annotations'])))
        file_name = f'{image_id:05d}.png'
        coco['images'].append(dict(id=image_id, file_name=file_name, height=side, width=side))
        write_image(root / 'scenes' / name / file_name, image)
        write_image(root / 'semantic' / name / file_name, semantic)
        progress.update()
    print()
    (root / 'annotations').mkdir(exist_ok=True)
    (root / 'annotations' / f'instances_{name}.json').write_text(json.dumps(coco))


def make_dataset(out_dir: Path, seed: int, num_train: int, num_val: int, image_size: int, force: bool) -> None:
    """Make the whole set in a temporary folder and move it into place when it is complete."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())) and not force:
        raise UserError(f'--out-dir {out_dir} exists and is not empty; choose another, or replace it with --force')
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f'.{out_dir.name}-', dir=out_dir.parent))
    try:
        for name, (scans, labels, index) in split_scans(seed).items():
            write_classification(part, name, scans, labels, index)
            write_scenes(part, name, scans, labels, num_train if name == 'train' else num_val, image_size, seed)
        if out_dir.exists():
            shutil.rmtree(out_dir) if out_dir.is_dir() else out_dir.unlink()
        part.chmod(0o755)
        part.rename(out_dir)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def parse_args(arguments: Optional[list] = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out-dir', type=Path, default=Path('data/digits'), help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='two runs with one seed give identical files')
    parser.add_argument('--num-train', type=int, default=2400, help='scenes to train on (default: %(default)s)')
    parser.add_argument('--num-val', type=int, default=100, help='scenes to evaluate on (default: %(default)s)')
    parser.add_argument('--image-size', type=int, default=128, help='pixels a side of a scene (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='replace what is in --out-dir')
    args = parser.parse_args(arguments)
    for name, low in (('seed', 0), ('num_train', 1), ('num_val', 1), ('image_size', 64)):
        if getattr(args, name) < low:
            parser.error(f'--{name.replace("_", "-")} is {getattr(args, name)}, expected at least {low}')
    return args


def run(args: argparse.Namespace) -> None:
    """Make what the command line asks for."""
    try:
        make_dataset(args.out_dir, args.seed, args.num_train, args.num_val, args.image_size, args.force)
    except OSError as error:
        raise UserError(str(error)) from error
    print(f'wrote {args.out_dir}')


def main(arguments: Optional[list] = None) -> int:
    """Make the data set; returns the exit code."""
    return run_tool(run, parse_args(arguments))


if __name__ == '__main__':
    sys.exit(main())
