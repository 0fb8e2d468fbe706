"""2-D rotary position tables (RoFormer, arXiv 2104.09864, applied to rows and columns)."""

import torch


def rope_table(height: int, width: int, head_dim: int, base: float = 10000.0) -> torch.Tensor:
    """Cosines and sines for the class token and a raster-ordered grid, in float32.

    Returns `(1 + height*width, head_dim/2, 2)`. The first half of the frequencies turns with the row, the second
    with the column. Row 0 belongs to the class token and is all zero, which zeroes its query and key: published
    weights were trained so.
    """
    if head_dim % 4:
        raise ValueError(f"a 2-D rotary table needs a head size divisible by 4, got {head_dim}")
    axis_dim = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, axis_dim, 2, dtype=torch.float32) / axis_dim)  # (head_dim/4,)
    rows = torch.arange(height, dtype=torch.float32)[:, None] * frequencies
    columns = torch.arange(width, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat(
        [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
    )  # (height, width, head_dim/2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros_like(table[:1]), table])


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channel pairs of `x` `(B, T, heads, head_dim)` by `table` `(T, head_dim/2, 2)`."""
    cos, sin = table[:, None].unbind(-1)  # (T, 1, head_dim/2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, head_dim/2)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).type_as(x)
