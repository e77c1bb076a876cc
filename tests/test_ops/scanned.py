"""Data-loader workers that run the op: ``python -m tests.test_ops.scanned``, in a process of its own.

The parent runs the op with two threads first, which a forked OpenMP does not survive by itself.
"""

import torch
from torch.utils.data import DataLoader, Dataset

from mmvmamba.ops import selective_scan


class Scanned(Dataset):
    """A data set that runs the op, as one that extracts features would."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        u = torch.full((1, 8, 200), float(index + 1))
        ones = torch.ones(1, 1, 1, 200)
        return selective_scan(u, u, -torch.ones(8, 1), ones, ones)


def main() -> None:
    torch.set_num_threads(2)
    data = Scanned()
    expected = [data[i] for i in range(len(data))]
    for start in ('fork', 'fork', 'spawn'):
        loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=start)
        found = list(loader)
        assert len(found) == 6 and all(torch.equal(one, two) for one, two in zip(found, expected)), start
        print(start, 'done', flush=True)


if __name__ == '__main__':
    main()
