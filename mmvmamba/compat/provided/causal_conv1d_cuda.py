"""``causal_conv1d_cuda``, the compiled module of the package causal_conv1d, in all its argument lists."""

import torch

from mmvmamba.ops.checks import check_float, check_same_device, check_shape

from ..conv import backward, check, forward, last_steps, refuse_seq_idx

NAME = 'causal_conv1d_cuda'
# arguments by position, of versions 1.0, 1.1, 1.2 and 1.6
FORWARD = {
    4: ('x', 'weight', 'bias', 'silu'),
    5: ('x', 'weight', 'bias', 'seq_idx', 'silu'),
    7: ('x', 'weight', 'bias', 'seq_idx', 'initial_states', 'final_states', 'silu'),
    8: ('x', 'weight', 'bias', 'seq_idx', 'initial_states', 'out', 'final_states', 'silu'),
}
BACKWARD = {
    6: ('x', 'weight', 'bias', 'dout', 'dx', 'silu'),
    7: ('x', 'weight', 'bias', 'dout', 'seq_idx', 'dx', 'silu'),
    10: ('x', 'weight', 'bias', 'dout', 'seq_idx', 'initial_states', 'dfinal_states', 'dx', 'dinitial', 'silu'),
    12: (
        *('x', 'weight', 'bias', 'dout', 'seq_idx', 'initial_states', 'dfinal_states'),
        *('dx', 'dweight', 'dbias', 'dinitial', 'silu'),
    ),
}


def causal_conv1d_fwd(*arguments):
    """Convolve; which version's arguments these are, their number tells.

    Returns:
        Tensor | None: The output (batch, dim, L); of version 1.6, which has a place for it, None.
    """
    given = _by_name('causal_conv1d_fwd', FORWARD, arguments)
    x, weight, bias, before = given['x'], given['weight'], given['bias'], given.get('initial_states')
    check(NAME, x, weight, bias, before)
    _check_places(given, out=x.shape, final_states=_steps_before(x, weight))
    if 'out' in given and given['out'] is None:
        raise TypeError(f'{NAME}: out is None, expected a tensor of shape {tuple(x.shape)} to write to')
    with torch.no_grad():
        out = forward(x, weight, bias, given['silu'], before)
        if given.get('final_states') is not None:
            given['final_states'].copy_(last_steps(x, weight.shape[1], before))
        if 'out' not in given:
            return out
        given['out'].copy_(out)
    return None


def causal_conv1d_bwd(*arguments):
    """Gradients; which version's arguments these are, their number tells.

    Returns:
        tuple[Tensor | None] | None: Gradients of x (in ``dx``, if that is given), weight and bias; of version 1.2 also
        that of initial_states, None unless asked for; of version 1.6, which has places for all of them, None.
    """
    given = _by_name('causal_conv1d_bwd', BACKWARD, arguments)
    x, weight, bias, before = given['x'], given['weight'], given['bias'], given.get('initial_states')
    check(NAME, x, weight, bias, before, given['dout'])
    _check_places(
        given,
        dfinal_states=_steps_before(x, weight),
        dx=x.shape,
        dweight=weight.shape,
        dbias=weight.shape[:1],
        **(dict(dinitial=_steps_before(x, weight)) if len(arguments) == 12 else {}),  # a switch in version 1.2
    )
    places: dict = {key: given.get(key) for key in ('dx', 'dweight', 'dbias', 'dinitial')}
    dx, *grads = backward(x, weight, bias, given['dout'], given['silu'], before, given.get('dfinal_states'))
    if places['dx'] is None:
        dx = dx.to(x.dtype)
    else:
        dx = places['dx'].copy_(dx)
    if len(arguments) == 12:
        for key, gradient in zip(('dweight', 'dbias', 'dinitial'), grads):
            if places[key] is not None:
                places[key].copy_(gradient)
        return None
    dweight, dbias, dinitial = grads
    results = dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)
    return (*results, dinitial.to(x.dtype) if places['dinitial'] else None) if len(arguments) == 10 else results


def causal_conv1d_update(*arguments):
    """Refused: one step of a sequence that goes on."""
    raise NotImplementedError(
        f'{NAME}.causal_conv1d_update has no stand-in; call causal_conv1d.causal_conv1d_update, which has one, or '
        'install the original causal-conv1d'
    )


def _steps_before(x, weight) -> tuple:
    return (*x.shape[:2], weight.shape[1] - 1)


def _check_places(given, **shapes) -> None:
    """Check what is written to, and the gradient of the last steps, by name."""
    for key, shape in shapes.items():
        value = given.get(key)
        if value is not None:
            check_float(NAME, key, value, ', '.join(map(str, shape)))
            check_shape(NAME, key, value, shape, 'by those of x and weight')
            check_same_device(NAME, 'x', {'x': given['x'], key: value})


def _by_name(function, lists, arguments) -> dict:
    if len(arguments) not in lists:
        counts = ', '.join(map(str, lists))
        raise TypeError(f'{NAME}.{function}: got {len(arguments)} arguments, expected {counts}, by its version')
    given = dict(zip(lists[len(arguments)], arguments))
    refuse_seq_idx(f'{NAME}.{function}', given.get('seq_idx'))
    return given
