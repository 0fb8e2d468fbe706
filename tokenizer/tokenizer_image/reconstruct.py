"""Reconstruct a folder of images with a VQ tokenizer: PSNR, SSIM, LPIPS, code usage, and the .npz for rFID.

bash scripts/tokenizer/reconstruction_vq.sh --data-path IMAGES --vq-ckpt TOKENIZER.pt --vq-model VQ-16
"""

import argparse
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
from tokenizer.tokenizer_image.load import TokenizerInfo, build_tokenizer, check_image_size
from tokenizer.tokenizer_image.lpips import SMALLEST_IMAGE, load_lpips
from tokenizer.tokenizer_image.metrics import SSIM_WINDOW, ReconstructionScores
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel, to_uint8
from utils.checkpoint import WEIGHTS_CHOICES
from utils.distributed import World, init_world
from utils.engine.parallel import PRECISIONS, forbid_tf32
from utils.files import atomic_file
from utils.program import UserError, run
from utils.progress import progress

PICTURE_IMAGES = 8


def main() -> None:
    args = parse_args()
    world = init_world()
    model, tokenizer = build_tokenizer(
        args.vq_model, args.codebook_size, args.codebook_embed_dim, args.vq_ckpt, args.weights,
        world.device,
    )  # fmt: skip
    check_image_size(args.image_size, args.vq_model, model)
    folder = list_image_folder(args.data_path)
    if world.is_main:
        print(f"tokenizer: {tokenizer}")
    stores, complete = open_stores(args, folder, tokenizer, world)
    if not complete:
        scores = reconstruct(args, model, folder, stores, world)
        if world.is_main:
            save_picture(args, folder, stores[0])
            for store in reversed(stores):  # the reconstructions last: they mark the end
                store.finish(folder.labels.astype(np.int64), {"scores": scores, "images": len(folder)})
    if world.is_main:
        report(args, stores)
    world.close()


def reconstruct(args, model: VQModel, folder: ImageFolder, stores: list[ImageStore], world: World) -> dict:
    """Fill the stores with reconstructions and, if there is a second one, the images themselves; returns the scores."""
    lpips = load_lpips(args.lpips_vgg_path, args.lpips_linear_path, world) if args.lpips else None
    scores = ReconstructionScores(args.codebook_size, world.device, lpips)
    for first, images, reconstructions, codes in reconstructed_batches(args, model, folder, world):
        scores.add(images, reconstructions, codes)
        for store, batch in zip(stores, (reconstructions, images), strict=False):
            store.write(first, batch.permute(0, 2, 3, 1).cpu().numpy())
    return scores.result(world)  # a collective: afterwards every rank has written its images


@torch.no_grad()
def reconstructed_batches(
    args, model: VQModel, folder: ImageFolder, world: World
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """This rank's batches: number of the first image, (B, 3, S, S) uint8 images and reconstructions, their codes.

    Images are centre crops of `--image-size`; where `--image-size-eval` differs, both are resized to it (bicubic).
    """
    model.to(memory_format=torch.channels_last)
    batches = center_crop_batches(folder, args.image_size, args.per_proc_batch_size, args.num_workers, world)
    precision = PRECISIONS[args.precision]
    forbid_tf32()
    with progress(description="reconstruct", total=len(folder), unit="image", show=world.is_main) as bar:
        for first, pixels in batches:
            images = to_model_range(pixels.to(world.device, non_blocking=True))
            with torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
                reconstructions, _, codes = model(images)
            yield first, _pixels(images, args.image_size_eval), _pixels(reconstructions, args.image_size_eval), codes
            bar.update(min(len(pixels) * world.size, len(folder) - bar.n))


def _pixels(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 of images in [-1, 1], resized if need be."""
    if images.shape[-1] != size:
        images = F.interpolate(images.float(), size=(size, size), mode="bicubic")
    return to_uint8(images)


def open_stores(args, folder: ImageFolder, tokenizer: TokenizerInfo, world: World) -> tuple[list[ImageStore], bool]:
    """Where the reconstructions go, and the images if asked for; and whether all are there already.

    Raises `UserError` for results of another run under the same name.
    """
    settings = {
        "tokenizer": {key: value for key, value in asdict(tokenizer).items() if key != "checkpoint"},
        "images": len(folder),
        "files_sha256": files_hash(folder) if world.is_main else None,
        **{name: getattr(args, name) for name in ("data_path", "image_size", "image_size_eval", "precision", "lpips")},
    }
    sizes = f"size-{args.image_size}-size-{args.image_size_eval}"
    base = args.name or f"{args.vq_model}-{Path(args.data_path).resolve().name}-{sizes}"
    names = [base] + ([f"{base}-originals"] if args.save_originals else [])
    count, size = len(folder), args.image_size_eval
    stores = [ImageStore(Path(args.sample_dir), name, settings, count, size, "give another --name") for name in names]
    complete = None
    if world.is_main:
        there = [store.is_complete() for store in stores]  # each may refuse
        complete = all(there)
        if not complete:
            for store in stores:
                store.open(args.per_proc_batch_size)
    return stores, world.broadcast(complete)


def files_hash(folder: ImageFolder) -> str:
    """SHA-256 of every image's path and size: another folder's results are not taken for this one's."""
    return hashlib.sha256(json.dumps(file_sizes(folder)).encode()).hexdigest()


def save_picture(args, folder: ImageFolder, store: ImageStore) -> None:
    """Some images above, their reconstructions below; spread over the folder, so over its classes."""
    chosen = np.unique(np.linspace(0, len(folder) - 1, PICTURE_IMAGES).astype(np.int64))
    crops = np.stack([center_crop(load_rgb(folder.path(int(image))), args.image_size) for image in chosen])
    above = _pixels(to_model_range(torch.from_numpy(crops)), args.image_size_eval).permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(list(images), axis=1) for images in (above, store.images(chosen))]
    with atomic_file(store.preview) as file:
        Image.fromarray(np.concatenate(rows, axis=0)).save(file, "png")


def report(args, stores: list[ImageStore]) -> None:
    found = json.loads(stores[0].report.read_text())
    scores = found["scores"]
    print(
        f"{found['images']:,} images: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}, "
        + (f"LPIPS {scores['lpips']:.4f}, " if "lpips" in scores else "")
        + f"{scores['code_usage']:.1%} of {args.codebook_size:,} codes used, perplexity {scores['perplexity']:,.1f}"
    )
    print(f"{stores[0].result}, {stores[0].report}, {stores[0].preview} (images above, reconstructions below)")
    reference = stores[1].result if len(stores) > 1 else "REFERENCE.npz (--save-originals makes one)"
    print(f"next, for rFID: python3 evaluations/c2i/evaluator.py {reference} {stores[0].result}")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data-path", required=True, help="image folder: one folder per class")
    add("--dataset", choices=["imagenet"], default="imagenet", help="accepted as published: any folder of classes")
    add("--vq-model", choices=VQ_models, default="VQ-16", help="tokenizer")
    add("--vq-ckpt", required=True, help="its checkpoint: a path, or a name of pretrained_models/README.md")
    add("--codebook-size", type=int, default=16384, help="number of codes")
    add("--codebook-embed-dim", type=int, default=8, help="length of a code's vector")
    add("--weights", choices=WEIGHTS_CHOICES, default="auto", help="which weights of the checkpoint; auto: EMA if kept")
    add("--image-size", type=int, default=256, help="pixels a side of the centre crops that are encoded")
    add("--image-size-eval", type=int, help="pixels a side at which images are compared and saved; default: the same")
    add("--sample-dir", default="reconstructions", help="where results go")
    add("--name", help="of the results; default: model, folder and sizes")
    add("--save-originals", action="store_true", help="also write the crops themselves: the reference for rFID")
    add("--lpips", action="store_true", help="LPIPS, too")
    add("--lpips-vgg-path", help="torchvision's VGG-16 weights; default: fetched once, 528 MB")
    add("--lpips-linear-path", help="LPIPS 0.1's linear layers for VGG; default: fetched once, 7 KB")
    add("--per-proc-batch-size", type=int, default=32, help="images a batch and process")
    add("--precision", choices=PRECISIONS, default="none", help="of convolutions")
    add("--num-workers", type=int, default=4, help="decoding processes a rank, at most its share of the cores; 0: none")
    add("--global-seed", type=int, default=0, help="accepted as published; nothing here is random")
    args = parser.parse_args(arguments)
    args.image_size_eval = args.image_size_eval or args.image_size
    if args.image_size_eval < SSIM_WINDOW:
        raise UserError(f"--image-size-eval {args.image_size_eval} is less than SSIM's window of {SSIM_WINDOW} pixels.")
    if args.lpips and args.image_size_eval < SMALLEST_IMAGE:
        raise UserError(f"--image-size-eval {args.image_size_eval} is less than the {SMALLEST_IMAGE} pixels that "
                        "LPIPS needs; leave out --lpips.")  # fmt: skip
    if args.per_proc_batch_size < 1:
        raise UserError(f"--per-proc-batch-size must be at least 1, got {args.per_proc_batch_size}.")
    return args


if __name__ == "__main__":
    run(main)
