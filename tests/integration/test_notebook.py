"""The notebook's cells run in order, with tiny models in place of the quickstart's, which test_readme.py takes."""

import ast
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.sampling_models import CODEBOOK, write_models

NOTEBOOK = Path(__file__).parents[2] / "examples/sample.ipynb"
QUICKSTART = '"../quickstart/gpt/digits"'


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    assert not any(cell.get("outputs") for cell in notebook["cells"])  # results are not in git
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict):
    """The value of the last expression, which Jupyter shows."""
    *statements, last = ast.parse(source).body
    exec(compile(ast.Module(statements, []), "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    exec(compile(ast.Module([last], []), "cell", "exec"), names)
    return None


@pytest.fixture
def models(tmp_path) -> str:
    """Arguments of `Pipeline.from_pretrained`."""
    write_models(tmp_path)
    sizes = f'vq_model="VQ-Tiny", codebook_size={CODEBOOK}, codebook_embed_dim=4, device="cpu"'
    return f"{str(tmp_path / 'c2i_B_256.pt')!r}, {str(tmp_path / 'vq.pt')!r}, {sizes}"


def run_notebook(models: str) -> None:
    """Its cells with other arguments of `Pipeline.from_pretrained` than the quickstart's folder."""
    shown, sources = [], cells()
    assert sources[0].count(QUICKSTART) == 1
    names = {"display": shown.append, "__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", sys.path.copy())
        values = [run_cell(source.replace(QUICKSTART, models), names) for source in sources]
    assert any(value in ([(3, "digit 3")], [(3, "digit_3")]) for value in values)  # the search for a class
    assert len(shown) == 7
    assert all(isinstance(picture, Image.Image) and picture.width > picture.height for picture in shown)


def test_the_notebook(models, capsys):
    run_notebook(models)
    assert "GPT: GPT-Tiny" in capsys.readouterr().out
