"""What the Python interface is given: the device to draw on, and codes to decode."""

import torch

from utils.program import UserError


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that is named, or a GPU if there is one. Raises `UserError` for one that is not here."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"there is no device {device!r}; give 'cpu', 'cuda' or 'cuda:1'.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device must be 'cpu' or 'cuda', not {chosen.type!r}.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"PyTorch finds no GPU for the device {str(chosen)!r}; give device='cpu'.")
    return chosen


def as_codes(codes, length: int, codebook_size: int) -> torch.Tensor:
    """`codes`, a tensor, an array or lists, as a tensor `(B, length)` int64. Raises `UserError` for anything else."""
    wanted = f"whole numbers from 0 to {codebook_size - 1}, {length} for each image"
    try:
        codes = torch.as_tensor(codes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"codes are a tensor or an array (images, {length}) of {wanted}.") from error
    if codes.is_floating_point() or codes.is_complex() or codes.dtype is torch.bool:
        raise UserError(f"codes are {wanted}, not {str(codes.dtype).removeprefix('torch.')}.")
    if codes.dim() != 2 or codes.shape[1] != length or not len(codes):
        raise UserError(f"codes have the shape (images, {length}), not {tuple(codes.shape)}.")
    codes = codes.long()
    least, most = codes.min().item(), codes.max().item()
    if least < 0 or most >= codebook_size:
        raise UserError(f"codes are {wanted}; these reach from {least} to {most}.")
    return codes
