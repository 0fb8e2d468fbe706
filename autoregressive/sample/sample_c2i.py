"""Samples one picture: rows of images of chosen classes.

    bash scripts/autoregressive/sample_one_c2i.sh --gpt-model GPT-B --gpt-ckpt npp/c2i_B_256.pt \\
        --vq-ckpt vq_ds16_c2i.pt --image-size 256 --classes "golden retriever,red panda" --columns 4
"""

from pathlib import Path

import numpy as np
import torch

from autoregressive.models.load import GPTSettings
from autoregressive.models.sampling import Sampling
from autoregressive.sample.class_names import caption, class_names, parse_classes
from autoregressive.sample.pictures import captioned_rows
from autoregressive.sample.pipeline import ComputeSettings, Pipeline
from autoregressive.sample.seeds import image_uniforms
from tokenizer.tokenizer_image.load import TokenizerSettings
from utils.commands import absolute_component, command
from utils.files import atomic_file
from utils.program import UserError, run
from utils.progress import progress
from utils.settings import MAX_SEED, option, parse, recipe, settings, with_defaults

BATCH_SIZE = {"cpu": 8, "cuda": 64}


@settings("picture")
class PictureSettings:
    gpt: GPTSettings
    tokenizer: TokenizerSettings
    compute: ComputeSettings
    sampling: with_defaults(Sampling, cfg_scale=4.0, top_k=2000, draw="gumbel")
    classes: str | None = recipe(None, "labels or names, separated by commas (default: eight of them)")
    columns: int = recipe(1, "images of each class, in its row", at_least=1)
    seed: int = recipe(0, "another seed, other images", at_least=0, at_most=MAX_SEED)
    output: Path = option(Path("sample_c2i.png"), "file of the picture")


def main() -> None:
    chosen = parse(PictureSettings, __doc__.split("\n")[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Pipeline(chosen.gpt, chosen.tokenizer, chosen.compute, device)
    print(pipeline.describe(), flush=True)
    names = class_names(pipeline.num_classes, pipeline.gpt_info.class_names)
    labels = parse_classes(chosen.classes, names) if chosen.classes else default_classes(pipeline.num_classes)
    images = sample_rows(pipeline, labels, chosen.columns, chosen.seed, chosen.sampling)
    picture = captioned_rows(images, [caption(label, names) for label in labels])
    with atomic_file(chosen.output) as file:
        picture.save(file, format="png")
    print(f"picture: {chosen.output}\nnext: {next_command(chosen, pipeline)}")


def next_command(chosen: PictureSettings, pipeline: Pipeline) -> str:
    """Images to score, of the same models."""
    gpt, tokenizer = chosen.gpt, chosen.tokenizer
    return command(
        "autoregressive/sample_c2i.sh",
        gpt_ckpt=Path(pipeline.gpt_info.checkpoint),
        vq_ckpt=Path(pipeline.tokenizer_info.checkpoint),
        vq_model=tokenizer.vq_model and absolute_component(tokenizer.vq_model),
        codebook_size=tokenizer.codebook_size,
        codebook_embed_dim=tokenizer.codebook_embed_dim,
        conditioning=gpt.conditioning and absolute_component(gpt.conditioning),
        conditions=gpt.conditions and Path(gpt.conditions),
        gpt_model=gpt.gpt_model,
        num_classes=gpt.num_classes,
        image_size=pipeline.image_size,
        image_size_eval=pipeline.image_size,
        vq_weights=pipeline.tokenizer_info.weights,
        weights=pipeline.gpt_info.weights,
    )


def default_classes(num_classes: int) -> list[int]:
    """The published eight of ImageNet, or eight spread over the classes."""
    if num_classes == 1000:
        return [207, 360, 387, 974, 88, 979, 417, 279]
    return sorted({int(label) for label in np.linspace(0, num_classes - 1, 8)})


def sample_rows(pipeline: Pipeline, labels: list[int], columns: int, seed: int, sampling: Sampling) -> np.ndarray:
    """Images `(classes, columns, H, W, 3)` uint8. Every image has its own uniform numbers, of its class and place."""
    wanted = np.repeat(labels, columns)
    first = [labels[:row].count(label) * columns for row, label in enumerate(labels)]  # named again: other images
    streams = wanted * 2**32 + np.repeat(first, columns) + np.tile(np.arange(columns), len(labels))
    batch_size = min(BATCH_SIZE[pipeline.device.type], len(wanted))
    generator = pipeline.generator(batch_size, sampling)
    images = []
    with progress(description="sample", total=len(wanted), unit="image") as bar:
        for start in range(0, len(wanted), batch_size):
            count = min(batch_size, len(wanted) - start)
            batch = np.resize(np.arange(start, start + count), batch_size)  # the last one is filled up
            uniforms = image_uniforms(streams[batch], generator.length, seed)
            codes = generator(pipeline.condition(wanted[batch]), torch.from_numpy(uniforms))
            images.append(pipeline.decode(codes)[:count])
            bar.update(count)
    if not generator.finite:
        raise UserError("the model's logits are not finite; give --precision bf16 or none, or another checkpoint.")
    return np.concatenate(images).reshape(len(labels), columns, *images[0].shape[1:])


if __name__ == "__main__":
    run(main)
