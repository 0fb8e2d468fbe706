"""Convert a code store between the packed and the published layout (docs/code-store.md), either way.

python -m dataset.convert_codes --codes IN/imagenet256_codes --output OUT/imagenet256_codes --layout packed
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset.code_store import PACKED, PUBLISHED, CodeStore, open_store
from dataset.code_writer import codes_dtype, write_packed, write_published
from dataset.crops import FIVE_PLACES
from dataset.image_folder import file_sizes, list_image_folder
from utils.program import UserError, run
from utils.progress import progress


def main() -> None:
    args = parse_args()
    if args.crop_range is not None and args.crop_range < 1:
        raise UserError(f"--crop-range {args.crop_range:g} is less than 1, the image size itself; use 1.1 or 1.05.")
    store = open_store(args.codes)
    if store.meta.layout == args.layout:
        raise UserError(f"{args.codes} has the {args.layout} layout already; copy it, or give another --layout.")
    if args.output.exists():
        raise UserError(f"{args.output} exists already; remove it or give another --output.")
    if args.layout == PUBLISHED:
        write_published(args.output, store)
    else:
        pack(store, args.output, args.codebook_size, args.crop_range, args.data_path)
    print(open_store(args.output))
    print(f"next: bash scripts/autoregressive/verify_codes.sh --codes {args.output}")


def pack(store: CodeStore, output: Path, codebook_size: int, crop_range: float | None, data_path: Path | None) -> None:
    """Pack a published folder; what it does not say of itself comes from the flags."""
    meta, labels = store.meta, np.asarray(store.labels)
    sources = store.sources()
    if data_path:
        folder = list_image_folder(data_path)
        if not np.array_equal(folder.labels, labels):
            raise UserError(f"{data_path} does not hold the images of {store.path} ({len(folder):,} images, or "
                            "other classes); give the folder they came from, or leave --data-path out.")  # fmt: skip
        sources = file_sizes(folder)
        meta = replace(meta, class_names=folder.class_names)
    size = meta.codebook_size or codebook_size
    meta = replace(
        meta,
        codebook_size=size,
        dtype=codes_dtype(size),
        num_classes=meta.num_classes or int(labels.max()) + 1,
        crop_range=meta.crop_range or (crop_range if meta.crops in FIVE_PLACES else None),
    )
    blocks = (_checked(codes, size, store) for _, codes in store.blocks())
    write_packed(output, meta, progress(blocks, description="pack", total=-(-len(store) // 4096)), labels, sources)


def _checked(codes: np.ndarray, codebook_size: int, store: CodeStore) -> np.ndarray:
    if codes.max() >= codebook_size:
        raise UserError(f"{store.path} holds code {codes.max()}, but the codebook has {codebook_size}; "
                        "give the tokenizer's --codebook-size.")  # fmt: skip
    return codes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--codes", type=Path, required=True, help="store to read: a folder …_codes of either layout")
    add("--output", type=Path, required=True, help="store to write; for the published layout its name ends in _codes")
    add("--layout", choices=(PACKED, PUBLISHED), default=PACKED, help="layout to write")
    add("--codebook-size", type=int, default=16384, help="number of codes, where the folder itself does not say")
    add("--crop-range", type=float, help="that of ten crops, such as 1.1 or 1.05, where the folder itself does not say")
    add("--data-path", type=Path, help="the images, where the folder does not say: gives class names and sources")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
