"""The shape of the code: which folder may import which, where namespaces end, and the published flags."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scripts", "benchmarks", "examples", "autoregressive", "tokenizer", "dataset", "evaluations", "utils")
MAY_IMPORT = {  # beside itself; pretrained_models is what weights are called by
    "utils": set(),
    "pretrained_models": {"utils"},
    "dataset": {"utils"},
    "tokenizer": {"dataset", "pretrained_models", "utils"},
    "autoregressive": {"tokenizer", "dataset", "pretrained_models", "utils"},
    "evaluations": {"dataset", "utils"},
    "examples": {"autoregressive", "tokenizer", "dataset", "utils"},
}


def sources() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.split() if (path := ROOT / name).exists()]


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def test_dependencies_point_one_way():
    projects = {*PACKAGES, "pretrained_models", "tests"}
    for path in sources():
        package = path.relative_to(ROOT).parts[0]
        if package in MAY_IMPORT:
            forbidden = imported(path) & projects - MAY_IMPORT[package] - {package}
            assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_models_know_nothing_of_processes_and_command_lines():
    for path in (ROOT / "autoregressive/models").glob("*.py"):
        assert "argparse" not in imported(path), path
        assert "torch.distributed" not in path.read_text(), path


def test_namespaces_end_where_command_lines_are_read():
    """A function below `main` takes settings; only old files still carry a namespace."""
    allowed = {"utils/settings.py", "utils/checkpoint.py"}
    for path in sources():
        name = str(path.relative_to(ROOT))
        if name.split("/")[0] in PACKAGES and name not in allowed:
            assert "Namespace" not in path.read_text(), name


PUBLISHED_FLAGS = {
    "autoregressive.train.extract_codes_c2i": """--data-path --code-path --vq-model=VQ-16 --vq-ckpt
        --codebook-size=16384 --codebook-embed-dim=8 --dataset=imagenet --image-size=256 --ten-crop --crop-range=1.1
        --global-seed=0 --num-workers=24 --debug""",
    "autoregressive.train.train_c2i": """--code-path --cloud-save-path --no-local-save --gpt-model=GPT-B --gpt-ckpt
        --gpt-type=c2i --vocab-size=16384 --ema --cls-token-num=1 --dropout-p=0.1 --token-dropout-p=0.1
        --drop-path-rate=0.0 --no-compile --results-dir=results --dataset=imagenet_code --image-size=256
        --downsample-size=16 --num-classes=1000 --epochs=300 --lr=0.0001 --weight-decay=0.05 --beta1=0.9 --beta2=0.95
        --max-grad-norm=1.0 --global-batch-size=256 --global-seed=0 --num-workers=24 --log-every=100
        --ckpt-every=250000 --gradient-accumulation-steps=1 --mixed-precision=bf16 --epoch-rate=0.5 --patch-level=2
        --scheduler --decay-ratio=0.2 --end-lr=1e-05 --warmup-epochs=1.0""",
    "autoregressive.sample.sample_c2i_ddp": """--gpt-model=GPT-B --gpt-ckpt --gpt-type=c2i --from-fsdp
        --cls-token-num=1 --precision=bf16 --compile --vq-model=VQ-16 --vq-ckpt --codebook-size=16384
        --codebook-embed-dim=8 --image-size=384 --image-size-eval=256 --downsample-size=16 --num-classes=1000
        --cfg-scale=1.5 --cfg-interval=-1 --sample-dir=samples --per-proc-batch-size --num-fid-samples=50000
        --global-seed=0 --top-k=0 --temperature=1.0 --top-p=1.0""",
}


def settings_of(module: str):
    import importlib

    names = {
        "autoregressive.train.extract_codes_c2i": "ExtractionSettings",
        "autoregressive.train.train_c2i": "TrainSettings",
        "autoregressive.sample.sample_c2i_ddp": "SampleSettings",
    }
    return getattr(importlib.import_module(module), names[module])


@pytest.mark.parametrize("module", PUBLISHED_FLAGS)
def test_published_flags_keep_their_names_and_defaults(module):
    """Where a checkpoint says what a flag is about, the published default holds for files that say nothing."""
    from utils.settings import make_parser

    parser = make_parser(settings_of(module), "")
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    for published in PUBLISHED_FLAGS[module].split():
        flag, _, default = published.partition("=")
        assert flag in actions, flag
        action = actions[flag]
        if default and action.default is None:
            assert default in action.help, f"{flag}: the help names no published default {default}: {action.help}"
        elif default:
            assert str(action.default) == default, flag
