"""Names of classes: what a misspelt one may have meant, and sheets with a row per class."""

import numpy as np
import pytest

from autoregressive.sample.class_names import caption, class_names, find_classes, parse_classes
from autoregressive.sample.pictures import rows_of_classes
from utils.program import UserError

CLOTHES = ["Ankle_boot", "Bag", "Coat", "Shirt", "T-shirt_top", "Trouser"]


@pytest.mark.parametrize(
    ("entry", "names", "message"),
    [
        ("goldn retriever", class_names(1000, None), r"fits no class; similar are 207 \(golden retriever\)"),
        ("boots", CLOTHES, r"fits no class; similar are 0 \(Ankle_boot\); give --classes"),
        ("shrit", CLOTHES, r"similar are 3 \(Shirt\), 4 \(T-shirt_top\)"),
        ("xyzzy", CLOTHES, "fits no class; give --classes labels 0 to 5, or names"),
    ],
)
def test_near_misses(entry, names, message):
    with pytest.raises(UserError, match=message):
        parse_classes(entry, names)


def test_a_search_gives_the_best_first():
    names = class_names(1000, None)
    assert find_classes("Red fox", names)[0] == (277, "red fox")
    assert {name for _, name in find_classes("fox", names)} >= {"red fox", "kit fox", "Arctic fox", "grey fox"}
    assert find_classes("king", names)[0][1].startswith("king")
    assert find_classes("207", names) == [(207, "golden retriever")]
    assert find_classes("shrit", CLOTHES) == [(3, "Shirt"), (4, "T-shirt_top")]
    assert [label for label, _ in find_classes(" ", CLOTHES)] == list(range(6))
    assert find_classes("xyzzy", CLOTHES) == []


def test_captions():
    assert [caption(label, names) for label, names in ((1, CLOTHES), (1, ["0", "1"]))] == ["1 Bag", "1"]


def test_a_row_per_class():
    labels = np.arange(50) % 10
    shown = rows_of_classes(labels)
    assert shown.shape == (8, 5)
    assert (labels[shown] == labels[shown[:, :1]]).all()
    assert len(set(labels[shown[:, 0]])) == 8
    assert rows_of_classes(np.array([3, 1, 3])).tolist() == [[1], [0]]
