"""Extraction against the published procedure: images/s, bytes on disk, and how far from the encoder's own rate.

    python -m benchmarks.extraction                                             VQ-16 at 64 px, for two CPU cores
    python -m benchmarks.extraction --image-size 256 --images 4096 --num-workers 16 --published-images 512      a GPU

The baseline is the published procedure in plain form: one image with its crops a forward pass, float32 (TF32 on GPUs),
eager, two `.npy` files per image. Both read the same files with the same (random) weights, in turn, `--repeats` times;
the time to load the tokenizer is left out of both.
"""

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from autoregressive.train.extract_codes_c2i import Encoder, ExtractionSettings, extract, join_shards, plan_job
from dataset.crops import center_crop, enlarged_size
from dataset.extraction_job import Job, list_hash, open_job
from dataset.image_folder import list_image_folder
from tokenizer.tokenizer_image.load import StandaloneTokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.distributed import World, init_world
from utils.program import run
from utils.settings import parse, recipe, settings

CROP_RANGE = 1.1


@settings("benchmark")
class ExtractionBenchmark:
    vq_model: str = recipe("VQ-16", "tokenizer", choices=VQ_models)
    image_size: int = recipe(64, "side of a crop in pixels", at_least=1)
    images: int = recipe(16, "images per measurement", at_least=1)
    published_images: int | None = recipe(None, "images per measurement of the baseline; default: the same", at_least=1)
    batch_size: int | None = recipe(None, "crops at a time; default: that of the extraction program", at_least=1)
    num_workers: int = recipe(2, "decoding processes of both", at_least=0)
    precision: str = recipe("tf32", "number format of this program's encoder", choices=("none", "tf32", "bf16"))
    repeats: int = recipe(3, "measurements, of which the median counts", at_least=1)


def main() -> None:
    args = parse(ExtractionBenchmark, __doc__.split("\n")[0])
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(args, Path(name))
        seconds = {"published": [], "here": [], "encoder alone": []}
        for repeat in range(args.repeats + 1):
            times = {
                "published": timed(bench.published) / bench.published_images,
                "here": timed(bench.here) / args.images,
                "encoder alone": timed(bench.encoder_alone) / args.images,
            }
            for name, value in times.items() if repeat else ():  # the first time warms up
                seconds[name].append(value)
        bench.report({name: 1 / float(np.median(values)) for name, values in seconds.items()})


class Bench:
    def __init__(self, args: ExtractionBenchmark, folder: Path):
        self.args, self.folder, self.world = args, folder, init_world()
        self.published_images = args.published_images or args.images
        self.images = make_images(folder / "images", args.images)
        torch.manual_seed(0)
        torch.save({"model": VQ_models[args.vq_model]().state_dict()}, folder / "vq.pt")
        chosen = StandaloneTokenizerSettings(str(folder / "vq.pt"), args.vq_model)
        self.model, _ = build_tokenizer(chosen, self.world.device)  # the baseline's own, in the default memory format
        tokenizer, info = build_tokenizer(chosen, self.world.device)
        asked = ExtractionSettings(
            chosen,
            data_path=self.images,
            code_path=folder / "new",
            image_size=args.image_size,
            ten_crop=True,
            crop_range=CROP_RANGE,
            batch_size=args.batch_size,
            precision=args.precision,
        )
        self.listed = list_image_folder(self.images)
        self.sources = [(path, 0) for path in self.listed.paths]
        settled, image_list = asked.settled(self.world.device), list_hash(self.sources)
        self.job: Job = plan_job(settled, info, self.listed, image_list, self.world.device)
        self.encode = Encoder(tokenizer, self.job.meta, self.world.device)
        side = enlarged_size(args.image_size, 10, CROP_RANGE)
        self.squares = torch.randint(0, 256, (self.job.batch_images, side, side, 3), dtype=torch.uint8)
        self.squares = self.squares.to(self.world.device)

    def published(self) -> None:
        published_extraction(self.model, self.images, self.folder / "old", self.args, self.published_images, self.world)

    def here(self) -> None:
        shutil.rmtree(self.folder / "new", ignore_errors=True)
        lock, pending = open_job(self.job, self.listed, self.sources)
        extract(self.job, self.listed, pending, self.encode, self.args.num_workers, self.world)
        self.job.finish(self.listed.labels, join_shards(self.job, self.world))
        lock.close()

    def encoder_alone(self) -> None:
        batches = -(-self.args.images // self.job.batch_images)
        threads = 1 if self.world.device.type == "cuda" else torch.get_num_threads()
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads) as pool:
            for codes in pool.map(self.encode, [self.squares] * batches):
                del codes
        torch.set_num_threads(threads)

    def report(self, rates: dict[str, float]) -> None:
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "CPU"
        print(
            f"{self.args.vq_model} at {self.args.image_size} px, ten crops, {self.args.precision}, {device}, "
            f"{torch.get_num_threads()} threads, batches of {self.job.batch_images * 10} crops"
        )
        for name, rate in rates.items():
            print(f"{name:>14}: {rate:9.2f} images/s")
        print(
            f"{rates['here'] / rates['published']:.2f} times the published procedure, "
            f"{rates['here'] / rates['encoder alone']:.0%} of the encoder's own rate"
        )
        old = disk_bytes(self.folder / "old") / self.published_images
        new = disk_bytes(self.folder / "new") / self.args.images
        print(f"on disk {new:,.0f} bytes per image, published {old:,.0f}: {new / old:.1%}")


def published_extraction(
    model: VQModel, images: Path, output: Path, args: ExtractionBenchmark, count: int, world: World
) -> None:
    shutil.rmtree(output, ignore_errors=True)
    for name in ("codes", "labels"):
        (output / name).mkdir(parents=True)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    steps = [
        transforms.Lambda(lambda image: Image.fromarray(center_crop(image, int(args.image_size * CROP_RANGE)))),
        transforms.TenCrop(args.image_size),
        transforms.Lambda(lambda crops: torch.stack([to_tensor(crop) for crop in crops])),
    ]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    data = Subset(datasets.ImageFolder(str(images), transforms.Compose(steps)), range(count))
    for number, (crops, label) in enumerate(DataLoader(data, batch_size=1, num_workers=args.num_workers)):
        with torch.no_grad():
            _, _, (_, _, indices) = model.encode(crops.flatten(0, 1).to(world.device))
        np.save(output / "codes" / f"{number}.npy", indices.reshape(1, crops.shape[1], -1).cpu().numpy())
        np.save(output / "labels" / f"{number}.npy", label.numpy())
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
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


def timed(work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
