"""Check a code store, and show it: random images beside their decoded codes, with PSNR, on a contact sheet.

    python -m dataset.verify_codes --codes CODE_PATH/imagenet256_codes --vq-ckpt vq_ds16_c2i.pt --data-path TRAIN

Without checkpoint and images only the store itself is checked: checksums, counts, ranges, labels, use of the codes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from dataset.code_store import IMAGES_FILE, LABELS_FILE, PACKED, CodeStore, StoreMeta, open_store
from dataset.contact_sheet import Example, draw_sheet
from dataset.crops import center_crop, cut_crops, enlarged_size, to_model_range
from dataset.image_folder import list_image_folder, load_rgb
from tokenizer.tokenizer_image.load import build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel, to_uint8
from utils.checkpoint import WEIGHTS_CHOICES
from utils.files import sha256
from utils.program import UserError, run
from utils.progress import progress

SAME_IMAGE = 0.5  # share of equal codes: another precision changes some of them, another image or crop nearly all


def main() -> None:
    args = parse_args()
    if args.crop_range < 1:
        raise UserError(f"--crop-range {args.crop_range:g} is less than 1, the image size itself; use 1.1 or 1.05.")
    store = open_store(args.codes)
    print(store)
    problems = check_files(store) + check_labels(store) + check_codes(store)
    if not (args.vq_ckpt and args.data_path):
        print("no contact sheet: it needs --vq-ckpt and --data-path")
    elif not problems:
        problems = check_images(store, args)
    if problems:
        raise UserError(f"{args.codes} has {len(problems)} problem{'s' * (len(problems) > 1)}: {'; '.join(problems)}.")
    print(f"{args.codes} is sound")


def check_files(store: CodeStore) -> list[str]:
    """Checksums of everything that meta.json lists."""
    listed = dict(store.meta.files)
    if store.meta.layout == PACKED:
        listed |= {shard["file"]: shard["sha256"] for shard in store.meta.shards}
    problems = []
    for name, expected in progress(listed.items(), description="checksums", unit="files"):
        if not (store.path / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(store.path / name) != expected:
            problems.append(f"{name} does not match its checksum")
    if not listed:
        print(f"files: no checksums are kept in {store.path}")
    elif not problems:
        print(f"files: {len(listed)} match their checksums")
    return problems


def check_labels(store: CodeStore) -> list[str]:
    meta, labels = store.meta, np.asarray(store.labels)
    classes = meta.num_classes or int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= classes:
        return [f"{LABELS_FILE} holds labels from {labels.min()} to {labels.max()}, but there are {classes} classes"]
    counts = np.bincount(labels, minlength=classes)
    print(
        f"labels: {classes} classes with {counts.min():,} to {counts.max():,} images, median {np.median(counts):,.0f}"
    )
    problems = [f"{np.sum(counts == 0)} classes have no image"] if (counts == 0).any() else []
    sources = store.sources()
    if sources and len(sources) != meta.count:
        problems.append(f"{IMAGES_FILE} lists {len(sources):,} images, the store holds {meta.count:,}")
    elif sources and meta.class_names:
        wrong = [path for (path, _), label in zip(sources, labels, strict=True)
                 if Path(path).parts[0] != meta.class_names[label]]  # fmt: skip
        problems += [f"{len(wrong)} images are labelled unlike their folders, such as {wrong[0]}"] if wrong else []
    return problems


def check_codes(store: CodeStore) -> list[str]:
    """Range and use of the codes, over every crop of every image."""
    size = store.meta.codebook_size
    uses = np.zeros(size or 1 << 20, np.int64)
    with progress(description="codes", total=len(store), unit="images") as bar:
        for _, codes in store.blocks():
            if codes.max() >= len(uses):
                return [f"code {codes.max()} is outside the codebook of {len(uses)}"]
            uses += np.bincount(codes.ravel(), minlength=len(uses))
            bar.update(len(codes))
    share = uses[uses > 0] / uses.sum()
    perplexity = np.exp(-(share * np.log(share)).sum())
    print(f"codes: {len(share):,} of {size or 'an unknown number'} in use, perplexity {perplexity:,.0f}, "
          f"the commonest is {share.max():.1%} of all")  # fmt: skip
    return ["all codes are the same"] if len(share) == 1 else []


def check_images(store: CodeStore, args: argparse.Namespace) -> list[str]:
    """Encode random crops anew, decode their stored codes beside them, and draw the contact sheet."""
    known = store.meta.tokenizer
    model, tokenizer = build_tokenizer(
        known.get("name", args.vq_model),
        store.meta.codebook_size or args.codebook_size,
        known.get("codebook_embed_dim", args.codebook_embed_dim),
        args.vq_ckpt,
        known.get("weights", args.weights),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if known.get("hash", tokenizer.sha256) != tokenizer.sha256:
        return [f"the codes were made with other weights than those of {args.vq_ckpt}"]
    rng = np.random.default_rng(args.global_seed)
    images = np.sort(rng.choice(len(store), min(args.num_images, len(store)), replace=False))
    crops = rng.integers(store.meta.crops, size=len(images))
    paths = source_paths(store, args.data_path)
    examples, equal = [], []
    for image, crop, codes in zip(images, crops, store.codes(images, crops).astype(np.int64), strict=True):
        source = source_crop(paths[image], store.meta, crop, args.crop_range)
        again, decoded = encode_and_decode(model, source, codes, store.meta.grid)
        equal.append(np.mean(again == codes))
        label = int(store.labels[image])
        name = store.meta.class_names[label] if store.meta.class_names else f"class {label}"
        examples.append(Example(source, decoded, f"{name}, crop {crop}"))
    draw_sheet(examples, args.output)
    psnr = np.array([example.psnr for example in examples])
    print(f"images: {np.mean(equal):.2%} of the codes of {len(images)} random crops are found again; decoded PSNR "
          f"{psnr.mean():.1f} dB, {psnr.min():.1f} to {psnr.max():.1f}; look at {args.output}")  # fmt: skip
    wrong = [paths[image] for image, share in zip(images, equal, strict=True) if share < SAME_IMAGE]
    return [f"codes of {len(wrong)} of {len(images)} images are not theirs, such as {wrong[0]}"] if wrong else []


def source_paths(store: CodeStore, data_path: Path) -> list[str]:
    sources = store.sources()
    if sources:
        return [str(data_path / path) for path, _ in sources]
    folder = list_image_folder(data_path)
    if len(folder) != len(store):
        raise UserError(f"{data_path} holds {len(folder):,} images and {store.path} codes of {len(store):,}; "
                        "give the folder they were extracted from.")  # fmt: skip
    return [folder.path(image) for image in range(len(folder))]


def source_crop(path: str, meta: StoreMeta, crop: int, crop_range: float) -> np.ndarray:
    """(S, S, 3) uint8: the crop that the codes stand for; `crop_range` where `meta` has none."""
    square = center_crop(load_rgb(path), enlarged_size(meta.image_size, meta.crops, meta.crop_range or crop_range))
    return cut_crops(torch.from_numpy(square.copy())[None], meta.image_size, meta.crops)[0, crop].numpy()


@torch.no_grad()
def encode_and_decode(
    model: VQModel, source: np.ndarray, codes: np.ndarray, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The (H·W,) codes of `source` computed anew in float32, and the (S, S, 3) uint8 image of `codes`."""
    device = model.quantize.embedding.weight.device
    again = model.encode_indices(to_model_range(torch.from_numpy(source)[None].to(device)))
    shape = (1, model.config.codebook_embed_dim, *grid)
    decoded = to_uint8(model.decode_code(torch.from_numpy(codes).to(device), shape))
    return again[0].cpu().numpy(), decoded[0].permute(1, 2, 0).cpu().numpy()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--codes", type=Path, required=True, help="the store: a folder …_codes of either layout")
    add("--data-path", type=Path, help="the image folder it was extracted from")
    add("--vq-ckpt", type=Path, help="the tokenizer's checkpoint")
    add("--output", type=Path, default=Path("codes.png"), help="where the contact sheet goes")
    add("--num-images", type=int, default=24, help="images on the contact sheet")
    add("--global-seed", type=int, default=0, help="which images and crops are drawn")
    add("--vq-model", default="VQ-16", help="tokenizer, where the store does not say")
    add("--codebook-size", type=int, default=16384, help="number of codes, where the store does not say")
    add("--codebook-embed-dim", type=int, default=8, help="width of a code's vector, where the store does not say")
    add("--crop-range", type=float, default=1.1, help="crop range, where the store does not say")
    add("--weights", choices=WEIGHTS_CHOICES, default="auto", help="weights, where the store does not say")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
