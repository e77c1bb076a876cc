"""Cross-scan and cross-merge by PyTorch indexing: the truth the other backends are held to."""

import torch

from .routes import ROUTES


def cross_scan(x: torch.Tensor, scan_mode: str, channel_last: bool) -> torch.Tensor:
    """Unfold a map along four routes; arguments as in :func:`mmvmamba.ops.cross_scan`."""
    if channel_last:
        x = x.permute(0, 3, 1, 2)
    routes = []
    for column_major, reverse in ROUTES[scan_mode]:
        route = (x.transpose(2, 3) if column_major else x).flatten(2)
        routes.append(route.flip(-1) if reverse else route)
    if channel_last:
        return torch.stack([route.transpose(1, 2) for route in routes], dim=2)
    return torch.stack(routes, dim=1)


def cross_merge(y: torch.Tensor, size: tuple, scan_mode: str, channel_last: bool) -> torch.Tensor:
    """Fold four routes back and add them; arguments as in :func:`mmvmamba.ops.cross_merge`."""
    if channel_last:
        y = y.permute(0, 2, 3, 1)
    height, width = size
    # half-precision routes are added in float32, as the compiled backends do
    routes = []
    for k, (column_major, reverse) in enumerate(ROUTES[scan_mode]):
        route = y[:, k].to(torch.promote_types(y.dtype, torch.float32))
        route = route.flip(-1) if reverse else route
        if column_major:
            route = route.unflatten(-1, (width, height)).transpose(-1, -2)
        else:
            route = route.unflatten(-1, (height, width))
        routes.append(route)
    total = (routes[0] + routes[1] + routes[2] + routes[3]).to(y.dtype)
    return (total.permute(0, 2, 3, 1) if channel_last else total).contiguous()
