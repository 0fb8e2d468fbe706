"""Which tokenizer a GPT belongs to, as far as its weights say."""

from pathlib import Path

from pretrained_models import download
from pretrained_models.catalogue import PUBLISHED, published_config
from utils.checkpoint import TOKENIZER_FOLDER, read_checkpoint
from utils.program import UserError

PUBLISHED_TOKENIZER = "vq_ds16_c2i.pt"  # whose codes every published GPT was trained on


def download_published(gpt: str, tokenizer: str | None) -> None:
    """Download what of the two is a published name, and the tokenizer that is left open; what is here stays."""
    for name in (gpt, tokenizer or (PUBLISHED_TOKENIZER if gpt in PUBLISHED else "")):
        if name in PUBLISHED and not Path(name).exists():
            download.download(name)


def tokenizer_of(gpt: Path) -> str:
    """Where the tokenizer of the weights `gpt` lies. Raises `UserError` if that is not known, or no longer so."""
    if published_config(gpt):
        return PUBLISHED_TOKENIZER
    if (gpt / TOKENIZER_FOLDER).is_dir():
        return str(gpt / TOKENIZER_FOLDER)
    place = (read_checkpoint(gpt).get("places") or {}).get("tokenizer")
    if not isinstance(place, str):
        raise UserError(f"{gpt} does not say where its tokenizer lies; give it as --vq-ckpt.")
    if not Path(place).exists():
        raise UserError(f"the tokenizer of {gpt} lay at {place} and is not there; give it as --vq-ckpt.")
    return place
