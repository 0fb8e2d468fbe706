"""Next Patch Prediction (arXiv 2412.15321): codes to patches, and embeddings to their patches' means.

The model's input at patch side `s` is the mean of the `s*s` token embeddings of each patch, and its target is the
same `s*s` codes, so both start from `patch_codes`.
"""

import torch


def check_patch_side(grid: tuple[int, int], side: int) -> None:
    """Raise `ValueError` unless square patches of `side` codes tile the `(height, width)` grid."""
    height, width = grid
    if side < 1 or height % side or width % side:
        raise ValueError(f"patches of {side}x{side} codes do not tile a grid of {height}x{width} codes")


def patch_codes(codes: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """Group `codes` `(B, H*W)` into patches `(B, H*W/side**2, side**2)`, raster order of patches and inside them."""
    if side == 1:
        return codes.unsqueeze(-1)
    height, width = grid
    blocks = codes.view(-1, height // side, side, width // side, side)
    return blocks.transpose(2, 3).reshape(codes.shape[0], -1, side * side)


def patch_embeddings(embeddings: torch.Tensor) -> torch.Tensor:
    """Mean embedding of each patch: `(B, N, k, D)` -> `(B, N, D)`."""
    return embeddings.mean(2)
