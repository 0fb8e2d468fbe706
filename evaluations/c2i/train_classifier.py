"""Train a small classifier on an image folder and export it as a feature network for the evaluator.

    python -m evaluations.c2i.train_classifier --data-path TRAIN --val-data-path TEST --image-size 32 --output net.pt2

For data on which ImageNet's Inception features say little (digits, say). Scores of different feature networks cannot
be compared with each other, nor with published numbers.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dataset.crops import center_crop
from dataset.image_folder import ImageFolder, list_image_folder, load_rgb
from utils.commands import command
from utils.files import atomic_file, refuse_overwriting, write_json
from utils.memory import require_memory
from utils.program import UserError, run
from utils.progress import progress
from utils.settings import MAX_SEED, REQUIRED, option, parse, recipe, settings

SPATIAL_CHANNELS = 7  # of the last map, as in ADM's sFID


@settings("classifier")
class ClassifierSettings:
    data_path: str = recipe(REQUIRED, "image folder to learn from, one folder per class")
    output: Path = option(REQUIRED, "file to write, .pt2; accuracies go beside it, .json")
    val_data_path: str | None = option(None, "held-out image folder: accuracy is measured on it once, at the end")
    image_size: int = recipe(32, "pixels per side of the centre crops", at_least=8)
    epochs: int = recipe(15, "passes over the images", at_least=1)
    batch_size: int = recipe(64, "images per step", at_least=2)
    lr: float = recipe(2e-3, "peak of the one-cycle learning rate", above=0)
    max_shift: int = recipe(2, "images are moved by up to so many pixels in each direction", at_least=0)
    seed: int = recipe(0, "seed of weights, order of the images and shifts", at_least=0, at_most=MAX_SEED)


class Classifier(nn.Module):
    """Three convolution stages; its inputs and outputs are those the evaluator asks of a feature network."""

    def __init__(self, num_classes: int, width: int = 16):
        super().__init__()
        channels = [3, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip(channels, channels[1:], strict=False)
        )
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images `(N, H, W, 3)` in 0..255 to pool `(N, D)`, spatial `(N, S)` and logits `(N, C)`."""
        x = (images / 127.5 - 1).permute(0, 3, 1, 2)
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
        pool = x.mean((2, 3))
        return pool, x[:, :SPATIAL_CHANNELS].flatten(1), self.head(pool)


def main() -> None:
    settings = parse(ClassifierSettings, "Train a small classifier on an image folder as a feature network.")
    torch.manual_seed(settings.seed)
    if settings.output.suffix == ".json":
        raise UserError(f"--output {settings.output} is the name of the accuracies; let it end in .pt2.")
    refuse_overwriting(settings.output, *map(Path, filter(None, (settings.data_path, settings.val_data_path))))
    folder = list_image_folder(settings.data_path)
    images, labels = load_images(folder, settings.image_size)
    held_out = list_image_folder(settings.val_data_path) if settings.val_data_path else None
    if held_out is not None and held_out.class_names != folder.class_names:
        raise UserError(
            f"{settings.val_data_path} holds other classes than {settings.data_path}; both need the same folders."
        )
    model = Classifier(len(folder.class_names)).to(memory_format=torch.channels_last)
    train(model, images, labels, settings)
    report = {"train_accuracy": accuracy(model, images, labels), "classes": folder.class_names}
    if held_out is not None:
        report["held_out_accuracy"] = accuracy(model, *load_images(held_out, settings.image_size))
        report["held_out_images"] = len(held_out)
        print(f"{report['held_out_accuracy']:.2%} of {len(held_out)} held-out images recognised")
    export(model, settings.image_size, settings.output)
    write_json(settings.output.with_suffix(".json"), report)
    reference = settings.output.with_name(f"{settings.output.stem}-reference.npz")
    images = {"image_size": settings.image_size, "save_stats": reference, "features": settings.output}
    print(f"next: {command('evaluate.sh', Path(settings.data_path), **images)}")


def load_images(folder: ImageFolder, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre crops `(N, size, size, 3)` uint8 and labels `(N,)` of a whole folder, in memory."""
    needed = len(folder) * size * size * 3
    require_memory(2 * needed, f"{len(folder):,} images of {size} pixels", "use fewer, or a smaller --image-size")
    crops = (center_crop(load_rgb(folder.path(i)), size) for i in range(len(folder)))
    bar = progress(crops, description="reading images", total=len(folder), unit="img")
    return torch.stack([torch.tensor(crop) for crop in bar]), torch.as_tensor(folder.labels, dtype=torch.int64)


def train(model: Classifier, images: torch.Tensor, labels: torch.Tensor, settings: ClassifierSettings) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = -(-len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, epochs=settings.epochs, steps_per_epoch=steps
    )
    model.train()
    for _ in progress(range(settings.epochs), description="training the classifier", unit="epoch"):
        for batch in torch.randperm(len(images)).chunk(steps):
            shifted = _shift(images[batch].float(), settings.max_shift)
            loss = F.cross_entropy(model(shifted)[2], labels[batch], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()


def _shift(images: torch.Tensor, most: int) -> torch.Tensor:
    """Move every image by its own whole number of pixels in each direction, filling with its border."""
    n, height, width, _ = images.shape
    dy, dx = torch.randint(-most, most + 1, (2, n, 1))
    rows = (torch.arange(height) + dy).clamp(0, height - 1)[:, :, None]
    columns = (torch.arange(width) + dx).clamp(0, width - 1)[:, None, :]
    return images[torch.arange(n)[:, None, None], rows, columns]


@torch.no_grad()
def accuracy(model: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    batches = zip(images.split(256), labels.split(256), strict=True)
    return sum((model(x.float())[2].argmax(1) == y).sum().item() for x, y in batches) / len(images)


def export(model: Classifier, size: int, path: Path) -> None:
    """Write the trained model as a `torch.export` program that takes any number of images."""
    batch = torch.export.Dim("batch", min=2)
    example = torch.zeros(4, size, size, 3)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: batch},))
    with atomic_file(path) as file:
        torch.export.save(program, file)


if __name__ == "__main__":
    run(main)
