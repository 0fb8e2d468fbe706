"""Samples one picture: rows of images of chosen classes.

    bash scripts/autoregressive/sample_one_c2i.sh --gpt-model GPT-B --gpt-ckpt npp/c2i_B_256.pt \\
        --image-size 256 --classes "golden retriever,red panda" --columns 4
"""

from pathlib import Path

import numpy as np
import torch

from autoregressive.models.load import GPTSettings
from autoregressive.sample.class_names import caption, parse_classes
from autoregressive.sample.editing import MOST_CANDIDATES, open_picture
from autoregressive.sample.pictures import captioned_rows
from autoregressive.sample.pipeline import ComputeSettings, PictureSampling, Pipeline, SamplerTokenizerSettings
from utils.commands import absolute_component, command
from utils.files import atomic_file, refuse_as_output
from utils.program import run
from utils.progress import progress
from utils.settings import MAX_SEED, option, parse, recipe, settings


@settings("picture")
class PictureSettings:
    gpt: GPTSettings
    tokenizer: SamplerTokenizerSettings
    compute: ComputeSettings
    sampling: PictureSampling
    classes: str | None = recipe(None, "labels or names, separated by commas (default: eight of them)")
    columns: int = recipe(1, "images of each class, in its row", at_least=1)
    seed: int = recipe(0, "another seed, other images", at_least=0, at_most=MAX_SEED)
    image: Path | None = recipe(None, "picture to edit, of which the codes outside of --mask are kept")
    mask: Path | None = recipe(None, "picture of the size of --image, white where it is to be drawn anew")
    candidates: int = recipe(
        1,
        "pictures to draw for each one that is kept: of an edited --image that under which the codes behind the drawn "
        "ones are likeliest",
        at_least=1,
        at_most=MOST_CANDIDATES,
    )
    output: Path = option(Path("sample_c2i.png"), "file of the picture")


def main() -> None:
    chosen = parse(PictureSettings, __doc__.split("\n")[0])
    refuse_as_output(chosen.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Pipeline(chosen.gpt, chosen.tokenizer, chosen.compute, device)
    print(pipeline.describe(), flush=True)
    names = pipeline.class_names
    labels = parse_classes(chosen.classes, names) if chosen.classes else default_classes(pipeline.num_classes)
    codes = len(labels) * chosen.columns * chosen.candidates * pipeline.gpt.args.block_size
    drawings = pipeline.drawings(
        [label for label in labels for _ in range(chosen.columns)],
        chosen.seed,
        chosen.sampling,
        chosen.image and open_picture(chosen.image),
        chosen.mask and open_picture(chosen.mask),
        chosen.candidates,
    )
    with progress(description="sample", total=codes, unit="code") as bar:
        for drawing in drawings:
            bar.update(drawing.drawn - bar.n)
    pixels = np.stack([np.asarray(image) for image in drawing.images])
    rows = pixels.reshape(len(labels), chosen.columns, *pixels.shape[1:])
    picture = captioned_rows(rows, [caption(label, names) for label in labels])
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


if __name__ == "__main__":
    run(main)
