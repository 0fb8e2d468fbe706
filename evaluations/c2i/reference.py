"""Reference files: images with the statistics of a (usually larger) set, as ADM publishes or made from own data."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from evaluations.c2i.metrics import Gaussian
from evaluations.c2i.npz import ImageSet
from utils.files import atomic_file
from utils.program import UserError

POOL_NAMES, SPATIAL_NAMES = ("mu", "sigma"), ("mu_s", "sigma_s")
NETWORK_NAME = "feature_network"  # SHA-256 of the network's file, in references written here


def read_statistics(
    images: ImageSet, dimensions: tuple[int, int], network: str, device: torch.device
) -> tuple[Gaussian | None, Gaussian | None]:
    """Precomputed statistics of pool and spatial features, None where the file has none.

    `UserError` if they have another width than the `dimensions` of pool and spatial features, are not finite, or were
    written for another network than that with the hash `network`.
    """
    made_with = images.array(NETWORK_NAME)
    if made_with is not None and str(made_with) != network:
        raise UserError(f"the statistics in {images.path} were made with another feature network; use that one, or "
                        "make new ones with --save-stats.")  # fmt: skip
    pool, spatial = (
        _gaussian(images, names, size, device)
        for names, size in zip((POOL_NAMES, SPATIAL_NAMES), dimensions, strict=True)
    )
    return pool, spatial


def write_reference(path: Path, images: ImageSet, keep: int, gaussians: list[Gaussian], network: str) -> None:
    """Write `keep` evenly spaced images as arr_0, with the statistics of pool and spatial features."""
    keep = min(keep, images.count)
    wanted = np.linspace(0, images.count - 1, keep).round().astype(np.int64)
    header = {"descr": "|u1", "fortran_order": False, "shape": (keep, images.height, images.width, 3)}
    arrays = {NETWORK_NAME: np.array(network)}
    for names, gaussian in zip((POOL_NAMES, SPATIAL_NAMES), gaussians, strict=True):
        arrays |= {names[0]: gaussian.mean.cpu().numpy(), names[1]: gaussian.covariance.cpu().numpy()}
    with atomic_file(path) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, header)
            start = 0
            for batch in images.batches(256):
                inside = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
                file.write(batch[inside].tobytes())
                start += len(batch)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _gaussian(images: ImageSet, names: tuple[str, str], size: int, device: torch.device) -> Gaussian | None:
    mean, covariance = (images.array(name) for name in names)
    if mean is None or covariance is None:
        return None
    for name, array, shape in ((names[0], mean, (size,)), (names[1], covariance, (size, size))):
        if array.dtype.kind != "f" or array.shape != shape:
            raise UserError(f"{name} of {images.path} is {array.dtype} {array.shape}, but the feature network needs "
                            f"floats of shape {shape}; the reference belongs to another network.")  # fmt: skip
        if not np.isfinite(array).all():
            raise UserError(f"{name} of {images.path} holds NaN or infinite numbers; get or make the file again.")
    return Gaussian(*(torch.from_numpy(np.array(array, np.float64)).to(device) for array in (mean, covariance)))
