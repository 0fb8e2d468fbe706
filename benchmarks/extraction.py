"""Extraction against the published procedure: images/s, bytes on disk, and how far from the encoder's own rate.

    python -m benchmarks.extraction                                             VQ-16 at 64 px, for two CPU cores
    python -m benchmarks.extraction --image-size 256 --images 2048 --num-workers 16 --published-images 256      a GPU

Published: one image with its crops a forward pass of benchmarks/published_tokenizer.py, float32 (TF32 on GPUs), eager,
two `.npy` files per image. Both read the same files with the same (random) weights, in turn, `--repeats` times; the
time to load the tokenizer is left out of both. The floor is the rate of our encoder alone, on images in memory.
"""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from autoregressive.train.extract_codes_c2i import Encoder, ExtractionSettings, extract, join_shards, plan_job
from benchmarks.machine import alternate, chosen_device, describe
from benchmarks.published_tokenizer import as_published
from benchmarks.report import MeasurementSettings, Rows
from dataset.crops import center_crop, enlarged_size
from dataset.extraction_job import Job, list_hash, open_job
from dataset.image_folder import list_image_folder
from tokenizer.tokenizer_image.load import StandaloneTokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.distributed import World
from utils.program import run
from utils.settings import option, parse, recipe, settings

CROP_RANGE = 1.1


@settings("extraction benchmark")
class ExtractionBenchmark:
    measurement: MeasurementSettings
    vq_model: str = recipe("VQ-16", "tokenizer", choices=VQ_models)
    image_size: int = recipe(64, "side of a crop in pixels", at_least=1)
    images: int = recipe(16, "images per measurement", at_least=1)
    published_images: int | None = recipe(
        None, "images per measurement of the published (default: the same)", at_least=1
    )
    batch_size: int | None = recipe(None, "crops at a time; default: that of the extraction program", at_least=1)
    num_workers: int = recipe(2, "decoding processes of both", at_least=0)
    precisions: tuple[str, ...] = recipe(("tf32",), "number formats here", choices=("none", "tf32", "bf16"))
    repeats: int = option(3, "measurements, of which the median counts", at_least=1)


def main() -> None:
    args = parse(ExtractionBenchmark, __doc__.split("\n")[0])
    device = chosen_device(args.measurement.device)
    title = f"{args.vq_model} at {args.image_size} px, ten crops, {describe(device)}"
    rows = Rows(args.measurement.json, title)
    for number, precision in enumerate(args.precisions):
        with tempfile.TemporaryDirectory() as name:
            Bench(args, precision, Path(name), device).measure(rows, published=number == 0)


class Bench:
    def __init__(self, args: ExtractionBenchmark, precision: str, folder: Path, device: torch.device):
        self.args, self.precision, self.folder, self.world = args, precision, folder, World(0, 1, 0, device)
        self.published_images = args.published_images or args.images
        self.images = make_images(folder / "images", args.images)
        torch.manual_seed(0)
        torch.save({"model": VQ_models[args.vq_model]().state_dict()}, folder / "vq.pt")
        chosen = StandaloneTokenizerSettings(str(folder / "vq.pt"), args.vq_model)
        self.model = as_published(build_tokenizer(chosen, device)[0])
        tokenizer, info = build_tokenizer(chosen, device)
        asked = ExtractionSettings(
            chosen,
            data_path=self.images,
            code_path=folder / "new",
            image_size=args.image_size,
            ten_crop=True,
            crop_range=CROP_RANGE,
            batch_size=args.batch_size,
            precision=precision,
        )
        self.listed = list_image_folder(self.images)
        self.sources = [(path, 0) for path in self.listed.paths]
        self.job: Job = plan_job(asked.settled(device), info, self.listed, list_hash(self.sources), device)
        self.encode = Encoder(tokenizer, self.job.meta, device)
        side = enlarged_size(args.image_size, 10, CROP_RANGE)
        self.squares = torch.randint(0, 256, (self.job.batch_images, side, side, 3), dtype=torch.uint8, device=device)

    def measure(self, rows: Rows, published: bool) -> None:
        args, published = self.args, published and find_spec("torchvision") is not None
        ways = {"here": self.here, "encoder alone": self.encoder_alone} | (
            {"published": self.published} if published else {}
        )
        counts = {"published": self.published_images, "here": args.images, "encoder alone": self.resident_images}
        times = alternate(ways, self.world.device, args.repeats)
        rates = {name: counts[name] / float(np.median(values)) for name, values in times.items()}
        new, old = self.folder / "new", self.folder / "old"
        rows.add(
            f"extraction {args.vq_model}, {args.image_size} px, ten crops, {self.precision}",
            rates["here"],
            "images/s",
            rates.get("published"),
            rates["encoder alone"],
            bytes_per_image=disk_bytes(new) / args.images,
            published_bytes=disk_bytes(old) / self.published_images if published else None,
            crops_at_a_time=self.job.batch_images * 10,
            published_is_left_out=None if find_spec("torchvision") else "its transforms need torchvision",
        )

    def published(self) -> None:
        published_extraction(self.model, self.images, self.folder / "old", self.args, self.published_images, self.world)

    def here(self) -> None:
        shutil.rmtree(self.folder / "new", ignore_errors=True)
        lock, pending = open_job(self.job, self.listed, self.sources)
        extract(self.job, self.listed, pending, self.encode, self.args.num_workers, self.world)
        self.job.finish(self.listed.labels, join_shards(self.job, self.world))
        lock.close()

    @property
    def resident_images(self) -> int:
        """Whole batches of them, at least as many as are extracted."""
        return -(-self.args.images // self.job.batch_images) * self.job.batch_images

    def encoder_alone(self) -> None:
        batches = self.resident_images // self.job.batch_images
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with ThreadPoolExecutor(1 if self.world.device.type == "cuda" else threads) as pool:
            for codes in pool.map(self.encode, [self.squares] * batches):
                del codes
        torch.set_num_threads(threads)


class PublishedImages(Dataset):
    """Image and label as torchvision's ImageFolder and the public transforms give them: ten crops (10, 3, S, S)."""

    def __init__(self, folder: Path, size: int):
        from torchvision import datasets, transforms

        self.size, self.images = size, datasets.ImageFolder(str(folder))
        self.ten_crop, self.to_tensor = transforms.TenCrop(size), transforms.ToTensor()
        self.normalize = transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3, inplace=True)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[number]
        square = Image.fromarray(center_crop(image, int(self.size * CROP_RANGE)))
        return self.normalize(torch.stack([self.to_tensor(crop) for crop in self.ten_crop(square)])), label


@torch.no_grad()
def published_extraction(
    model: VQModel, images: Path, output: Path, args: ExtractionBenchmark, count: int, world: World
) -> None:
    shutil.rmtree(output, ignore_errors=True)
    for name in ("codes", "labels"):
        (output / name).mkdir(parents=True)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = False, True
    torch.backends.cuda.matmul.allow_tf32 = True
    data, on_gpu = Subset(PublishedImages(images, args.image_size), range(count)), world.device.type == "cuda"
    for number, (crops, label) in enumerate(DataLoader(data, 1, num_workers=args.num_workers, pin_memory=on_gpu)):
        crops, label = crops.to(world.device), label.to(world.device)
        _, _, (_, _, indices) = model.encode(crops.flatten(0, 1))
        np.save(output / "codes" / f"{number}.npy", indices.reshape(1, crops.shape[1], -1).cpu().numpy())
        np.save(output / "labels" / f"{number}.npy", label.cpu().numpy())
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.matmul.allow_tf32 = False


def make_images(folder: Path, count: int) -> Path:
    """JPEGs of 500×375, ImageNet's commonest size, with smooth contents."""
    rng = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for number in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8))
        colours.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "class" / f"{number:06d}.jpg", quality=90)
    return folder


def disk_bytes(folder: Path) -> int:
    """Allocated blocks of all files."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    run(main)
