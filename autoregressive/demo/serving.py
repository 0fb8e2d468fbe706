"""The page as a web server that talks to nobody but its visitors."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
from gradio import processing_utils
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from autoregressive.demo import views
from autoregressive.demo.handlers import Handlers
from autoregressive.demo.page import SCRIPT, THEME, build_page
from autoregressive.demo.uploads import MAX_BYTES, picture_limits
from utils.program import UserError

PORTS = range(7860, 7960)
# Browsers load nothing from other hosts, whatever the page or its framework asks for.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
CLOSED = "/process_recording"  # of the framework, which hands what is sent there to ffmpeg; the page has no videos


class OwnHostOnly:
    """ASGI middleware that sends `POLICY` with every answer, and has none at `CLOSED`."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        closed = scope["type"] == "http" and scope["path"].rstrip("/").endswith(CLOSED)
        app = PlainTextResponse("Not Found", 404) if closed else self.app
        await app(scope, receive, send_with_policy)


def choose_port(host: str, wanted: int | None) -> int:
    """The port `wanted`, or the first of `PORTS` on which the page can listen. Raises `UserError` if it cannot."""
    for port in PORTS if wanted is None else (wanted,):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
            return port
        except OSError as error:
            reason = error.strerror
            if error.errno != errno.EADDRINUSE:
                break
    at = host if wanted is None else f"{host}, port {wanted}"
    raise UserError(f"the page cannot listen at {at}: {reason}; give another --host or --port.")


@contextmanager
def no_downloads():
    """Within it, an address in the place of a file is refused, which Gradio would download for any visitor."""

    async def refuse(url, cache_dir):
        raise gr.Error("This page takes files, not addresses; upload the picture.", print_exception=False)

    download = processing_utils.async_ssrf_protected_download  # if a version of Gradio lacks it, nothing is served
    processing_utils.async_ssrf_protected_download = refuse
    try:
        yield
    finally:
        processing_utils.async_ssrf_protected_download = download


@contextmanager
def launched(handlers: Handlers, host: str, port: int) -> Iterator[gr.Blocks]:
    """The page, served in the background."""
    os.environ["GRADIO_TEMP_DIR"] = str(handlers.folder)  # uploads go where finished pictures are
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost", host]))  # it calls itself
    page = build_page(handlers)
    with picture_limits(), no_downloads():
        _launch(page, host, port)
        try:
            yield page
        finally:
            page.close(verbose=False)


def _launch(page: gr.Blocks, host: str, port: int) -> None:
    page.launch(
        server_name=host,
        server_port=port,
        theme=THEME,
        css=views.STYLE,
        js=SCRIPT,
        max_file_size=MAX_BYTES,
        app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
        prevent_thread_lock=True,
        show_error=False,  # of the framework's own errors, which name folders; refusals are shown all the same
        quiet=True,
        inline=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )


def serve(handlers: Handlers, host: str, port: int) -> None:
    """Until the program is interrupted."""
    with launched(handlers, host, port) as page:
        print(f"page: {page.local_url}    (Ctrl-C ends it)", flush=True)
        page.block_thread()
