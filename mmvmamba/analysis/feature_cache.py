"""Features of many images on disk, in shards, so that an interrupted run goes on where it stopped."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np

IDENTITY = 'features.json'


class FeatureCache:
    """A folder of shards, each whole or absent, and a file that says what they are features of.

    Args:
        folder (str | Path): The folder; made if it is absent.
        identity (dict): What makes features what they are: model, image size and the like, as JSON can hold it.

    Raises:
        ValueError: If the folder holds features of something else; the message names what differs.
    """

    def __init__(self, folder, identity: dict):
        self.folder = Path(folder)
        path = self.folder / IDENTITY
        if path.is_file():
            try:
                found = json.loads(path.read_text())
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise ValueError(f'{str(path)!r} is not what describes features')
            other = [name for name in identity if found.get(name) != identity[name]]
            if other:
                described = ', '.join(
                    f'{name} {_short(found.get(name))}, not {_short(identity[name])}' for name in other
                )
                raise ValueError(f'{str(self.folder)!r} holds features of {described}')
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(path, lambda file: file.write(json.dumps(identity, indent=2).encode() + b'\n'))

    def path(self, split: str, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f'{split}-{shard:05d}.npz'

    def write(self, split: str, shard: int, features: np.ndarray, labels: np.ndarray, digest: str) -> None:
        """Save a shard; it replaces one of that name when it is whole.

        Args:
            split (str): train or val.
            shard (int): Its number.
            features (np.ndarray): (M, C), float32.
            labels (np.ndarray): (M,), int64.
            digest (str): Of the images that it is made from.
        """
        path = self.path(split, shard)
        _replace(path, lambda file: np.savez(file, features=features, labels=labels, digest=np.array(digest)))

    def has(self, split: str, shard: int, digest: str) -> bool:
        """Whether the shard is there, whole and of these images."""
        try:
            with np.load(self.path(split, shard)) as arrays:
                return str(arrays['digest']) == digest
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return False

    def read(self, split: str, shards: int) -> tuple:
        """All features of a split and their labels: (M, C) float32 and (M,) int64."""
        loaded = []
        for shard in range(shards):
            with np.load(self.path(split, shard)) as arrays:
                loaded.append((arrays['features'], arrays['labels']))
        features, labels = zip(*loaded)
        return np.concatenate(features), np.concatenate(labels)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _replace(path: Path, write) -> None:
    part = path.with_name(f'{path.name}.part')
    try:
        with part.open('wb') as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
