"""The guides: every command is one that its program accepts, every link and every named file exists."""

import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from autoregressive import export
from autoregressive.demo import main as demo
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.train import config, extract_codes_c2i, verify_codes
from dataset import convert_codes
from evaluations.c2i import evaluator
from pretrained_models.catalogue import PUBLISHED
from tokenizer.tokenizer_image import reconstruct, vq_setup
from utils.settings import make_parser, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pretrained_models/README.md", "tests/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md")) + [ROOT / "evaluations/c2i/README.md"]
SETTINGS = {
    "scripts/tokenizer/train_vq.sh": vq_setup.VQTrainSettings,
    "scripts/tokenizer/reconstruction_vq.sh": reconstruct.ReconstructSettings,
    "scripts/autoregressive/extract_codes_c2i.sh": extract_codes_c2i.ExtractionSettings,
    "scripts/autoregressive/verify_codes.sh": verify_codes.VerifySettings,
    "scripts/autoregressive/convert_codes.sh": convert_codes.ConversionSettings,
    "scripts/autoregressive/train_c2i.sh": config.TrainSettings,
    "scripts/autoregressive/train_c2i_fsdp.sh": config.TrainSettings,
    "scripts/autoregressive/sample_c2i.sh": sample_c2i_ddp.SampleSettings,
    "scripts/export.sh": export.ExportSettings,
    "scripts/demo.sh": demo.DemoSettings,
    "scripts/autoregressive/sample_one_c2i.sh": sample_c2i.PictureSettings,
    "evaluations/c2i/evaluator.py": evaluator.EvaluatorSettings,
}
OWN_DATA = (ROOT / "docs/own-data.md").read_text()


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's bash blocks, with the page's shell variables put in."""
    found, variables = [], {"NUMBER_OF_FOLDERS": "2"}
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r"""([A-Z]+)=["'](.*)["']""", line):
                variables["$" + assigned[1]] = assigned[2]
                continue
            for name, value in variables.items():
                line = line.replace(name, value)
            if words := shlex.split(line, comments=True):
                found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_accepted(page):
    for words in commands(page):
        while "=" in words[0]:  # variables of the environment
            words = words[1:]
        interpreter, script, *flags = words
        if not script.startswith(("scripts/", "evaluations/")):
            continue
        assert interpreter == ("python3" if script.endswith(".py") else "bash")
        assert (ROOT / script).is_file()
        if script == "scripts/download.sh":
            assert set(flags) <= set(PUBLISHED)
        elif script in SETTINGS:
            parse(SETTINGS[script], "", flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link, place in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if place:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert place in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_files_of_the_architecture_exist():
    page = (ROOT / "docs/architecture.md").read_text()
    for row in re.findall(r"^\| .*? \| (.*) \|$", page, re.MULTILINE):
        folder = ROOT
        for name in re.findall(r"`([\w./]+(?:\.py|\.sh|/))`", row):
            path = ROOT / name if "/" in name else folder / name
            assert path.exists(), name
            folder = path.parent


def test_flags_of_extending_exist_and_so_do_its_changes():
    page = (ROOT / "docs/extending.md").read_text()
    flags = set()
    for settings in SETTINGS.values():
        flags |= {flag for action in make_parser(settings, "")._actions for flag in action.option_strings}
    mentioned = set(re.findall(r"`(--[a-z-]+)", page))
    assert mentioned - flags == {"--like-the-field", "--logit-scale"}
    code = (ROOT / "autoregressive/models/gpt.py").read_text() + (ROOT / "utils/engine/learning_rate.py").read_text()
    for changed in re.findall(r"^-(.*)$", "".join(re.findall(r"```diff\n(.*?)```", page, re.DOTALL)), re.MULTILINE):
        assert changed in code


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_well_formed_and_adapt_to_dark_pages(picture):
    root = ElementTree.parse(picture).getroot()
    assert root.find("{*}title") is not None
    assert "prefers-color-scheme: dark" in root.find("{*}style").text


def test_the_guide_to_own_data_has_every_step():
    steps = ("train_vq", "reconstruction_vq", "extract_codes_c2i", "train_c2i", "sample_c2i", "evaluate")
    assert all(f"{step}." in OWN_DATA for step in steps)


def test_reconstructions_of_the_guide_have_names_of_their_own():
    """So that measuring the second tokenizer is not refused for the first one's results; and FID finds them."""
    guide = commands(ROOT / "docs/own-data.md")
    lines = [flags for _, script, *flags in guide if script.endswith("reconstruction_vq.sh")]
    names = [parse(reconstruct.ReconstructSettings, "", line).name for line in lines]
    assert len(names) == 2
    assert None not in names
    assert len(set(names)) == len(names)
    scored = re.findall(r"reconstructions/(\S+?)(?:-originals)?\.npz", OWN_DATA)
    assert set(scored) <= set(names)
