"""Small callers of the compiled names, written as projects that copied Mamba's or VMamba's code write them."""

import torch


class OflexScan(torch.autograd.Function):
    """As in copies of VMamba: by position, the rest of the results unused."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, oflex=True):
        import selective_scan_cuda_oflex

        ctx.delta_softplus = delta_softplus
        out, x, *_ = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1, oflex)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out

    @staticmethod
    def backward(ctx, dout, *_):
        import selective_scan_cuda_oflex

        saved = ctx.saved_tensors
        grads = selective_scan_cuda_oflex.bwd(*saved[:7], dout.contiguous(), saved[7], ctx.delta_softplus, 1)
        return (*grads, None, None)


class GatedScan(torch.autograd.Function):
    """As in copies of mamba_ssm: a gate, the last state, and the gated output from the rest of the results."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias):
        import selective_scan_cuda

        out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, x, out)
        last_state = x[:, :, -1, 1::2]
        ctx.mark_non_differentiable(last_state)
        return rest[0], last_state

    @staticmethod
    def backward(ctx, dout, *_):
        import selective_scan_cuda

        *inputs, x, out = ctx.saved_tensors
        u, delta, A, B, C, D, z, delta_bias = inputs
        dz = torch.empty_like(z)
        du, ddelta, dA, dB, dC, dD, dbias, *rest = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, True, False
        )
        assert rest[0] is dz
        return du, ddelta, dA, dB, dC, dD, dz, dbias


class Layer(torch.nn.Module):
    """Parameters of a scan, and a caller."""

    def __init__(self, dim=4, d_state=2):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(dim, d_state) - 0.1)
        self.D = torch.nn.Parameter(torch.rand(dim))
        self.bias = torch.nn.Parameter(torch.rand(dim))
        self.B = torch.nn.Linear(dim, d_state)
        self.C = torch.nn.Linear(dim, d_state)

    def forward(self, u):
        """u (batch, dim, L)."""
        B, C = (linear(u.mT).mT.unsqueeze(1).to(u.dtype).contiguous() for linear in (self.B, self.C))
        return OflexScan.apply(u, u, self.A, B, C, self.D, self.bias, True)


def make_library_op(namespace: str):
    """A scan as an op of ``torch.library``, with the fake kernels that such projects write: chunks of 2048 steps."""

    @torch.library.custom_op(f'{namespace}::scan', mutates_args=())
    def scan(
        u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
        D: torch.Tensor, bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        import selective_scan_cuda_core

        out, x, *_ = selective_scan_cuda_core.fwd(u, delta, A, B, C, D, bias, True, 1)
        return out, x

    @scan.register_fake
    def _(u, delta, A, B, C, D, bias):
        batch, dim, length = u.shape
        return torch.empty_like(u), A.new_empty((batch, dim, (length + 2047) // 2048, 2 * A.shape[1]))

    @torch.library.custom_op(f'{namespace}::scan_backward', mutates_args=())
    def scan_backward(
        dout: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
        C: torch.Tensor, D: torch.Tensor, bias: torch.Tensor, x: torch.Tensor,
    ) -> list[torch.Tensor]:  # fmt: skip
        import selective_scan_cuda_core

        return selective_scan_cuda_core.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1)

    @scan_backward.register_fake
    def _(dout, *inputs_and_x):
        return [torch.empty_like(t) for t in inputs_and_x[:7]]

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])

    def backward(ctx, dout, _):
        return tuple(scan_backward(dout.contiguous(), *ctx.saved_tensors))

    scan.register_autograd(backward, setup_context=setup_context)
    return scan
