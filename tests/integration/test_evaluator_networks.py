"""Networks of features that the evaluator refuses: missing, damaged, of another interface, or with code in them."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from tests.evaluator_runs import TinyClassifier, exported, refuse, tiny_network
from tests.inception_graph import InceptionGraph
from tests.tensorflow_reference import synthetic_images


def test_refused_networks(sets, monkeypatch, capsys, tmp_path):
    reference, sample = sets
    network = ("--features", tiny_network())

    def refusal(*arguments):
        return refuse(monkeypatch, capsys, *arguments)

    assert "there is no exported network" in refusal(reference, sample, "--features", tmp_path / "none.pt2")
    assert "is a text file, not a torch.export file" in refusal(reference, sample, "--features", __file__)
    np.savez(tmp_path / "larger.npz", arr_0=synthetic_images(0, 5, 24, 24))
    assert "does not accept images of shape" in refusal(reference, tmp_path / "larger.npz", *network)
    assert "there is no graph file" in refusal(reference, sample, "--graph", tmp_path / "none.pb")
    assert "is not ADM's frozen Inception graph" in refusal(reference, sample, "--graph", __file__)
    assert not sample.with_suffix(".txt").exists()
    assert not sample.with_suffix(".json").exists()


def test_features_that_are_not_finite(sets, monkeypatch, capsys, tmp_path):
    broken = InceptionGraph(32, repeated=True).content().replace(np.float32(0.001).tobytes(), np.float32(-9).tobytes())
    (tmp_path / "graph.pb").write_bytes(broken)  # the root of a negative variance
    message = refuse(monkeypatch, capsys, *sets, "--graph", tmp_path / "graph.pb")
    assert "is damaged (weights that are NaN or infinite)" in message

    class Undefined(TinyClassifier):
        def forward(self, images):
            pool, spatial, logits = super().forward(images)
            return pool / (pool - pool), spatial, logits

    message = refuse(monkeypatch, capsys, *sets, "--features", exported(Undefined(), tmp_path / "undefined.pt2"))
    assert "gives NaN or infinite features" in message


def test_exported_networks_with_another_result(sets, monkeypatch, capsys, tmp_path):
    class Pair(torch.nn.Module):
        def forward(self, images):
            return images.mean((1, 2)), images.mean(1)

    path = tmp_path / "other.pt2"
    torch.export.save(torch.export.export(TinyClassifier(), (torch.zeros(4, 16, 16, 3),)), path)
    message = refuse(monkeypatch, capsys, *sets, "--features", path)
    assert "export it for this image size with a dynamic batch dimension" in message
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(Pair(), (torch.zeros(2, 16, 16, 3),), dynamic_shapes=shapes), path)
    assert "it must return (pool (N, D)" in refuse(monkeypatch, capsys, *sets, "--features", path)


def rewritten(path: Path, ending: str, content: bytes) -> Path:
    """A copy of the tiny network in which the part with this ending holds something else."""
    with zipfile.ZipFile(tiny_network()) as source, zipfile.ZipFile(path, "w") as target:
        assert any(name.endswith(ending) for name in source.namelist())
        for name in source.namelist():
            target.writestr(name, content if name.endswith(ending) else source.read(name))
    return path


def test_a_damaged_exported_network(sets, monkeypatch, capsys, tmp_path):
    for ending, content in (("weights_config.json", b"{"), ("models/model.json", b"{}")):
        damaged = rewritten(tmp_path / "damaged.pt2", ending, content)
        assert "is not a torch.export file" in refuse(monkeypatch, capsys, *sets, "--features", damaged)


def test_files_that_are_no_exported_networks(sets, monkeypatch, capfd, tmp_path):
    """What PyTorch logs of them is silenced: `refuse` would find its traceback."""

    def refusal(path):
        return refuse(monkeypatch, capfd, *sets, "--features", path)

    assert "is a NumPy archive, not a torch.export file" in refusal(sets[0])
    (tmp_path / "page.pt2").write_text("<!DOCTYPE html><html>sign in</html>")
    assert "is a web page" in refusal(tmp_path / "page.pt2")
    with zipfile.ZipFile(tmp_path / "foreign.pt2", "w") as archive:
        archive.writestr("README", "nothing")
    assert "not a torch.export file" in refusal(tmp_path / "foreign.pt2")
    content = bytearray(tiny_network().read_bytes())
    content[content.index(b"nodes")] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(content)
    assert "differs from its checksum" in refusal(tmp_path / "flipped.pt2")
    content = tiny_network().read_bytes()
    entry = content.rindex(b"PK\x01\x02")
    for place in (entry, entry + 6, entry + 8, entry + 46):  # signature, version, whether encrypted, name
        flipped = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        (tmp_path / "flipped.pt2").write_bytes(flipped)
        assert "flipped.pt2 is " in refusal(tmp_path / "flipped.pt2")
    module = TinyClassifier()
    module.register_buffer("scale", torch.tensor(torch.inf))
    assert "weights that are NaN or infinite (scale)" in refusal(exported(module, tmp_path / "infinite.pt2"))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_exported_networks_are_not_unpickled(sets, monkeypatch, capsys, tmp_path):
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pt2"
    buffer = io.BytesIO()
    torch.save(Trap(sprung), buffer)
    for ending, content in (
        ("sample_inputs/model.pt", buffer.getvalue()),
        ("weights_config.json", b'{"config": {"w": {"path_name": "weight_0", "use_pickle": true}}}'),
        ("constants_config.json", b'{"config": {"w": {"path_name": "custom_obj_0", "use_pickle": true}}}'),
    ):
        message = refuse(monkeypatch, capsys, *sets, "--features", rewritten(path, ending, content))
        assert "holds pickled objects" in message
    assert not sprung.exists()
