"""The demo page served: by HTTP as an impolite visitor speaks it, and in a real browser.

    NPP_DEMO_MODEL=quickstart/gpt/digits NPP_DEMO_PICTURE=docs/demo.png pytest -k browser

takes the documentation's picture of the page, with a model that has learned something.
"""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from autoregressive.demo.pictures import SETTINGS_KEY
from autoregressive.sample.pipeline import Pipeline
from tests.demo_handlers import SlowPipeline, asked, make_handlers, tiny_pipeline, wait_until
from tests.processes import free_port
from utils.program import UserError

pytest.importorskip("gradio", reason="the page needs Gradio: requirements-demo.txt")
import httpx
from gradio import processing_utils
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from autoregressive.demo.serving import PORTS, choose_port, launched

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODEL, PICTURE = os.environ.get("NPP_DEMO_MODEL"), os.environ.get("NPP_DEMO_PICTURE")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    tiny = Pipeline.from_pretrained(MODEL) if MODEL else tiny_pipeline(tmp_path_factory.mktemp("models"))
    return SlowPipeline(tiny, 0 if MODEL else 0.3)


@pytest.fixture(scope="module")
def page(pipeline, tmp_path_factory):
    """Its address. Meanwhile this process speaks to nobody but itself."""
    hosts, connect = set(), socket.socket.connect

    def noted(self, address):
        hosts.add(address[0] if isinstance(address, tuple) else "a local socket")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", noted)
        patch.setenv("GRADIO_TEMP_DIR", "")
        patch.setenv("NO_PROXY", "")
        with launched(make_handlers(pipeline, tmp_path_factory.mktemp("page")), "127.0.0.1", free_port()) as served:
            yield served.local_url
    assert hosts <= {"127.0.0.1", "localhost", "::1", "a local socket"}


@pytest.fixture(scope="module")
def visitor(page):
    return Client(page, verbose=False)


def layer(tmp_path: Path, side: int = 16, format: str = "png") -> dict:
    """What the editor sends: a picture, and a layer of paint."""
    Image.new("RGB", (side, side)).save(tmp_path / f"layer.{format}")
    return edited(handle_file(tmp_path / f"layer.{format}"))


def edited(sent: dict) -> dict:
    return {"background": sent, "layers": [sent], "composite": sent, "id": None}


def answer_to(place: str, data: list) -> str:
    """What a visitor is told who goes past the client, which would send files first."""
    asked_for = httpx.post(place, json={"data": data}, timeout=60).json()
    return httpx.get(f"{place}/{asked_for['event_id']}", timeout=60).text


def named(path: str) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class": "cat"}, "'cat' fits no class"),
        ({"class": 77}, "There is no class 77"),
        ({"count": 10**6}, "number of pictures must be from 1 to 16"),
        ({"seed": -1}, "The seed must be from 0"),
        ({"cfg_scale": 0.2}, "Guidance must be at least 1"),
        ({"temperature": "hot"}, "Temperature must be a number"),
        ({"top_p": 2}, "Top-p must be above 0 and at most 1"),
    ],
)
def test_bad_values_are_refused(visitor, changes, sentence):
    with pytest.raises(AppError, match=sentence):
        visitor.predict(*asked(**changes), api_name="/draw")


def test_bad_pictures_are_refused(visitor, tmp_path, page):
    def upload(content: bytes | None, name: str = "picture.png"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return visitor.predict(handle_file(tmp_path / name), api_name="/upload")

    with pytest.raises(AppError, match="This is no PNG or JPEG or WEBP picture, or it is broken"):
        upload(b"no picture")
    Image.new("1", (10000, 10000)).save(tmp_path / "large.png")
    with pytest.raises(AppError, match="more than 24 megapixels, and this page takes 24"):
        upload(None, "large.png")
    with pytest.raises(Exception, match="413|exceeds"):
        upload(bytes(21 * 2**20))
    answer = answer_to(f"{page}gradio_api/call/upload", [named(str(ROOT / "docs/samples.png"))])
    assert "event: error" in answer
    assert "samples.png" not in answer
    with pytest.raises(AppError, match="There is no picture to edit"):
        visitor.predict(layer(tmp_path), 1, *asked(), api_name="/edit")
    with pytest.raises(AppError, match="more than 24 megapixels, and this page takes 24"):
        visitor.predict(layer(tmp_path, 10000), 1, *asked(), api_name="/edit")


def test_layers_in_other_formats_start_no_interpreter(visitor, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **_: started.append(given))
    for format in ("eps", "tiff", "gif"):
        with pytest.raises(AppError, match="This is no PNG or JPEG or WEBP picture, or it is broken") as refusal:
            visitor.predict(layer(tmp_path, format=format), 1, *asked(), api_name="/edit")
        assert "layer" not in str(refusal.value)  # the place of the file on the server is not told
    assert not started


def test_no_address_is_fetched_for_a_visitor(page, monkeypatch):
    fetched = []
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_get", lambda url: fetched.append(url))
    elsewhere = named("https://example.com/a.png")
    data = {"upload": [elsewhere], "edit": [edited(elsewhere), 1, *asked()]}
    for name, values in data.items():
        answer = answer_to(f"{page}gradio_api/call/{name}", values)
        assert "event: error" in answer
        assert "This page takes files, not addresses; upload the picture." in answer
    assert not fetched
    assert httpx.post(f"{page}gradio_api/process_recording", files={"video": b"a video"}).status_code == 404


def test_two_visitors_take_turns_and_one_who_leaves_stops(page, visitor, pipeline):
    """And after all that was refused the page still draws."""
    pipeline.most_running = 0
    other = Client(page, verbose=False)
    jobs = [client.submit(*asked(), api_name="/draw") for client in (visitor, other)]
    for job in jobs:
        assert "2 pictures in" in job.result(timeout=20)[1]
    before = pipeline.rows
    leaving = other.submit(*asked(count=16), api_name="/draw")
    wait_until(lambda: pipeline.rows > before)
    leaving.cancel()
    assert "1 picture in" in visitor.predict(*asked(count=1), api_name="/draw")[1]
    wait_until(lambda: not pipeline.running)
    assert pipeline.most_running == 1
    assert pipeline.rows < before + 8  # of 12


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: apt-get install chromium")
def test_browser(page, visitor, pipeline, tmp_path):
    """A visitor chooses a class, waits in the queue, watches the pictures grow, takes one home, edits it, leaves."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser needs playwright: pip install playwright"
    )
    with playwright.sync_playwright() as drivers:
        browser = drivers.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(20_000)
        addresses = set()
        tab.on("request", lambda request: addresses.add(request.url))
        tab.goto(page)
        choose(tab, "7", "7 digit")
        pipeline.gate.clear()
        before_us = visitor.submit(*asked(), api_name="/draw")
        wait_until(lambda: pipeline.running)
        tab.locator("#draw").click()
        tab.locator("#status").get_by_text("queue").wait_for()
        pipeline.gate.set()
        before_us.result(timeout=20)
        stages, status = watch(tab, "#stage img", "#status")
        assert len(stages) > 1
        assert "4 pictures in" in status
        take_home(tab, tmp_path / "7.png", label=7)
        edit(tab, "3", "3 digit")
        if PICTURE:
            photograph(tab, Path(PICTURE))
        tab.close()
        stop_and_leave(browser.new_page(), page, pipeline)
        browser.close()
    assert all(address.startswith((page, "data:", "blob:")) for address in addresses), addresses


def choose(tab, typed: str, listed: str) -> None:
    """A class, by searching for it."""
    tab.locator("#class input").click()
    tab.keyboard.type(typed)
    tab.get_by_role("option", name=listed).click()


def watch(tab, images: str, status: str) -> tuple[set[str], str]:
    """What was seen of the first picture until all are finished, and what is said then."""
    stages, said = set(), ""
    while "images/s" not in said:
        if tab.locator(images).count():
            stages.add(tab.locator(images).first.get_attribute("src"))
        said = tab.locator(status).inner_text()
    stages.add(tab.locator(images).first.get_attribute("src"))
    return stages, said


def take_home(tab, path: Path, label: int) -> None:
    """The second picture's settings are shown, and stand in the file that is downloaded."""
    tab.locator("#gallery button").nth(1).click()
    tab.locator("#facts").get_by_text("guidance").wait_for()
    with tab.expect_download() as download:
        tab.locator("#download").click()
    download.value.save_as(path)
    told = json.loads(Image.open(path).text[SETTINGS_KEY])
    assert (told["label"], told["number"], told["guidance"]) == (label, 1, 2.0)


def edit(tab, typed: str, listed: str) -> None:
    tab.locator("#take").click()
    canvas = tab.locator("#editor canvas").first
    canvas.wait_for()
    choose(tab, typed, listed)
    tab.locator("#redraw").click()
    tab.get_by_text("Nothing is painted; paint over what is to be drawn anew.").wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(across - 80, down + 30)
    tab.mouse.down()
    for right, below in ((80, 30), (-80, 100), (80, 100)):
        tab.mouse.move(across + right, down + below)
    tab.mouse.up()
    tab.locator("#redraw").click()
    stages, status = watch(tab, "#edited img", "#edit-status")
    assert stages
    assert "4 pictures in" in status
    tab.locator("#gallery button").nth(7).wait_for()  # four more than before


def photograph(tab, path: Path) -> None:
    """The page as it is, for the documentation."""
    tab.get_by_label("Close").first.click()
    tab.mouse.move(0, 0)
    tab.evaluate("scrollTo({top: 0})")
    tab.wait_for_timeout(500)
    tab.screenshot(path=path)


def stop_and_leave(tab, page: str, pipeline: SlowPipeline) -> None:
    """Both end a drawing before its four rows are done."""
    pipeline.seconds = 1.0
    for end in (lambda: tab.locator("#stop").click(), tab.close):
        tab.goto(page)
        before = pipeline.rows
        tab.locator("#draw").click()
        wait_until(lambda before=before: pipeline.rows > before)
        end()
        wait_until(lambda: not pipeline.running)
        assert pipeline.rows < before + 4


def test_an_address_that_is_taken_or_another_machines_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1, port {port}: Address already in use; give"):
            choose_port("127.0.0.1", port)
        found = choose_port("127.0.0.1", None)
    assert found in PORTS
    with pytest.raises(UserError, match="cannot listen at 192.0.2.1: Cannot assign requested address"):
        choose_port("192.0.2.1", None)
