"""Samples one picture: rows of images of chosen classes.

    bash scripts/autoregressive/sample_one_c2i.sh --gpt-model GPT-B --gpt-ckpt npp/c2i_B_256.pt \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 256 --classes "golden retriever,red panda" --columns 4
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from autoregressive.sample.class_names import class_names, parse_classes
from autoregressive.sample.options import add_model_options, add_sampling_options, check_options, sampling_of
from autoregressive.sample.pictures import captioned_rows
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.seeds import image_uniforms
from utils.files import atomic_file
from utils.program import UserError, run
from utils.progress import progress

BATCH_SIZE = {"cpu": 8, "cuda": 64}


def main() -> None:
    args = parse_arguments()
    sampling = sampling_of(args)
    pipeline = Pipeline(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(pipeline.describe(), flush=True)
    names = class_names(args.num_classes, pipeline.gpt_info.class_names)
    labels = parse_classes(args.classes, names) if args.classes else default_classes(args.num_classes)
    images = sample_rows(pipeline, labels, args, sampling)
    picture = captioned_rows(images, [f"{label} {names[label]}" if names[label] != str(label) else names[label]
                                      for label in labels])  # fmt: skip
    with atomic_file(args.output) as file:
        picture.save(file, format="png")
    print(f"picture: {args.output}\nnext: 50,000 images for FID with scripts/autoregressive/sample_c2i.sh")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add_model_options(parser)
    add_sampling_options(parser, cfg_scale=4.0, top_k=2000)
    group = parser.add_argument_group("picture")
    group.add_argument("--classes", help="labels or names, separated by commas (default: eight of them)")
    group.add_argument("--columns", type=int, default=1, help="images of each class, in its row")
    group.add_argument("--seed", type=int, default=0, help="another seed, other images")
    group.add_argument("--output", type=Path, default=Path("sample_c2i.png"), help="the picture")
    args = parser.parse_args()
    check_options(args)
    if args.columns < 1:
        raise UserError(f"--columns {args.columns} must be at least 1.")
    return args


def default_classes(num_classes: int) -> list[int]:
    """The published eight of ImageNet, or eight spread over the classes."""
    if num_classes == 1000:
        return [207, 360, 387, 974, 88, 979, 417, 279]
    return sorted({int(label) for label in np.linspace(0, num_classes - 1, 8)})


def sample_rows(pipeline: Pipeline, labels: list[int], args: argparse.Namespace, sampling) -> np.ndarray:
    """Images `(classes, columns, H, W, 3)` uint8. Every image has its own uniform numbers, of its class and place."""
    wanted = np.repeat(labels, args.columns)
    streams = np.concatenate(
        [
            label * 2**32 + labels[:row].count(label) * args.columns + np.arange(args.columns)
            for row, label in enumerate(labels)
        ]
    )  # a class named again: other images
    batch_size = min(BATCH_SIZE[pipeline.device.type], len(wanted))
    generator = pipeline.generator(batch_size, sampling)
    images = []
    with progress(description="sample", total=len(wanted), unit="image") as bar:
        for start in range(0, len(wanted), batch_size):
            batch = np.resize(
                np.arange(start, min(start + batch_size, len(wanted))), batch_size
            )  # the last is filled up
            uniforms = image_uniforms(streams[batch], generator.length, args.seed)
            codes = generator(torch.from_numpy(wanted[batch]), torch.from_numpy(uniforms))
            count = min(batch_size, len(wanted) - start)
            images.append(pipeline.decode(codes)[:count])
            bar.update(count)
    if not generator.finite:
        raise UserError("the model's logits are not finite; give --precision bf16 or none, or another checkpoint.")
    return np.concatenate(images).reshape(len(labels), args.columns, *images[0].shape[1:])


if __name__ == "__main__":
    run(main)
