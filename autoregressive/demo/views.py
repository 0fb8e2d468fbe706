"""What the page shows of pictures, as HTML: those being drawn, and the settings of one from the gallery."""

import base64
import html
import io

from PIL import Image

from autoregressive.demo.pictures import Picture

SMALL = 96  # pixels a side up to which pictures are shown as squares of colour
# Of the framework: no pulsing frame while a picture grows, and what is refused is said once, not on every part.
STYLE = """
.npp-stage { display: grid; gap: 6px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr));
             max-width: min(46rem, 76vh); }
.npp-stage img { width: 100%; display: block; border-radius: 3px; }
.npp-pixels img { image-rendering: pixelated; }
.npp-empty { display: flex; align-items: center; justify-content: center; color: var(--body-text-color-subdued);
             max-width: min(46rem, 76vh); aspect-ratio: 1; border: 1px dashed var(--border-color-primary);
             border-radius: 6px; }
.npp-facts { display: grid; grid-template-columns: max-content 1fr; column-gap: 1.5rem; font-size: 0.9rem; }
.npp-facts dt { color: var(--body-text-color-subdued); }
.npp-facts dd { margin: 0; }
#gallery .caption-label { font-size: 0.7rem; }
#gallery .grid-wrap { min-height: 0; }
#gallery:has(.empty) { display: none; }
#status .wrap:has(.error), #edit-status .wrap:has(.error) { display: none; }
.generating { border-color: transparent !important; animation: none !important; }
"""


def empty(text: str) -> str:
    return f'<div class="npp-empty">{html.escape(text)}</div>'


def stage(images: list[Image.Image], name: str) -> str:
    """Pictures side by side, as wide as the page allows."""
    columns = next(side for side in range(1, len(images) + 1) if side * side >= len(images))
    pixels = " npp-pixels" if images[0].width <= SMALL else ""
    shown = "".join(f'<img alt="{html.escape(name)}" src="{_data_url(image)}">' for image in images)
    return f'<div class="npp-stage{pixels}" style="--columns: {columns}">{shown}</div>'


def facts(picture: Picture) -> str:
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in picture.settings.items()
    )
    return f'<dl class="npp-facts">{rows}</dl>'


def _data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
