"""The page: one column of controls, large pictures, and the wires from its buttons to their handlers."""

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager

import gradio as gr
from PIL import Image

from autoregressive.demo import views
from autoregressive.demo.asked import MOST_CANDIDATES
from autoregressive.demo.handlers import Handlers, View
from autoregressive.demo.pictures import Picture
from autoregressive.demo.uploads import EDITOR_SIDE, FORMATS, enlarged, refusing_bad_pictures
from autoregressive.sample.class_names import caption
from utils.program import UserError

QUEUE_LENGTH = 20
NOTHING = "&nbsp;"  # keeps the line's place
SECONDS_KEPT = 24 * 3600  # files of visitors, drawn or sent
DEVICE = dict(concurrency_id="device", concurrency_limit=1, show_progress="minimal")  # of every handler that draws
HIDDEN = dict(api_visibility="private", show_progress="hidden")
THEME = gr.themes.Default(  # fonts of the visitor's own machine: nothing is fetched from elsewhere
    primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
# A click on the list of classes marks what it shows: the first key that is typed begins a search.
SCRIPT = "() => document.querySelector('#class input').addEventListener('focus', (event) => event.target.select())"
EDITING = (
    "Paint over what is to be drawn anew, and choose on the left as which class. Codes are drawn from the top left to "
    "the bottom right: the new part follows what is above it and to its left. What is below it and to its right stays, "
    "but has no influence; of several candidates the one is taken that fits it best."
)


def build_page(handlers: Handlers) -> gr.Blocks:
    """The page, to be launched with `THEME` and `views.STYLE`."""
    info, size = handlers.pipeline.gpt_info, handlers.pipeline.image_size
    title = f"{info.name}, {size}×{size}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, SECONDS_KEPT)) as page:
        kept, base, chosen = gr.State(()), gr.State(), gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                gr.Markdown(f"## {title}")
                values, draw, stop = _controls(handlers)
            with gr.Column(scale=3, min_width=520):
                with gr.Tabs() as tabs:
                    with gr.Tab("Draw", id="draw"):
                        status = gr.Markdown(NOTHING, elem_id="status")
                        stage = gr.HTML(views.empty("choose a class and press Draw"), elem_id="stage")
                    with gr.Tab("Edit", id="edit"):
                        upload, editor, candidates, redraw, edited, edit_status = _editor(size)
                gallery, download, take, facts = _gallery(size)

        painting = [base, editor]
        draw.click(lambda: gr.Tabs(selected="draw"), None, tabs, queue=False, **HIDDEN)
        drawing = draw.click(
            _draw(handlers),
            [kept, *values],
            [stage, status, kept, gallery],
            api_name="draw",
            show_progress_on=status,
            **DEVICE,
        )
        redrawing = redraw.click(
            _edit(handlers),
            [kept, base, editor, candidates, *values],
            [edited, edit_status, kept, gallery],
            api_name="edit",
            show_progress_on=edit_status,
            **DEVICE,
        )
        told = [status, edit_status]
        stop.click(lambda: ["stopped"] * 2, None, told, cancels=[drawing, redrawing], queue=False, **HIDDEN)
        upload.upload(_upload(handlers), upload, painting, api_name="upload")
        gallery.select(_choose, kept, [chosen, download, take, facts], **HIDDEN)
        take.click(_take, chosen, [*painting, tabs], **HIDDEN)
        take.click(None, js="() => scrollTo({top: 0})")
    return page.queue(max_size=QUEUE_LENGTH)


def _controls(handlers: Handlers) -> tuple[list, gr.Button, gr.Button]:
    """The controls in the order of `CONTROL_NAMES`, and two buttons."""
    usual, names = handlers.usual, handlers.names
    chosen = gr.Dropdown(
        [(caption(label, names), label) for label in range(len(names))],
        value=0,
        label="Class",
        info="type to search, by name or number",
        allow_custom_value=True,
        elem_id="class",
    )
    count = _slider("Pictures", 1, handlers.most, min(4, handlers.most), step=1)
    with gr.Group():
        seed = gr.Number(0, label="Seed")
        another = gr.Button("Another seed", size="sm")
    guidance = _slider("Guidance", 1, max(10, usual.cfg_scale), usual.cfg_scale, step=0.05, info="1: none")
    temperature = _slider("Temperature", 0, max(2, usual.temperature), usual.temperature, step=0.05)
    top_k = gr.Number(usual.top_k, label="Top-k", info="0: all codes")
    top_p = _slider("Top-p", 0.01, 1, usual.top_p, step=0.01, info="1: all codes")
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
        stop = gr.Button("Stop", elem_id="stop", min_width=80)
    another.click(lambda: random.randrange(2**31), None, seed, queue=False, **HIDDEN)
    return [chosen, count, seed, guidance, temperature, top_k, top_p], draw, stop


def _slider(label: str, least: float, most: float, value: float, **looks) -> gr.Slider:
    slider = gr.Slider(least, most, value, label=label, **looks)
    slider.preprocess = lambda sent: sent  # the framework's refusal would not name the control; `asked_for` does
    return slider


def _editor(size: int) -> tuple:
    """Upload button, editor, candidates, button, and where the result is shown."""
    side = size * max(1, EDITOR_SIDE // size)
    gr.Markdown(EDITING)
    with gr.Row():
        with gr.Column(min_width=360):
            editor = gr.ImageEditor(
                type="pil",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=side // 8, colors=[("#e4572e", 0.6)], color_mode="fixed"),
                canvas_size=(side, side),
                height=500,
                show_label=False,
                placeholder="upload a picture, or take one from the gallery",
                elem_id="editor",
            )
            _refuse_bad_layers(editor)
        with gr.Column(min_width=360):
            status = gr.Markdown(NOTHING, elem_id="edit-status")
            edited = gr.HTML(views.empty("the edited picture"), elem_id="edited")
    with gr.Row():
        upload = gr.UploadButton("Upload a picture", file_types=[f".{name.lower()}" for name in (*FORMATS, "JPG")])
        candidates = _slider("Candidates", 1, MOST_CANDIDATES, 1, step=1)
        redraw = gr.Button("Redraw what is painted", variant="primary", elem_id="redraw")
    return upload, editor, candidates, redraw, edited, status


def _refuse_bad_layers(editor: gr.ImageEditor) -> None:
    """The editor decodes what a visitor sends before any handler is called: its errors become sentences as well."""
    decode = editor.preprocess

    def preprocess(sent):
        with _telling_refusals(), refusing_bad_pictures():
            return decode(sent)

    editor.preprocess = preprocess


def _gallery(size: int) -> tuple[gr.Gallery, gr.DownloadButton, gr.Button, gr.HTML]:
    gr.Markdown("Drawn so far; click a picture for its settings.", elem_id="heading")
    gallery = gr.Gallery(
        show_label=False,
        height="auto",
        columns=6,
        fit_columns=False,
        object_fit="contain",
        interactive=False,
        allow_preview=False,
        buttons=[],
        elem_id="gallery",
        elem_classes="npp-pixels" if size <= views.SMALL else None,
    )
    with gr.Row():
        facts = gr.HTML(elem_id="facts")
        with gr.Column():
            download = gr.DownloadButton("Download PNG, with its settings", visible=False, elem_id="download")
            take = gr.Button("Edit this picture", visible=False, elem_id="take")
    return gallery, download, take, facts


def _draw(handlers: Handlers):
    def draw(kept, *values):
        yield from _shown(handlers.draw(kept, *values))

    return draw


def _edit(handlers: Handlers):
    def edit(kept, base, editor, candidates, *values):
        layers = editor["layers"] if editor else []
        yield from _shown(handlers.edit(kept, base, layers, candidates, *values))

    return edit


def _shown(steps: Iterator[View]) -> Iterator[tuple]:
    """Values of stage, status, the gallery's state, and the gallery; when this is closed, so are `steps`."""
    with closing(steps), _telling_refusals():
        for view in steps:
            stage, kept = gr.skip() if view.stage is None else view.stage, (gr.skip(), gr.skip())
            if view.kept is not None:
                kept = view.kept, [(str(picture.file), picture.caption) for picture in view.kept]
            yield stage, view.status, *kept


def _upload(handlers: Handlers):
    def upload(path):
        with _telling_refusals():
            return _on_editor(handlers.upload(path))

    return upload


@contextmanager
def _telling_refusals():
    """A `UserError` appears on the page."""
    try:
        yield
    except UserError as error:
        sentence = str(error)
        raise gr.Error(sentence[0].upper() + sentence[1:], duration=20, print_exception=False) from error


def _on_editor(image: Image.Image) -> tuple:
    shown = enlarged(image)
    return image, {"background": shown, "layers": [], "composite": shown}


def _choose(kept: tuple[Picture, ...], event: gr.SelectData) -> tuple:
    """Of a picture that has been deleted only the settings."""
    picture = kept[event.index]
    there = picture.file.exists()
    download = gr.DownloadButton(value=str(picture.file) if there else None, visible=there)
    return picture, download, gr.Button(visible=there), views.facts(picture)


def _take(chosen: Picture) -> tuple:
    with _telling_refusals(), chosen.opened() as image:
        return *_on_editor(image.convert("RGB")), gr.Tabs(selected="edit")
