"""Convert a code store between the packed and the published layout (docs/code-store.md), either way.

python -m dataset.convert_codes --codes IN/imagenet256_codes --output OUT/imagenet256_codes --layout packed
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset.code_store import PACKED, PUBLISHED, CodeStore, open_store
from dataset.code_writer import codes_dtype, write_packed, write_published
from dataset.crops import FIVE_PLACES
from dataset.image_folder import file_sizes, list_image_folder
from utils.commands import command
from utils.program import UserError, run
from utils.progress import progress
from utils.settings import REQUIRED, option, parse, recipe, settings


@settings("conversion")
class ConversionSettings:
    codes: Path = recipe(REQUIRED, "store to read: a folder …_codes of either layout")
    output: Path = option(REQUIRED, "store to write; for the published layout its name ends in _codes")
    layout: str = recipe(PACKED, "layout to write", choices=(PACKED, PUBLISHED))
    codebook_size: int = recipe(16384, "number of codes, where the store to read does not say", at_least=1)
    crop_range: float | None = recipe(
        None,
        "crop range of ten crops, such as 1.1 or 1.05, where the store to read does not say",
        at_least=1,
        at_most=100,
    )
    data_path: Path | None = recipe(None, "image folder of a store that does not say its class names and sources")


def main() -> None:
    asked = parse(ConversionSettings, __doc__.split("\n")[0])
    store = open_store(asked.codes)
    if store.meta.layout == asked.layout:
        raise UserError(f"{asked.codes} has the {asked.layout} layout already; copy it, or give another --layout.")
    if asked.output.exists():
        raise UserError(f"{asked.output} exists already; remove it or give another --output.")
    if asked.layout == PUBLISHED:
        write_published(asked.output, store)
    else:
        pack(store, asked)
    print(open_store(asked.output))
    print(f"next: {command('autoregressive/verify_codes.sh', codes=asked.output)}")


def pack(store: CodeStore, asked: ConversionSettings) -> None:
    """Pack a published folder; what it does not say of itself comes from the settings."""
    meta, labels, sources = store.meta, np.asarray(store.labels), store.sources()
    if asked.data_path:
        folder = list_image_folder(asked.data_path)
        if not np.array_equal(folder.labels, labels):
            raise UserError(
                f"{asked.data_path} does not hold the images of {store.path} ({len(folder):,} images, or "
                "other classes); give the folder they came from, or leave --data-path out."
            )
        sources = file_sizes(folder)
        meta = replace(meta, class_names=folder.class_names)
    size = meta.codebook_size or asked.codebook_size
    meta = replace(
        meta,
        codebook_size=size,
        dtype=codes_dtype(size),
        num_classes=meta.num_classes or int(labels.max()) + 1,
        crop_range=meta.crop_range or (asked.crop_range if meta.crops in FIVE_PLACES else None),
    )
    with progress(description="pack", total=len(store), unit="images") as bar:

        def read(start: int, stop: int) -> np.ndarray:
            codes = store.block(start, stop)
            if codes.max() >= size:
                raise UserError(
                    f"{store.path} holds code {codes.max()}, but the codebook has {size}; "
                    "give the tokenizer's --codebook-size."
                )
            bar.update(stop - start)
            return codes

        write_packed(asked.output, meta, read, labels, sources)


if __name__ == "__main__":
    run(main)
