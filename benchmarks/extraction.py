"""Extraction against the published procedure: images/s, bytes on disk, and how far from the encoder's own rate.

    python -m benchmarks.extraction                                             VQ-16 at 64 px, for two CPU cores
    python -m benchmarks.extraction --image-size 256 --images 4096 --num-workers 16 --published-images 512      a GPU

The baseline is the published procedure in plain form: one image with its crops a forward pass, float32 (TF32 on GPUs),
eager, two `.npy` files an image. Both read the same files with the same (random) weights, in turn, `--repeats` times;
the time to load the tokenizer is left out of both.
"""

import argparse
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

from autoregressive.train.extract_codes_c2i import PRECISIONS, Encoder, extract, parse_args, plan_job
from dataset.code_store import store_folder
from dataset.crops import center_crop, enlarged_size
from dataset.extraction_job import Job, list_hash, open_job
from dataset.image_folder import list_image_folder
from tokenizer.tokenizer_image.load import build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel
from utils.distributed import World, init_world
from utils.program import keep_memory_between_steps

CROP_RANGE = 1.1


def main() -> None:
    args = parse_benchmark_args()
    keep_memory_between_steps()
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
    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.world = args, folder, init_world()
        self.published_images = args.published_images or args.images
        self.images = make_images(folder / "images", args.images)
        torch.manual_seed(0)
        torch.save({"model": VQ_models[args.vq_model]().state_dict()}, folder / "vq.pt")
        self.model = self.load()[0]  # the baseline's own, in the default memory format
        command = ["--data-path", self.images, "--code-path", folder / "new", "--vq-model", args.vq_model, "--vq-ckpt",
                   folder / "vq.pt", "--image-size", args.image_size, "--ten-crop", "--crop-range", CROP_RANGE,
                   "--precision", args.precision]  # fmt: skip
        command += ["--batch-size", args.batch_size] if args.batch_size else []
        flags = parse_args(list(map(str, command)))
        model, tokenizer = self.load()
        self.listed = list_image_folder(self.images)
        self.sources = [(path, 0) for path in self.listed.paths]
        target = store_folder(folder / "new", "imagenet", args.image_size)
        image_list = list_hash(self.sources)
        self.job: Job = plan_job(flags, target, self.listed, image_list, tokenizer, self.world.device)
        self.encode = Encoder(model, self.job.meta, args.precision, self.world.device)
        side = enlarged_size(args.image_size, 10, CROP_RANGE)
        self.squares = torch.randint(0, 256, (self.job.batch_images, side, side, 3), dtype=torch.uint8)
        self.squares = self.squares.to(self.world.device)

    def load(self):
        return build_tokenizer(self.args.vq_model, 16384, 8, self.folder / "vq.pt", "raw", self.world.device)

    def published(self) -> None:
        published_extraction(self.model, self.images, self.folder / "old", self.args, self.published_images, self.world)

    def here(self) -> None:
        shutil.rmtree(self.folder / "new", ignore_errors=True)
        lock, pending = open_job(self.job, self.job.folder, self.images, self.sources)
        extract(self.job, self.listed, pending, self.encode, self.args.num_workers, self.world)
        for shard in range(self.job.shards):
            self.job.join_shard(shard)
        self.job.finish(self.listed.labels)
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
        print(f"{self.args.vq_model} at {self.args.image_size} px, ten crops, {self.args.precision}, {device}, "
              f"{torch.get_num_threads()} threads, batches of {self.job.batch_images * 10} crops")  # fmt: skip
        for name, rate in rates.items():
            print(f"{name:>14}: {rate:9.2f} images/s")
        print(f"{rates['here'] / rates['published']:.2f} times the published procedure, "
              f"{rates['here'] / rates['encoder alone']:.0%} of the encoder's own rate")  # fmt: skip
        old = disk_bytes(self.folder / "old") / self.published_images
        new = disk_bytes(self.folder / "new") / self.args.images
        print(f"on disk {new:,.0f} bytes an image, published {old:,.0f}: {new / old:.1%}")


def published_extraction(model: VQModel, images: Path, output: Path, args, count: int, world: World) -> None:
    shutil.rmtree(output, ignore_errors=True)
    for name in ("codes", "labels"):
        (output / name).mkdir(parents=True)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    transform = transforms.Compose([
        transforms.Lambda(lambda image: Image.fromarray(center_crop(image, int(args.image_size * CROP_RANGE)))),
        transforms.TenCrop(args.image_size),
        transforms.Lambda(lambda crops: torch.stack([to_tensor(crop) for crop in crops])),
    ])  # fmt: skip
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    data = Subset(datasets.ImageFolder(str(images), transform), range(count))
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


def parse_benchmark_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--vq-model", default="VQ-16", choices=VQ_models, help="tokenizer")
    add("--image-size", type=int, default=64, help="pixels of a crop's side")
    add("--images", type=int, default=16, help="images a measurement")
    add("--published-images", type=int, default=None, help="images a measurement of the baseline; default: the same")
    add("--batch-size", type=int, default=None, help="crops at a time; default: that of the extraction program")
    add("--num-workers", type=int, default=2, help="decoding processes of both")
    add("--precision", choices=PRECISIONS, default="tf32", help="precision of this program's encoder")
    add("--repeats", type=int, default=3, help="measurements, of which the median counts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
