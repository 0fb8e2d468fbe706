"""Rows of measurements: printed as a table while they come, and kept for benchmarks.gpu_check."""

import json
from pathlib import Path

from utils.settings import option, settings

HEADER = ("what", "here", "published", "ratio", "floor", "of the floor", "more")
LOWER_IS_BETTER = ("s", "ms", "us")


@settings("measurement")
class MeasurementSettings:
    device: str | None = option(None, "cpu or cuda (default: a GPU if there is one)", choices=("cpu", "cuda"))
    json: Path | None = option(None, "append every row to this file, a JSON object per line")


class Rows:
    """Collects what one benchmark measures; a row is on the disk as soon as it is added."""

    def __init__(self, path: Path | None, title: str):
        self.path = path
        print(f"{title}\n\n{line(HEADER)}\n{line(['---'] * len(HEADER))}", flush=True)

    def add(
        self,
        what: str,
        here: float | None,
        unit: str,
        published: float | None = None,
        floor: float | None = None,
        **more: float | str | None,
    ) -> dict:
        """`published` and `floor` (what the device allows) are in the same `unit`; `more` is noted as it is.

        `here` is None where it could not be measured; `more` then says why.
        """
        row = {"what": what, "unit": unit, "here": here, "published": published, "floor": floor}
        row |= {"ratio": speedup(here, published, unit), "of_floor": speedup(here, floor, unit)}
        row["more"] = {name: value for name, value in more.items() if value is not None}
        print(line(cells(row)), flush=True)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row


def speedup(here: float | None, other: float | None, unit: str) -> float | None:
    """How many times as fast as `other`, whether `unit` is of rates or of times."""
    if not here or not other:
        return None
    return other / here if unit in LOWER_IS_BETTER else here / other


def cells(row: dict) -> list[str]:
    """The texts of a row, in the order of `HEADER`."""
    here, published, floor = (_number(row[name], row["unit"]) for name in ("here", "published", "floor"))
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    share = "" if row["of_floor"] is None else f"{row['of_floor']:.0%}"
    more = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in row["more"].items())
    return [row["what"], here or "-", published, ratio, floor, share, more]


def line(texts) -> str:
    return f"| {' | '.join(texts)} |"


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_plain(value)} {unit}".rstrip()


def _plain(value: float | str) -> str:
    """Three significant digits, or more before the decimal point."""
    if isinstance(value, str | int):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
