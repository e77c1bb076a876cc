"""Sequences of a map's pixels: values that each route has of its own, in the order of the route and back."""

import torch

from ..cross_scan.routes import ROUTES


def scan_pixels(value: torch.Tensor, size: tuple, scan_mode: str) -> torch.Tensor:
    """Order the pixels of each route as the route visits them.

    Args:
        value (Tensor): (B, L, K, ...), pixels of a map in row-major order, for each of K = 4 routes.
        size (tuple[int]): (H, W) of the map, with H * W = L.
        scan_mode (str): A mode of :func:`mmvmamba.ops.cross_scan`.

    Returns:
        Tensor: (B, L, K, ...), where step t of route k is the pixel that the route visits then.
    """
    routes = []
    for k, (column_major, reverse) in enumerate(ROUTES[scan_mode]):
        route = value[:, :, k]
        if column_major:
            route = route.unflatten(1, size).transpose(1, 2).flatten(1, 2)
        routes.append(route.flip(1) if reverse else route)
    return torch.stack(routes, dim=2)


def restore_pixels(value: torch.Tensor, size: tuple, scan_mode: str) -> torch.Tensor:
    """The inverse of :func:`scan_pixels`."""
    height, width = size
    routes = []
    for k, (column_major, reverse) in enumerate(ROUTES[scan_mode]):
        route = value[:, :, k].flip(1) if reverse else value[:, :, k]
        if column_major:
            route = route.unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2)
        routes.append(route)
    return torch.stack(routes, dim=2)


def scan_inputs(x, dt, B, C, size, scan_mode) -> tuple:
    """Sequences for the K routes of a map from what :func:`mmvmamba.ops.ssd_scan` takes with ``size``.

    Returns:
        tuple[Tensor]: x (B, L, K heads, P), dt (B, L, K heads), B and C (B, L, K, N), each in the order of its route.
    """
    routes = len(ROUTES[scan_mode])
    x = scan_pixels(x.unsqueeze(2).expand(-1, -1, routes, -1, -1), size, scan_mode).flatten(2, 3)
    dt = scan_pixels(dt.unflatten(2, (routes, -1)), size, scan_mode).flatten(2, 3)
    return x, dt, scan_pixels(B, size, scan_mode), scan_pixels(C, size, scan_mode)


def merge(out: torch.Tensor, size: tuple, scan_mode: str) -> torch.Tensor:
    """Add the outputs of the routes, (B, L, K heads, P), at their pixels, (B, L, heads, P)."""
    return restore_pixels(out.unflatten(2, (len(ROUTES[scan_mode]), -1)), size, scan_mode).sum(2)
