"""Batches on their way to the device, while the device still works on the one before."""

from typing import Any, Iterator, Optional

import torch
from mmengine.structures import BaseDataElement

_SMALL = 1 << 16  # bytes; what is smaller travels together


def send(batch: Any, device: torch.device, stream: Optional[torch.cuda.Stream] = None) -> Any:
    """Copy the tensors of a batch to a device.

    Images go by themselves, small tensors such as boxes and labels in one copy for each dtype.  Data samples are
    changed in place, as are boxes; masks that are arrays of NumPy stay.

    Args:
        batch (Any): Nested dicts, lists and tuples of tensors of any shape and dtype and of data samples.
        device (torch.device): Where to.
        stream (torch.cuda.Stream, optional): The copies' own stream; the current one waits for it. Default: None.

    Returns:
        Any: The batch with tensors on the device.
    """
    found = [tensor for tensor in _tensors(batch) if tensor.device != device]
    if not found:
        return batch
    with torch.cuda.stream(stream):  # no stream changes nothing
        sent = _copy(found, device)
    if stream is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in sent:
            tensor.record_stream(current)
    copies = {id(tensor): copied for tensor, copied in zip(found, sent)}
    return _exchange(batch, copies)


def _copy(tensors: list, device: torch.device) -> list:
    sent: list = [None] * len(tensors)
    small: dict = {}
    for i, tensor in enumerate(tensors):
        if tensor.device.type == 'cpu' and tensor.numel() * tensor.element_size() < _SMALL:
            small.setdefault(tensor.dtype, []).append(i)
        else:
            sent[i] = tensor.to(device, non_blocking=True)
    for places in small.values():
        flat = torch.cat([tensors[i].reshape(-1) for i in places])
        if device.type == 'cuda':
            flat = flat.pin_memory()
        parts = flat.to(device, non_blocking=True).split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts):
            sent[i] = part.view(tensors[i].shape)
    return sent


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, BaseDataElement):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(getattr(value, 'tensor', None), torch.Tensor):  # boxes
        yield value.tensor


def _exchange(value: Any, copies: dict) -> Any:
    if isinstance(value, torch.Tensor):
        return copies.get(id(value), value)
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _exchange(item, copies)
    elif isinstance(value, list):
        value[:] = [_exchange(item, copies) for item in value]
    elif isinstance(value, tuple):
        items = [_exchange(item, copies) for item in value]
        return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)
    elif isinstance(value, BaseDataElement):
        for key, item in list(value.items()):
            changed = _exchange(item, copies)
            if changed is not item:
                setattr(value, key, changed)
    elif isinstance(getattr(value, 'tensor', None), torch.Tensor):
        value.tensor = copies.get(id(value.tensor), value.tensor)
    return value
