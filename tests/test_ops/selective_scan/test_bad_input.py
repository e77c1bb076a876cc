"""Every wrong argument gives one error that names the argument, what was found and what was expected."""

import pytest
import torch

from mmvmamba.ops import selective_scan
from tests.test_ops.scan_inputs import make_scan_inputs


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


SCAN_ERRORS = {
    'u_is_a_list': (dict(u=[1.0]), TypeError, r'u must be a tensor of shape \(batch, dim, L\), got list'),
    'u_is_integer': (dict(u=ones(2, 6, 9, dtype=torch.int64)), TypeError, r'u must be a floating.*got int64'),
    'u_is_complex': (dict(u=ones(2, 6, 9, dtype=torch.complex64)), TypeError, r'u must be a floating.*got complex64'),
    'A_is_integer': (dict(A=ones(6, 2, dtype=torch.int32)), TypeError, r'A must be a floating.*got int32'),
    'D_is_bool': (dict(D=ones(6, dtype=torch.bool)), TypeError, r'D must be a floating.*got bool'),
    'u_has_two_dimensions': (dict(u=ones(6, 9)), ValueError, r'u must have the dimensions.*\(6, 9\)'),
    'A_has_three_dimensions': (
        dict(A=ones(6, 2, 1)),
        ValueError,
        r'A must have the dimensions \(dim, N\).*\(6, 2, 1\)',
    ),
    'D_has_two_dimensions': (dict(D=ones(6, 1)), ValueError, r'D must have the dimensions \(dim\).*\(6, 1\)'),
    'B_has_one_dimension': (dict(B=ones(9)), ValueError, r'B must have the dimensions.*\(9,\)'),
    'no_batch': (dict(u=ones(0, 6, 9)), ValueError, r'u has an empty dimension.*\(0, 6, 9\)'),
    'no_steps': (dict(delta=ones(2, 6, 0)), ValueError, r'delta has an empty dimension.*\(2, 6, 0\)'),
    'no_states': (dict(A=ones(6, 0)), ValueError, r'A has an empty dimension.*\(6, 0\)'),
    'no_groups': (dict(C=ones(2, 0, 2, 9)), ValueError, r'C has an empty dimension.*\(2, 0, 2, 9\)'),
    'delta_shape': (dict(delta=ones(2, 6, 8)), ValueError, r'delta has shape \(2, 6, 8\), expected \(2, 6, 9\)'),
    'A_shape': (dict(A=ones(5, 2)), ValueError, r'A has shape \(5, 2\), expected \(6, 2\)'),
    'A_states': (dict(A=ones(6, 3)), ValueError, r'A has shape \(6, 3\), expected \(6, 2\)'),
    'B_length': (
        dict(B=ones(2, 2, 2, 8), C=ones(2, 2, 2, 8)),
        ValueError,
        r'B has shape \(2, 2, 2, 8\), expected \(2, 2, 2, 9\)',
    ),
    'C_shape': (dict(C=ones(2, 3, 2, 9)), ValueError, r'C has shape \(2, 3, 2, 9\), expected \(2, 2, 2, 9\)'),
    'D_shape': (dict(D=ones(5)), ValueError, r'D has shape \(5,\), expected \(6,\)'),
    'bias_shape': (dict(delta_bias=ones(7)), ValueError, r'delta_bias has shape \(7,\), expected \(6,\)'),
    'groups': (
        dict(B=ones(2, 4, 2, 9), C=ones(2, 4, 2, 9)),
        ValueError,
        r'B has 4 groups but u has 6 channels, which 4 does not divide',
    ),
    'too_many_states': (
        dict(A=ones(6, 257), B=ones(2, 2, 257, 9), C=ones(2, 2, 257, 9)),
        ValueError,
        r'B has 257 states \(N\), at most 256',
    ),
    'mixed_dtypes': (dict(delta=ones(2, 6, 9).half()), TypeError, r'delta is float16, but u is float32; outside auto'),
    'A_in_half': (dict(A=ones(6, 2).half()), TypeError, r'A is float16, expected float32, the dtype of the state'),
    'bias_in_double': (dict(delta_bias=ones(6).double()), TypeError, r'delta_bias is float64, expected float32'),
    'out_dtype': (dict(out_dtype=torch.float16), ValueError, r'out_dtype is float16, expected torch.float32'),
    'out_dtype_is_text': (dict(out_dtype='float32'), ValueError, r'out_dtype is float32, expected'),
    'device': (dict(C=torch.ones(2, 2, 2, 9, device='meta')), ValueError, r'C is on meta, but u is on cpu'),
    'NaN': (
        dict(A=ones(6, 2).index_fill(0, torch.tensor(3), float('nan')), check_finite=True),
        ValueError,
        r'A holds 2 values that are NaN or infinite, of 12',
    ),
    'infinity': (dict(D=ones(6) / 0, check_finite=True), ValueError, r'D holds 6 values that are NaN or infinite'),
}


@pytest.mark.parametrize('case', SCAN_ERRORS)
def test_selective_scan(case):
    change, error, message = SCAN_ERRORS[case]
    arguments = {**make_scan_inputs(d_state=2, length=9), **change}
    with pytest.raises(error, match=rf'selective_scan: {message}'):
        selective_scan(**arguments)


def test_finite_parameters_pass_the_check():
    inputs = make_scan_inputs(d_state=2, length=9)
    assert torch.equal(selective_scan(**inputs, check_finite=True), selective_scan(**inputs))


def test_double_input_wants_double_weights():
    inputs = make_scan_inputs(dtype=torch.float64)
    inputs['A'] = inputs['A'].float()
    with pytest.raises(TypeError, match=r'A is float32, expected float64.*float64 inputs'):
        selective_scan(**inputs)
