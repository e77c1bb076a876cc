"""Every wrong argument gives one error that names the argument, what was found and what was expected."""

import pytest
import torch

from mmvmamba.ops import cross_merge, cross_scan


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
