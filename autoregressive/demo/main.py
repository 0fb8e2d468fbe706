"""A page in the browser that draws pictures of a class while you watch, and edits them.

bash scripts/demo.sh --pretrained npp/c2i_B_256.pt
"""

import dataclasses
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from autoregressive.demo.handlers import Handlers
from autoregressive.models.load import GPTSettings
from autoregressive.sample.pipeline import ComputeSettings, PictureSampling, Pipeline, SamplerTokenizerSettings
from utils.program import UserError, run
from utils.settings import option, parse, settings

QUICKSTART = Path(__file__).parents[2] / "quickstart/gpt/digits"  # the run that scripts/quickstart.sh leaves


@settings("GPT")
class DemoGPTSettings(GPTSettings):
    gpt_ckpt: str | None = option(
        None,
        "what draws: a checkpoint, a run folder, a name of pretrained_models/README.md, or a folder or repository "
        "(ORG/NAME, ORG/NAME@REVISION) in the form of the Hugging Face hub (default: the quickstart's model)",
        flag="--pretrained",
        aliases=("--gpt-ckpt",),
    )


@settings("tokenizer")
class DemoTokenizerSettings(SamplerTokenizerSettings):
    vq_ckpt: str | None = option(
        None,
        "its tokenizer, named in the same ways (default: where the checkpoint of the GPT says that it lies)",
        flag="--tokenizer",
        aliases=("--vq-ckpt",),
    )


@settings("page")
class PageSettings:
    host: str = option("127.0.0.1", "address to listen on: this machine alone; 0.0.0.0: all networks it is in")
    port: int | None = option(
        None, "port to listen on (default: the first free one from 7860)", at_least=1, at_most=65535
    )
    max_pictures: int = option(16, "pictures, with all candidates, that one visitor may have drawn at once", at_least=1)


@settings("demo page")
class DemoSettings:
    gpt: DemoGPTSettings
    tokenizer: DemoTokenizerSettings
    compute: ComputeSettings
    sampling: PictureSampling
    page: PageSettings


def main(command: Sequence[str] | None = None) -> None:
    """Serve the page until it is interrupted; `command` takes the place of this program's command line."""
    chosen = parse(DemoSettings, __doc__.split("\n")[0], command)
    gpt = dataclasses.replace(chosen.gpt, gpt_ckpt=chosen.gpt.gpt_ckpt or quickstart_model())
    page, serving = chosen.page, import_serving()
    port = serving.choose_port(page.host, page.port)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Pipeline(gpt, chosen.tokenizer, chosen.compute, device)
    print(pipeline.describe(), flush=True)
    with terminated_as_interrupted(), tempfile.TemporaryDirectory(prefix="npp-demo-") as folder:
        handlers = Handlers(pipeline, chosen.sampling, page.max_pictures, Path(folder))
        serving.serve(handlers, page.host, port)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within it, SIGTERM ends the program as Ctrl-C does: files of visitors go with it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def import_serving():
    """The part that needs Gradio. Raises `UserError` where it is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the page needs Gradio, which {sys.executable} does not have; run: {sys.executable} -m pip install -r "
            "requirements-demo.txt"
        ) from error
    from autoregressive.demo import serving

    return serving


def quickstart_model(run_folder: Path = QUICKSTART) -> str:
    """Raises `UserError` that says how to come by a model."""
    if (run_folder / "checkpoints/last.pt").exists():
        return str(run_folder)
    raise UserError(
        "no model is named, and the quickstart's is not there; make that in minutes: bash scripts/quickstart.sh, or "
        "give --pretrained npp/c2i_B_256.pt after: bash scripts/download.sh vq_ds16_c2i.pt npp/c2i_B_256.pt"
    )


if __name__ == "__main__":
    run(main)
