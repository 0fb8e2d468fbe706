"""Check a code store, and show it: random images beside their decoded codes, with PSNR, on a contact sheet.

    python -m autoregressive.train.verify_codes --codes CODE_PATH/imagenet256_codes --vq-ckpt vq_ds16_c2i.pt \\
        --data-path TRAIN

Without checkpoint and images only the store itself is checked: checksums, counts, ranges, labels, use of the codes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dataset.code_check import code_problems, file_problems, in_short, label_problems, listed_files
from dataset.code_store import IMAGES_FILE, CodeStore, StoreMeta, open_store
from dataset.crops import center_crop, cut_crops, enlarged_size, to_model_range
from dataset.image_folder import list_image_folder, load_rgb
from tokenizer.base import ImageTokenizer
from tokenizer.tokenizer_image.load import StandaloneTokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.metrics import psnr
from tokenizer.tokenizer_image.vq_model import to_uint8
from utils.component import is_component
from utils.files import atomic_file, refuse_overwriting
from utils.memory import require_memory
from utils.program import UserError, run
from utils.progress import progress
from utils.settings import MAX_SEED, REQUIRED, option, parse, recipe, settings, with_defaults

SAME_IMAGE = 0.5  # share of equal codes: another precision changes some of them, another image or crop nearly all
SHEET_PIXEL_BYTES = 24  # per pixel of an image: it and its decoded codes, alone and on the sheet
COLUMNS, MARGIN, CAPTION, NARROWEST = 4, 8, 16, 80  # of the contact sheet, in pixels but for the first


@settings("verification")
class VerifySettings:
    tokenizer: with_defaults(StandaloneTokenizerSettings, vq_ckpt=None)  # what the store says need not be given
    codes: Path = recipe(REQUIRED, "the store: a folder …_codes of either layout")
    data_path: Path | None = recipe(None, "the image folder it was extracted from")
    output: Path = option(Path("codes.png"), "where the contact sheet goes")
    num_images: int = recipe(24, "images on the contact sheet", at_least=1)
    global_seed: int = recipe(0, "which images and crops are drawn", at_least=0, at_most=MAX_SEED)
    crop_range: float = recipe(1.1, "crop range, where the store does not say", at_least=1, at_most=100)


def main() -> None:
    asked = parse(VerifySettings, __doc__.split("\n")[0])
    read = (asked.codes, asked.data_path, asked.tokenizer.vq_ckpt and Path(asked.tokenizer.vq_ckpt))
    refuse_overwriting(asked.output, *read)
    store = open_store(asked.codes)
    print(store)
    files, others = check_files(store), check_labels(store) + check_codes(store)
    if not (asked.tokenizer.vq_ckpt and asked.data_path):
        print("no contact sheet: it needs --vq-ckpt and --data-path")
    elif not files + others:
        others = check_images(store, asked)
    if count := len(files + others):
        found = "; ".join(in_short(files) + others)
        raise UserError(f"{asked.codes} has {count} problem{'s' * (count > 1)}: {found}.")
    print(f"{asked.codes} is sound")


def check_files(store: CodeStore) -> list[str]:
    """Checksums of everything that meta.json lists."""
    problems, listed = file_problems(store), listed_files(store)
    if not listed:
        print(f"files: no checksums are kept in {store.path}")
    elif not problems:
        print(f"files: {len(listed)} match their checksums")
    return problems


def check_labels(store: CodeStore) -> list[str]:
    meta, labels = store.meta, np.asarray(store.labels)
    classes = meta.num_classes or int(labels.max()) + 1
    if outside := label_problems(labels.min(), labels.max(), classes):
        return outside
    require_memory(8 * classes, f"counting the images of {classes:,} classes", "mend the labels")
    counts = np.bincount(labels, minlength=classes)
    print(
        f"labels: {classes} classes with {counts.min():,} to {counts.max():,} images, median {np.median(counts):,.0f}"
    )
    problems = [f"{np.sum(counts == 0)} classes have no image"] if (counts == 0).any() else []
    sources = store.sources()
    if sources and len(sources) != meta.count:
        problems.append(f"{IMAGES_FILE} lists {len(sources):,} images, the store holds {meta.count:,}")
    elif sources and meta.class_names:
        folders = [meta.class_names[label] + "/" for label in labels]
        wrong = [path for (path, _), name in zip(sources, folders, strict=True) if not path.startswith(name)]
        problems += [f"{len(wrong)} images are labelled unlike their folders, such as {wrong[0]}"] if wrong else []
    return problems


def check_codes(store: CodeStore) -> list[str]:
    """Range and use of the codes, over every crop of every image."""
    size = store.meta.codebook_size
    uses = np.zeros(size or 1 << 20, np.int64)
    with progress(description="codes", total=len(store), unit="images") as bar:
        for _, codes in store.blocks():
            if outside := code_problems(codes.max(), len(uses)):
                return outside
            uses += np.bincount(codes.ravel(), minlength=len(uses))
            bar.update(len(codes))
    share = uses[uses > 0] / uses.sum()
    perplexity = np.exp(-(share * np.log(share)).sum())
    print(
        f"codes: {len(share):,} of {size or 'an unknown number'} in use, perplexity {perplexity:,.0f}, "
        f"the commonest is {share.max():.1%} of all"
    )
    return ["all codes are the same"] if len(share) == 1 else []


def check_images(store: CodeStore, asked: VerifySettings) -> list[str]:
    """Encode random crops anew, decode their stored codes beside them, and draw the contact sheet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, info = build_tokenizer(tokenizer_of(store.meta, asked.tokenizer), device)
    if store.meta.tokenizer.get("hash", info.sha256) != info.sha256:
        return [f"the codes were made with other weights than those of {asked.tokenizer.vq_ckpt}"]
    drawn = min(asked.num_images, len(store))
    require_memory(
        drawn * store.meta.image_size**2 * SHEET_PIXEL_BYTES, f"a sheet of {drawn:,} images", "use fewer --num-images"
    )
    rng = np.random.default_rng(asked.global_seed)
    images = np.sort(rng.choice(len(store), drawn, replace=False))
    crops = rng.integers(store.meta.crops, size=len(images))
    paths = source_paths(store, asked.data_path)
    sources, decoded, captions, equal = [], [], [], []
    for image, crop, codes in zip(images, crops, store.codes(images, crops).astype(np.int64), strict=True):
        sources.append(source_crop(paths[image], store.meta, crop, asked.crop_range))
        again, picture = encode_and_decode(tokenizer, sources[-1], codes.reshape(store.meta.grid), device)
        decoded.append(picture)
        equal.append(np.mean(again == codes))
        label = int(store.labels[image])
        name = store.meta.class_names[label] if store.meta.class_names else f"class {label}"
        captions.append(f"{name}, crop {crop}")
    ratios = psnr(*(torch.from_numpy(np.stack(pixels)).movedim(-1, 1) for pixels in (decoded, sources))).tolist()
    captions = [f"{ratio:.1f} dB  {caption}" for ratio, caption in zip(ratios, captions, strict=True)]
    draw_sheet(sources, decoded, captions, asked.output)
    print(
        f"images: {np.mean(equal):.2%} of the codes of {len(images)} random crops are found again; decoded PSNR "
        f"{np.mean(ratios):.1f} dB, {min(ratios):.1f} to {max(ratios):.1f}; look at {asked.output}"
    )
    wrong = [paths[image] for image, share in zip(images, equal, strict=True) if share < SAME_IMAGE]
    return [f"codes of {len(wrong)} of {len(images)} images are not theirs, such as {wrong[0]}"] if wrong else []


def draw_sheet(sources: list[np.ndarray], decoded: list[np.ndarray], captions: list[str], path: Path) -> None:
    """Write a PNG of (S, S, 3) uint8 images, each left of its decoded codes; small images are enlarged."""
    size = len(sources[0])
    side = size * -(-NARROWEST // size)
    cell_width, cell_height = 2 * side + MARGIN, side + CAPTION + MARGIN
    rows = -(-len(sources) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (pair, caption) in enumerate(zip(zip(sources, decoded, strict=True), captions, strict=True)):
        left, top = MARGIN + number % COLUMNS * cell_width, MARGIN + number // COLUMNS * cell_height
        picture = Image.fromarray(np.concatenate(pair, axis=1)).resize((2 * side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        draw.text((left, top + side + 1), caption, fill="black")
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def tokenizer_of(meta: StoreMeta, given: StandaloneTokenizerSettings) -> StandaloneTokenizerSettings:
    """`given`, completed by what the store says of its tokenizer; but no store makes a user's class run."""
    known = meta.tokenizer
    name = known.get("name")
    return replace(
        given,
        vq_model=given.vq_model or (None if is_component(name) else name),
        codebook_size=given.codebook_size or meta.codebook_size,
        codebook_embed_dim=given.codebook_embed_dim or known.get("codebook_embed_dim"),
        vq_weights=known.get("weights", given.vq_weights),
    )


def source_paths(store: CodeStore, data_path: Path) -> list[str]:
    sources = store.sources()
    if sources:
        return [str(data_path / path) for path, _ in sources]
    folder = list_image_folder(data_path)
    if len(folder) != len(store):
        raise UserError(
            f"{data_path} holds {len(folder):,} images and {store.path} codes of {len(store):,}; "
            "give the folder they were extracted from."
        )
    return [folder.path(image) for image in range(len(folder))]


def source_crop(path: str, meta: StoreMeta, crop: int, crop_range: float) -> np.ndarray:
    """(S, S, 3) uint8: the crop that the codes stand for; `crop_range` where `meta` has none."""
    square = center_crop(load_rgb(path), enlarged_size(meta.image_size, meta.crops, meta.crop_range or crop_range))
    return cut_crops(torch.from_numpy(square.copy())[None], meta.image_size, meta.crops)[0, crop].numpy()


@torch.no_grad()
def encode_and_decode(
    tokenizer: ImageTokenizer, source: np.ndarray, codes: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The (h·w,) codes of `source` computed anew in float32, and the (S, S, 3) uint8 image of (h, w) `codes`."""
    again = tokenizer.encode_indices(to_model_range(torch.from_numpy(source)[None].to(device)))
    decoded = to_uint8(tokenizer.decode_indices(torch.from_numpy(codes)[None].to(device)))
    return again[0].cpu().numpy(), decoded[0].permute(1, 2, 0).cpu().numpy()


if __name__ == "__main__":
    run(main)
