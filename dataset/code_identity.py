"""What tells two code stores of the same description apart, in whatever layout."""

import hashlib

import numpy as np

from dataset.code_store import CodeStore

SAMPLED_IMAGES = 1000  # the whole may be gigabytes


def codes_hash(store: CodeStore) -> str:
    """A hash of the labels and the centre crop's codes of about 1,000 evenly spaced images."""
    images = np.linspace(0, len(store) - 1, min(len(store), SAMPLED_IMAGES), dtype=np.int64)
    digest = hashlib.sha256(store.labels_of(images).astype("<i8"))
    digest.update(store.codes(images, np.full(len(images), store.meta.centre_crop)).astype("<u4"))
    return digest.hexdigest()[:16]
