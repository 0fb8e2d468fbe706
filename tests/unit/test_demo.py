"""What stands behind the demo page: requests, uploads, pictures and the one thread that draws; without a browser."""

import io
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from autoregressive.demo import main as demo
from autoregressive.demo import uploads
from autoregressive.demo.asked import asked_for
from autoregressive.demo.handlers import CONTROL_NAMES
from autoregressive.demo.pictures import SETTINGS_KEY, TEXT_KEY, file_name
from autoregressive.demo.uploads import enlarged, open_picture, painted, picture_limits
from autoregressive.sample.pipeline import PictureSampling
from tests.demo_handlers import ASKED, SlowPipeline, asked, make_handlers, tiny_pipeline, wait_until
from tests.sampling_models import CODEBOOK
from utils.program import UserError
from utils.settings import parse


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("models"))


@pytest.fixture
def handlers(pipeline, tmp_path):
    return make_handlers(pipeline, tmp_path)


def paint(pixels: int, rows: slice) -> Image.Image:
    """A layer of the editor with `rows` painted."""
    layer = np.zeros((pixels, pixels, 4), np.uint8)
    layer[rows] = (228, 87, 46, 153)
    return Image.fromarray(layer)


def test_pictures_grow_and_are_kept_with_their_settings(handlers, pipeline):
    views = list(handlers.draw((), *asked()))
    assert 2 <= len(views) <= 4  # rows of codes; one pass may finish several
    assert [view.kept is None for view in views] == [True] * (len(views) - 1) + [False]
    assert len({view.stage for view in views if view.stage}) > 1
    assert "% drawn" in views[0].status
    assert "2 pictures in " in views[-1].status
    assert "images/s" in views[-1].status
    again = pipeline([3, 3], seed=5, cfg_scale=2.0, top_k=0)
    for number, picture in enumerate(views[-1].kept):
        with Image.open(picture.file) as image:
            assert np.array_equal(np.asarray(image), np.asarray(again[number]))
            told = json.loads(image.text[SETTINGS_KEY])
            assert "guidance 2.0" in image.text[TEXT_KEY]
        assert told == picture.settings
        assert told.items() >= {"class": "digit 3", "label": 3, "seed": 5, "number": number, "temperature": 1.0}.items()
        assert told["model"] == "GPT-Tiny (c2i_B_256.pt)"
        assert str(pipeline.gpt_info.checkpoint) not in json.dumps(told)


def test_newer_pictures_come_first_and_the_oldest_are_left_out(handlers, monkeypatch):
    monkeypatch.setattr("autoregressive.demo.handlers.MOST_KEPT", 3)
    kept = ()
    for seed in (1, 2):
        kept = list(handlers.draw(kept, *asked(seed=seed)))[-1].kept
    assert [(picture.settings["seed"], picture.settings["number"]) for picture in kept] == [(2, 0), (2, 1), (1, 0)]


def test_pictures_that_were_deleted_leave_the_gallery(handlers):
    (old, deleted) = list(handlers.draw((), *asked()))[-1].kept
    deleted.file.unlink()
    with pytest.raises(UserError, match="too old and has been deleted; draw it again"):
        deleted.opened()
    kept = list(handlers.draw((old, deleted), *asked(seed=6)))[-1].kept
    assert [picture.settings["seed"] for picture in kept] == [6, 6, 5]
    assert kept[-1] is old


def test_an_edit_is_the_pipelines(handlers, pipeline):
    (base,) = pipeline(7, seed=1, cfg_scale=2.0, top_k=0)
    last = list(handlers.edit((), base, [paint(512, slice(128, 256))], 3, *asked()))[-1]
    mask = np.zeros((16, 16), dtype=bool)
    mask[4:8] = True
    same = pipeline([3, 3], seed=5, cfg_scale=2.0, top_k=0, image=base, mask=mask, candidates=3)
    assert [Image.open(picture.file).tobytes() for picture in last.kept] == [image.tobytes() for image in same]
    assert last.kept[0].settings.items() >= {"drawn anew": "25% of the picture", "candidates": 3}.items()
    assert last.kept[0].caption == "3 · seed 5 ✎"


BAD_VALUES = [
    ({"class": "cat"}, "'cat' fits no class"),
    ({"class": "digit"}, "'digit' fits several classes"),
    ({"class": 10}, "there is no class 10; this page takes labels 0 to 9"),
    ({"class": -1}, "there is no class -1"),
    ({"class": None}, "this page takes labels 0 to 9, or names"),
    ({"class": [3, 4]}, "this page takes labels"),
    ({"class": "x" * 10**6}, "fits no class"),
    ({"count": 0}, "the number of pictures must be from 1 to 16, not 0"),
    ({"count": 10**9}, "from 1 to 16"),
    ({"count": 1.5}, "the number of pictures must be a whole number"),
    ({"seed": -1}, "the seed must be from 0 to"),
    ({"seed": 2**64}, "the seed must be from 0 to"),
    ({"seed": None}, "the seed must be a number"),
    ({"seed": float("nan")}, "the seed must be a whole number"),
    ({"cfg_scale": 0.5}, "guidance must be at least 1, got 0.5"),
    ({"cfg_scale": float("inf")}, "guidance must be a number of at most 20 digits"),
    ({"cfg_scale": 1e5}, r"guidance must be at most 100, not 100000\."),
    ({"cfg_scale": 1e38}, "guidance must be a number of at most 20 digits"),
    ({"top_k": 1e300}, "top-k must be a number of at most 20 digits"),
    ({"top_k": 10**400}, "top-k must be a number of at most 20 digits"),
    ({"top_k": 10**7}, r"top-k must be at most 1048576, not 1e\+07"),
    ({"count": 1e300}, "the number of pictures must be a number of at most 20 digits"),
    ({"cfg_scale": "2"}, "guidance must be a number"),
    ({"temperature": -1}, "temperature must be at least 0"),
    ({"top_k": -5}, "top-k must be at least 0"),
    ({"top_k": 2.5}, "top-k must be a whole number"),
    ({"top_p": 0}, "top-p must be above 0 and at most 1"),
    ({"top_p": True}, "top-p must be a number"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD_VALUES)
def test_bad_values_are_refused_in_the_words_of_the_page(handlers, changes, sentence):
    with pytest.raises(UserError, match=sentence) as refusal:
        next(handlers.draw((), *asked(**changes)))
    assert len(str(refusal.value)) < 300
    assert "--" not in str(refusal.value)


def test_every_way_to_name_a_class(pipeline):
    for entry in (3, "3", "digit 3", " Digit 3 ", "3 digit 3"):
        values = dict(zip(CONTROL_NAMES, asked(**{"class": entry}), strict=True))
        assert asked_for(values, pipeline.class_names, PictureSampling(), 16).label == 3
    names = ["a, b", "7", "c"]  # a name with a comma, and one that is another class's number
    assert asked_for(ASKED | {"class": "a, b"}, names, PictureSampling(), 16).label == 0
    assert asked_for(ASKED | {"class": "1 7"}, names, PictureSampling(), 16).label == 1


def test_settings_without_a_control_are_those_of_the_command_line(pipeline):
    usual = PictureSampling(cfg_schedule="linear", draw="inverse-cdf")
    sampling = asked_for(ASKED, pipeline.class_names, usual, 16).sampling
    assert (sampling.cfg_schedule, sampling.draw, sampling.cfg_scale) == ("linear", "inverse-cdf", 2.0)


@pytest.mark.parametrize(
    ("picture", "rows", "candidates", "sentence"),
    [
        (False, slice(8, 16), 1, "there is no picture to edit"),
        (True, slice(0, 0), 1, "nothing is painted"),
        (True, slice(8, 16), 0, "the number of candidates must be from 1 to 8"),
        (True, slice(8, 16), 9, "from 1 to 8"),
        (True, slice(0, 16), 2, "nothing is kept behind what is drawn"),
        (True, slice(4, 8), 8, "2 pictures of 8 candidates each are 16 to draw at once, and this page draws 8"),
    ],
)
def test_bad_edits_are_refused(pipeline, tmp_path, picture, rows, candidates, sentence):
    base = Image.new("RGB", (16, 16)) if picture else None
    handlers = make_handlers(pipeline, tmp_path, most=8)
    with pytest.raises(UserError, match=sentence):
        next(handlers.edit((), base, [paint(16, rows)], candidates, *asked()))


def encoded(image: Image.Image, format: str = "png") -> bytes:
    data = io.BytesIO()
    image.save(data, format=format)
    return data.getvalue()


WHOLE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)))
GIF = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no PNG or JPEG or WEBP picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG or JPEG or WEBP picture"),
        (WHOLE[: len(WHOLE) // 2], "or it is broken"),
        (WHOLE[:60] + bytes(len(WHOLE) - 60), "or it is broken"),
        (GIF, "no PNG or JPEG or WEBP picture"),
        (encoded(Image.new("1", (10000, 10000))), "the picture has 100 megapixels, and this page takes 24"),
        (encoded(Image.new("1", (6000, 5000))), "has 30 megapixels"),
        (WHOLE + bytes(uploads.MAX_BYTES), "larger than 20 MB"),
    ],
)
def test_bad_pictures_are_refused_before_they_are_decoded(handlers, tmp_path, monkeypatch, content, sentence):
    (tmp_path / "picture.png").write_bytes(content)
    if "megapixels" in sentence:
        monkeypatch.setattr(uploads, "center_crop", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=sentence):
        handlers.upload(str(tmp_path / "picture.png"))
    with picture_limits(), pytest.raises(UserError, match=r"has \d+ mega|more than 24 mega|broken|larger than"):
        handlers.upload(str(tmp_path / "picture.png"))
    with pytest.raises(UserError, match="no picture has come"):
        handlers.upload(None)


@pytest.mark.parametrize("format", ["EPS", "TIFF", "GIF", "BMP", "PPM", "ICO"])
def test_nobody_opens_other_formats_while_the_page_is_served(format):
    content = encoded(Image.new("RGB", (16, 16)), format)
    with picture_limits():
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(content))
        for plain in uploads.FORMATS:
            assert Image.open(io.BytesIO(encoded(Image.new("RGB", (16, 16)), plain))).format == plain
    assert Image.open(io.BytesIO(content)).format == format


def test_pictures_of_every_kind_become_the_models(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # shown rotated by 90 degrees
    striped = Image.new("RGB", (64, 32), "red")
    striped.paste("blue", (32, 0, 64, 32))
    striped.save(tmp_path / "turned.jpg", exif=turned)
    shown = np.asarray(open_picture(tmp_path / "turned.jpg", 32))
    assert shown.shape == (32, 32, 3)
    assert shown[2, 16, 0] > 200 > 50 > shown[2, 16, 2]  # red above, blue below
    assert shown[-3, 16, 2] > 200
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_picture(tmp_path / "clear.png", 16)).min() == 255
    for mode in ("1", "L", "P", "LA", "I;16", "RGBA"):
        Image.new(mode, (20, 30)).save(tmp_path / "mode.png")
        assert open_picture(tmp_path / "mode.png", 16).mode == "RGB"


def test_paint_of_the_enlarged_picture_falls_on_its_pixels():
    assert enlarged(Image.new("RGB", (32, 32))).size == (512, 512)
    assert enlarged(Image.new("RGB", (384, 384))).size == (384, 384)
    assert not painted([], 32).any()
    mask = painted([paint(512, slice(160, 167)), paint(512, slice(480, 496))], 32)  # less than half of row 10; row 30
    assert np.flatnonzero(mask.any(1)).tolist() == [30]
    assert mask[30].all()


def test_a_drawing_that_is_closed_stops(pipeline, tmp_path):
    slow = SlowPipeline(pipeline, 0)
    steps = make_handlers(slow, tmp_path).draw((), *asked())
    next(steps)
    steps.close()
    wait_until(lambda: slow.closed)
    assert (slow.rows, slow.running) == (1, 0)


def test_a_drawing_that_nobody_closes_ends_with_the_next_and_all_steps_share_a_thread(pipeline, tmp_path):
    slow = SlowPipeline(pipeline, 0)
    handlers = make_handlers(slow, tmp_path)
    left = handlers.draw((), *asked(seed=1))
    next(left)
    assert slow.running == 1
    answered = []
    other = threading.Thread(target=lambda: answered.extend(handlers.draw((), *asked(seed=2))))
    other.start()
    other.join()
    assert answered[-1].kept[0].settings["seed"] == 2
    wait_until(lambda: slow.closed == 2)
    assert (slow.running, slow.most_running) == (0, 1)
    assert next(left, None) is None
    assert len(slow.threads) == 1


def raising(error: BaseException):
    def stream(*_, **__):
        raise error
        yield  # never reached: it makes this a generator, as the pipeline's is

    return stream


def test_memory_that_is_not_enough_is_said_and_bugs_are_not_hidden(handlers, monkeypatch):
    for error in (MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})()):
        monkeypatch.setattr(handlers.pipeline, "stream", raising(error))
        with pytest.raises(UserError, match="not enough memory for so many pictures"):
            list(handlers.draw((), *asked()))
    monkeypatch.setattr(handlers.pipeline, "stream", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        list(handlers.draw((), *asked()))


def test_names_of_checkpoints_tell_no_folders():
    assert file_name("/home/me/results/run/checkpoints/last.pt") == "run/last.pt"
    assert file_name("/home/me/c2i_B_256.pt") == "c2i_B_256.pt"


def test_without_a_model_it_says_where_to_get_one(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"bash scripts/quickstart.sh, or give --pretrained npp/c2i_B_256.pt"):
        demo.quickstart_model(tmp_path / "digits")
    (tmp_path / "digits/checkpoints").mkdir(parents=True)
    (tmp_path / "digits/checkpoints/last.pt").touch()
    assert demo.quickstart_model(tmp_path / "digits") == str(tmp_path / "digits")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"-m pip install -r requirements-demo.txt"):
        demo.import_serving()


def test_it_listens_to_this_machine_alone_unless_told():
    chosen = parse(demo.DemoSettings, "", [])
    assert (chosen.page.host, chosen.page.port, chosen.gpt.gpt_ckpt) == ("127.0.0.1", None, None)
    given = ["--pretrained", "a.pt", "--tokenizer", "b.pt", "--parallel", "4", "--host", "0.0.0.0"]
    chosen = parse(demo.DemoSettings, "", given)
    assert (chosen.gpt.gpt_ckpt, chosen.tokenizer.vq_ckpt, chosen.compute.parallel) == ("a.pt", "b.pt", 4)
    assert parse(demo.DemoSettings, "", ["--gpt-ckpt", "a.pt"]).gpt.gpt_ckpt == "a.pt"


def test_the_program_from_its_command_line_to_the_page(pipeline, monkeypatch, capsys):
    served = []
    serving = SimpleNamespace(choose_port=lambda host, port: port, serve=lambda *given: served.append(given))
    monkeypatch.setattr(demo, "import_serving", lambda: serving)
    sizes = ["--vq-model", "VQ-Tiny", "--codebook-size", str(CODEBOOK), "--codebook-embed-dim", "4"]
    weights = ["--pretrained", pipeline.gpt_info.checkpoint, "--tokenizer", pipeline.tokenizer_info.checkpoint]
    demo.main([*weights, *sizes, "--cfg-scale", "1.5", "--max-pictures", "3", "--port", "1234"])
    ((handlers, host, port),) = served
    assert (handlers.usual.cfg_scale, handlers.most, host, port) == (1.5, 3, "127.0.0.1", 1234)
    assert not handlers.folder.exists()  # it goes when the page does
    assert "GPT: GPT-Tiny" in capsys.readouterr().out


def test_sigterm_removes_the_files_of_visitors(pipeline, monkeypatch):
    def serve(handlers, host, port):
        folders.append(handlers.folder)
        (handlers.folder / "upload.png").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    folders, before = [], signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serving = SimpleNamespace(choose_port=lambda host, port: port, serve=serve)
    monkeypatch.setattr(demo, "import_serving", lambda: serving)
    monkeypatch.setattr(demo, "Pipeline", lambda *_: pipeline)
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.main(["--pretrained", "a.pt"])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not folders[0].exists()


def test_the_space_calls_the_program_as_it_is(monkeypatch, capsys):
    called, space = [], str(Path(demo.__file__).parents[2] / "examples/app.py")
    monkeypatch.setattr(demo, "main", called.append)
    monkeypatch.delenv("MODEL", raising=False)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(space, run_name="__main__")
    assert "set the Space's variable MODEL to a repository of weights" in capsys.readouterr().err
    monkeypatch.setenv("MODEL", "org/digits")
    runpy.run_path(space, run_name="__main__")
    chosen = parse(demo.DemoSettings, "", called[0])
    assert (chosen.gpt.gpt_ckpt, chosen.page.host, chosen.page.port) == ("org/digits", "0.0.0.0", 7860)
