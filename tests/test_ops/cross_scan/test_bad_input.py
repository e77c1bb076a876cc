"""Every wrong argument gives one error that names the argument, what was found and what was expected."""

import importlib.util

import pytest
import torch

from mmvmamba.ops import SCAN_MODES, cross_merge, cross_scan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU is visible to torch')
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=needs_gpu), pytest.param('triton', marks=needs_triton)])
def raw_ops(request):
    if request.param == 'triton':  # checks before anything runs
        from mmvmamba.ops.cross_scan import triton

        return triton.cross_scan, triton.cross_merge, 'cpu'
    return torch.ops.mmvmamba.cross_scan, torch.ops.mmvmamba.cross_merge, request.param


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


CROSS_SCAN_ERRORS = {
    'not_a_tensor': (dict(x=None), TypeError, r'x must be a tensor of shape \(B, C, H, W\), got NoneType'),
    'integer': (dict(x=ones(1, 2, 3, 3, dtype=torch.uint8)), TypeError, r'x must be a floating.*got uint8'),
    'dimensions': (dict(x=ones(2, 3, 3)), ValueError, r'x must have the dimensions.*\(2, 3, 3\)'),
    'empty': (dict(x=ones(0, 2, 3, 3)), ValueError, r'x has an empty dimension'),
    'mode': (dict(x=ones(1, 2, 3, 3), scan_mode='diagonal'), ValueError, r"scan_mode is 'diagonal', expected one of"),
}


@pytest.mark.parametrize('case', CROSS_SCAN_ERRORS)
def test_cross_scan(case):
    arguments, error, message = CROSS_SCAN_ERRORS[case]
    with pytest.raises(error, match=f'cross_scan: {message}'):
        cross_scan(**arguments)


CROSS_MERGE_ERRORS = {
    'integer': (dict(y=ones(1, 4, 2, 9, dtype=torch.int16), size=(3, 3)), TypeError, r'y must be a floating.*int16'),
    'dimensions': (dict(y=ones(1, 8, 9), size=(3, 3)), ValueError, r'y must have the dimensions \(B, K, C, L\)'),
    'routes': (
        dict(y=ones(1, 3, 2, 9), size=(3, 3)),
        ValueError,
        r'y has shape \(1, 3, 2, 9\), expected \(1, 4, 2, 9\)',
    ),
    'length': (dict(y=ones(1, 4, 2, 9), size=(3, 4)), ValueError, r'y has shape.*expected \(1, 4, 2, 12\)'),
    'layout': (
        dict(y=ones(1, 4, 2, 9), size=(3, 3), channel_last=True),
        ValueError,
        r'y has shape \(1, 4, 2, 9\), expected \(1, 9, 4, 9\)',
    ),
    'negative': (dict(y=ones(1, 4, 2, 9), size=(-3, -3)), ValueError, r'size is \(-3, -3\), expected \(H, W\)'),
    'three_numbers': (dict(y=ones(1, 4, 2, 9), size=(3, 3, 1)), ValueError, r'size is \(3, 3, 1\), expected'),
    'one_number': (dict(y=ones(1, 4, 2, 9), size=9), ValueError, r'size is 9, expected \(H, W\)'),
    'fraction': (dict(y=ones(1, 4, 2, 9), size=(4.5, 2)), ValueError, r'size is \(4.5, 2\), expected \(H, W\)'),
    'mode': (dict(y=ones(1, 4, 2, 9), size=(3, 3), scan_mode=2), ValueError, r'scan_mode is 2, expected one of'),
}


@pytest.mark.parametrize('case', CROSS_MERGE_ERRORS)
def test_cross_merge(case):
    arguments, error, message = CROSS_MERGE_ERRORS[case]
    with pytest.raises(error, match=f'cross_merge: {message}'):
        cross_merge(**arguments)


# ---- the ops below the functions, which index memory by these -------------------------------------------------------
def test_numbers_outside_of_the_table_of_modes(raw_ops):
    scan, merge, device = raw_ops
    for mode in (-1, len(SCAN_MODES), 9):
        with pytest.raises(ValueError, match=f'cross_scan: scan_mode is {mode}, expected 0 to 3'):
            scan(ones(1, 2, 3, 3).to(device), mode, False)
        with pytest.raises(ValueError, match=f'cross_merge: scan_mode is {mode}, expected 0 to 3'):
            merge(ones(1, 4, 2, 9).to(device), 3, 3, mode, False)


def test_routes_of_another_length_than_the_map(raw_ops):
    _, merge, device = raw_ops
    for shape, channel_last in (((1, 4, 2, 8), False), ((1, 3, 2, 9), False), ((1, 4, 2, 9), True)):
        with pytest.raises(ValueError, match=r'cross_merge: y has shape .*, expected '):
            merge(ones(*shape).to(device), 3, 3, 0, channel_last)
