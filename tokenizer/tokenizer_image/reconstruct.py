"""Reconstruct a folder of images with a tokenizer: PSNR, SSIM, LPIPS, code usage, and the .npz for rFID.

bash scripts/tokenizer/reconstruction_vq.sh --data-path IMAGES --vq-ckpt TOKENIZER.pt
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from dataset.crops import center_crop, to_model_range
from dataset.image_batches import center_crop_batches
from dataset.image_folder import ImageFolder, file_sizes, list_image_folder, load_rgb
from dataset.image_store import ImageStore
from tokenizer.base import ImageTokenizer
from tokenizer.tokenizer_image.load import StandaloneTokenizerSettings, TokenizerInfo, build_tokenizer, check_image_size
from tokenizer.tokenizer_image.lpips import SMALLEST_IMAGE, LPIPSSettings, load_lpips
from tokenizer.tokenizer_image.metrics import SSIM_WINDOW, ReconstructionScores
from tokenizer.tokenizer_image.vq_model import to_uint8
from utils.commands import command
from utils.distributed import World, init_world
from utils.files import atomic_file, read_json
from utils.memory import require_memory
from utils.precision import PRECISIONS, autocast, forbid_tf32
from utils.program import run
from utils.progress import progress
from utils.settings import REQUIRED, SettingError, identity, option, parse, recipe, settings

PICTURE_IMAGES = 8
BATCH_PIXEL_BYTES = 30  # in main memory at least: images and reconstructions as bytes, and as numbers


@settings("reconstruction")
class ReconstructSettings:
    tokenizer: StandaloneTokenizerSettings
    lpips_files: LPIPSSettings
    data_path: str = recipe(REQUIRED, "image folder: one folder per class")
    dataset: str = option("imagenet", "accepted as published: any folder of classes", choices=("imagenet",))
    image_size: int = recipe(256, "pixels per side of the encoded centre crops", at_least=1)
    image_size_eval: int | None = recipe(
        None, "pixels per side of compared and saved images; default: --image-size", at_least=1
    )
    sample_dir: str = option("reconstructions", "folder of the results")
    name: str | None = option(None, "name of the results; default: tokenizer, folder, sizes")
    save_originals: bool = option(False, "also write the crops, the reference for rFID")
    lpips: bool = recipe(False, "also measure LPIPS")
    per_proc_batch_size: int = option(32, "images per batch and process", at_least=1)
    precision: str = recipe("none", "number format of convolutions", choices=PRECISIONS)
    num_workers: int = option(4, "decoding processes per rank, at most its share of the cores; 0: none", at_least=0)
    global_seed: int = option(0, "accepted as published; nothing here is random", at_least=0)

    def __post_init__(self):
        small = f"{self.eval_size} is less than"
        if self.eval_size < SSIM_WINDOW:
            raise SettingError("image_size_eval", "--image-size-eval", f"{small} SSIM's window of {SSIM_WINDOW} pixels")
        if self.lpips and self.eval_size < SMALLEST_IMAGE:
            needed = f"the {SMALLEST_IMAGE} pixels that LPIPS needs; leave out --lpips"
            raise SettingError("image_size_eval", "--image-size-eval", f"{small} {needed}")

    @property
    def eval_size(self) -> int:
        return self.image_size_eval or self.image_size


def main() -> None:
    settings = parse(ReconstructSettings, __doc__.split("\n")[0])
    world = init_world()
    model, tokenizer = build_tokenizer(settings.tokenizer, world.device)
    check_image_size(settings.image_size, tokenizer.name, tokenizer.downsample_factor)
    folder = list_image_folder(settings.data_path)
    batch, size = min(settings.per_proc_batch_size, len(folder)), max(settings.image_size, settings.eval_size)
    remedy = "use a smaller --per-proc-batch-size or --image-size"
    require_memory(batch * size**2 * BATCH_PIXEL_BYTES, f"a batch of {batch:,} images of {size:,} px", remedy)
    if world.is_main:
        print(f"tokenizer: {tokenizer}")
    stores, complete = open_stores(settings, folder, tokenizer, world)
    if not complete:
        scores = reconstruct(settings, model, folder, stores, world)
        if world.is_main:
            save_picture(settings, folder, stores[0])
            for store in reversed(stores):  # the reconstructions last: they mark the end
                store.finish(folder.labels.astype(np.int64), {"scores": scores, "images": len(folder)})
    if world.is_main:
        report(settings, stores, tokenizer)
    world.close()


def reconstruct(
    settings: ReconstructSettings, model: ImageTokenizer, folder: ImageFolder, stores: list[ImageStore], world: World
) -> dict:
    """Fill the stores with reconstructions and, if there is a second one, the images themselves; returns the scores."""
    lpips = load_lpips(settings.lpips_files, world) if settings.lpips else None
    scores = ReconstructionScores(model.codebook_size, world.device, lpips)
    for first, images, reconstructions, codes in reconstructed_batches(settings, model, folder, world):
        scores.add(images, reconstructions, codes)
        for store, batch in zip(stores, (reconstructions, images), strict=False):
            store.write(first, batch.permute(0, 2, 3, 1).cpu().numpy())
    return scores.result(world)  # a collective: afterwards every rank has written its images


@torch.no_grad()
def reconstructed_batches(
    settings: ReconstructSettings, model: ImageTokenizer, folder: ImageFolder, world: World
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """This rank's batches: number of the first image, (B, 3, S, S) uint8 images and reconstructions, their codes.

    Images are centre crops of `--image-size`; where `--image-size-eval` differs, both are resized to it (bicubic).
    """
    model.to(memory_format=torch.channels_last)
    size, batch_size = settings.image_size, settings.per_proc_batch_size
    batches = center_crop_batches(folder, size, batch_size, settings.num_workers, world)
    grid = (size // model.downsample_factor,) * 2
    forbid_tf32()
    with progress(description="reconstruct", total=len(folder), unit="image", show=world.is_main) as bar:
        for first, pixels in batches:
            images = to_model_range(pixels.to(world.device, non_blocking=True))
            with autocast(world.device, settings.precision):
                codes = model.encode_indices(images)
                reconstructions = model.decode_indices(codes.view(-1, *grid))
            yield first, _pixels(images, settings.eval_size), _pixels(reconstructions, settings.eval_size), codes
            bar.update(min(len(pixels) * world.size, len(folder) - bar.n))


def _pixels(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 of images in [-1, 1], resized if need be."""
    if images.shape[-1] != size:
        images = F.interpolate(images.float(), size=(size, size), mode="bicubic")
    return to_uint8(images)


def open_stores(
    settings: ReconstructSettings, folder: ImageFolder, tokenizer: TokenizerInfo, world: World
) -> tuple[list[ImageStore], bool]:
    """Where the reconstructions go, and the images if asked for; and whether all are there already.

    Raises `UserError` for results of another run under the same name.
    """
    count, size, files_hash = len(folder), settings.eval_size, None
    if world.is_main:  # of paths and sizes: another folder's results are not taken for this one's
        files_hash = hashlib.sha256(json.dumps(file_sizes(folder)).encode()).hexdigest()
    decisive = identity(settings) | {
        "tokenizer": {key: value for key, value in asdict(tokenizer).items() if key != "checkpoint"},
        "image_size_eval": size,
        "images": count,
        "files_sha256": files_hash,
    }
    sizes = f"size-{settings.image_size}-size-{size}"
    base = settings.name or f"{tokenizer.label}-{Path(settings.data_path).resolve().name}-{sizes}"
    names = [base] + ([f"{base}-originals"] if settings.save_originals else [])
    place = Path(settings.sample_dir)
    stores = [ImageStore(place, name, decisive, count, size, "give another --name") for name in names]
    complete = None
    if world.is_main:
        there = [store.is_complete() for store in stores]  # each may refuse
        complete = all(there)
        if not complete:
            for store in stores:
                store.open(settings.per_proc_batch_size, keep=False)  # all are made again, for their scores
    return stores, world.broadcast(complete)


def save_picture(settings: ReconstructSettings, folder: ImageFolder, store: ImageStore) -> None:
    """Some images above, their reconstructions below; spread over the folder, so over its classes."""
    chosen = np.unique(np.linspace(0, len(folder) - 1, PICTURE_IMAGES).astype(np.int64))
    crops = np.stack([center_crop(load_rgb(folder.path(int(image))), settings.image_size) for image in chosen])
    above = _pixels(to_model_range(torch.from_numpy(crops)), settings.eval_size).permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(images), axis=1) for images in (above, store.images(chosen))]
    with atomic_file(store.preview) as file:
        Image.fromarray(np.concatenate(rows, axis=0)).save(file, "png")


def report(settings: ReconstructSettings, stores: list[ImageStore], tokenizer: TokenizerInfo) -> None:
    found = read_json(stores[0].report, f"move {stores[0].result} away", "scores", "images")
    scores = found["scores"]
    print(
        f"{found['images']:,} images: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}, "
        + (f"LPIPS {scores['lpips']:.4f}, " if "lpips" in scores else "")
        + f"{scores['code_usage']:.1%} of {tokenizer.codebook_size:,} codes used, "
        f"perplexity {scores['perplexity']:,.1f}"
    )
    print(f"{stores[0].result}, {stores[0].report}, {stores[0].preview} (images above, reconstructions below)")
    resized = settings.eval_size != settings.image_size
    if len(stores) > 1:
        reference, size = stores[1].result, None
    else:
        reference, size = ("REFERENCE.npz", None) if resized else (Path(settings.data_path), settings.image_size)
    told = "   # --save-originals makes REFERENCE.npz" if reference == "REFERENCE.npz" else ""
    print(f"next: {command('evaluate.sh', reference, stores[0].result, image_size=size)}{told}")


if __name__ == "__main__":
    run(main)
