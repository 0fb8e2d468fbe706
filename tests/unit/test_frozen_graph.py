"""The Inception graph: our interpreter against TensorFlow, and what it says about files that it cannot run."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations.c2i import features, frozen_graph
from evaluations.c2i.features import InceptionFeatures, InceptionNetwork
from evaluations.c2i.frozen_graph import FrozenGraph
from evaluations.c2i.graph_def import read_graph
from tests.inception_graph import FLOAT, InceptionGraph, constant, integer, integers, node, text
from tests.tensorflow_reference import graph_and_answers, needs_tensorflow, synthetic_images
from utils.program import UserError

CPU = torch.device("cpu")


@needs_tensorflow
@pytest.mark.parametrize("narrower", [8, 1], ids=["small", "full width"])
def test_features_equal_tensorflow(narrower):
    graph, images, answers = graph_and_answers(narrower)
    network = InceptionFeatures(graph, CPU)
    for name, array in images.items():
        ours = network(torch.from_numpy(array))
        assert ours.pool.dtype == torch.float32
        np.testing.assert_allclose(ours.pool, answers[f"{name}.pool"], atol=2e-4, rtol=0)
        np.testing.assert_allclose(ours.spatial, answers[f"{name}.spatial"], atol=2e-4, rtol=0)
        np.testing.assert_allclose(ours.logits.softmax(1), answers[f"{name}.probabilities"], atol=2e-4, rtol=0)
    assert answers["real.pool"].shape[1] == (2048 if narrower == 1 else 256)
    assert answers["real.spatial"].shape[1] == 2023
    assert network.network.dimensions == (answers["real.pool"].shape[1], 2023)


@pytest.fixture(scope="module")
def small_graph(tmp_path_factory) -> Path:
    return InceptionGraph(16).save(tmp_path_factory.mktemp("graph") / "graph.pb")


def test_bf16_features_are_close_and_float32_ones_do_not_depend_on_the_batch(small_graph):
    images = torch.from_numpy(synthetic_images(0, 6))
    network = InceptionFeatures(small_graph, CPU)
    full = network(images)
    torch.testing.assert_close(network(images[2:3]).pool, full.pool[2:3], atol=1e-5, rtol=0)
    rounded = InceptionFeatures(small_graph, CPU, "bf16")
    coarse = rounded(images)
    assert coarse.pool.dtype == torch.float32
    error = (coarse.pool - full.pool).norm() / full.pool.norm()
    assert 1e-4 < error < 0.05
    assert rounded.describe()["dtype"] == "bfloat16"
    assert network.describe()["dtype"] == "float32"


def test_batch_norm_and_relu_are_folded_into_the_convolutions(small_graph):
    network = InceptionNetwork(small_graph)
    layers = [*network.graph.preparation, *network.graph.convolve.children()]
    convolutions = [layer for layer in layers if isinstance(layer, frozen_graph.Convolution)]
    assert len(convolutions) == 94
    assert all(layer.relu and layer.bias.any() for layer in convolutions)
    assert not any(isinstance(layer, torch.nn.ReLU) for layer in layers)
    assert len(layers) == 94 + 9 + 5 + 11 + 3  # convolutions, average and max pools, joins, resize, sub, mul


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_and_frozen_layers_give_the_same_values(small_graph):
    stem = FrozenGraph(read_graph(small_graph), "ExpandDims", ("pool",)).eval()
    images = torch.from_numpy(synthetic_images(0, 2)).float()
    with torch.no_grad():
        prepared = stem.prepare(images)
        compiled = features.compile_frozen(stem.convolve, prepared)
        torch.testing.assert_close(compiled(prepared)[0], stem(images)[0], atol=1e-5, rtol=0)


def test_without_a_compiler_features_are_computed_all_the_same(small_graph, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(features, "compile_frozen", fail)
    network = InceptionFeatures(small_graph, CPU, compiled=True)
    images = torch.from_numpy(synthetic_images(0, 3))
    expected = InceptionFeatures(small_graph, CPU)(images)
    torch.testing.assert_close(network(images), expected)
    assert network.describe()["compiled"] is False
    assert "no C++ compiler" in capsys.readouterr().err


def test_compiled_networks_see_batches_of_one_size(small_graph, monkeypatch):
    sizes = []

    def record(convolve, _):
        return lambda prepared: sizes.append(len(prepared)) or convolve(prepared)

    monkeypatch.setattr(features, "compile_frozen", record)
    network = InceptionFeatures(small_graph, CPU, compiled=True)
    images = torch.from_numpy(synthetic_images(0, 5))
    first, rest = network(images[:3]), network(images[3:])
    assert sizes == [3, 3]
    expected = InceptionFeatures(small_graph, CPU)(images).pool
    torch.testing.assert_close(torch.cat([first.pool, rest.pool]), expected, atol=1e-5, rtol=0)


def test_preparing_takes_bytes_and_floats_alike_and_few_images_at_a_time(small_graph):
    graph = InceptionNetwork(small_graph).graph
    images = torch.from_numpy(synthetic_images(0, 5))
    together = graph.prepare(images)
    assert together.shape == (5, 3, 299, 299)
    for one, value in enumerate(graph.prepare(images.float())):
        assert torch.equal(value, together[one])
        assert torch.equal(value, graph.prepare(images[one : one + 1])[0])
    assert together.is_contiguous(memory_format=torch.channels_last)


def test_graphs_that_do_not_begin_with_a_resize_take_bytes_too(tmp_path):
    halved = integers([1, 2, 2, 1])
    (tmp_path / "graph.pb").write_bytes(
        node("AvgPool", "pool", ["ExpandDims"], ksize=halved, strides=halved, padding=text(2, "VALID"))
    )
    graph = FrozenGraph(read_graph(tmp_path / "graph.pb"), "ExpandDims", ("pool",))
    images = torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3)
    torch.testing.assert_close(graph(images)[0], graph(images.float())[0])


def test_resize_is_that_of_tensorflow_1():
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    out = frozen_graph.ResizeBilinear(3, 6)(x)
    torch.testing.assert_close(
        out[0, 0, 1], torch.tensor([0, 2 / 3, 4 / 3, 2, 8 / 3, 3])
    )  # i · 4/6, clamped at the edge


def test_average_pool_does_not_count_padding():
    out = frozen_graph.Pool(frozen_graph.average_pool, (3, 3), (1, 1), "SAME")(torch.ones(1, 1, 4, 4))
    torch.testing.assert_close(out, torch.ones(1, 1, 4, 4))


# Small graphs by hand: a start, then the nodes in question.


def run(nodes: list[bytes], output: str, images: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    path = tmp_path / "graph.pb"
    path.write_bytes(b"".join(nodes))
    return FrozenGraph(read_graph(path), "image", (output,))(images)[0]


def concat(name: str, *sources: str) -> list[bytes]:
    return [constant(f"{name}/dim", np.array(3, np.int32)), node("Concat", name, [f"{name}/dim", *sources])]


def test_nested_joins_and_values_used_twice(tmp_path):
    nodes = concat("inner", "image", "image") + concat("outer", "inner:0", "image", "inner")
    images = torch.rand(2, 5, 4, 3)
    out = run(nodes, "outer", images, tmp_path)
    torch.testing.assert_close(out, images.permute(0, 3, 1, 2).repeat(1, 5, 1, 1))


def test_a_constant_may_be_one_repeated_number_or_end_in_one(tmp_path):
    partly = text(8, integer(1, 1) + text(2, text(2, integer(1, 4))) + text(5, np.float32([1, 2]).tobytes()))
    path = tmp_path / "graph.pb"
    one = constant("one", np.full((2, 3), 7, np.float32), repeated=True)
    path.write_bytes(node("Const", "partly", value=partly) + one)
    nodes = read_graph(path)
    assert nodes["partly"].constant().tolist() == [1, 2, 2, 2]
    assert nodes["one"].constant().tolist() == [[7] * 3] * 2


@pytest.mark.parametrize("versions", [b"", text(4, integer(1, 8))], ids=["without versions", "with versions"])
def test_graphs_with_and_without_a_versions_field(tmp_path, versions):
    images = torch.rand(1, 4, 4, 3)
    out = run([node("Relu", "relu", ["image"], T=FLOAT), versions], "relu", images, tmp_path)
    torch.testing.assert_close(out, images.permute(0, 3, 1, 2))


def test_a_convolution_used_twice_is_not_folded(tmp_path):
    weight = np.random.default_rng(0).normal(size=(1, 1, 3, 3)).astype(np.float32)
    nodes = [
        constant("weight", weight),
        node("Conv2D", "conv", ["image", "weight"], strides=integers([1, 1, 1, 1]), padding=text(2, "SAME")),
        node("Relu", "relu", ["conv"]),
    ] + concat("both", "conv", "relu")
    out = run(nodes, "both", torch.rand(1, 4, 4, 3) - 0.5, tmp_path)
    torch.testing.assert_close(out[:, 3:], out[:, :3].relu())
    assert (out[:, :3] < 0).any()


POOL = {"ksize": integers([1, 3, 3, 1]), "strides": integers([1, 2, 2, 1]), "padding": text(2, "SAME")}
CONV = {"strides": integers([1, 1, 1, 1]), "padding": text(2, "VALID")}


@pytest.mark.parametrize(
    ("nodes", "complaint"),
    [
        ([node("Sin", "x", ["image"])], "operation 'Sin', unknown"),
        ([node("Relu", "y", ["image"])], "no node 'x'"),
        ([node("MaxPool", "x", ["image"], **POOL)], "not symmetric"),
        ([node("Identity", "weight", ["image"]), node("Conv2D", "x", ["image", "weight"], **CONV)], "be a constant"),
    ],
)
def test_what_cannot_be_run_faithfully_is_refused_by_name(tmp_path, nodes, complaint):
    with pytest.raises(ValueError, match=complaint):
        run(nodes, "x", torch.rand(1, 8, 8, 3), tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no nodes"),
        (b"PK\x03\x04 something else entirely", ""),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), ""),
        (b"<html>log in to the hotel's network</html>", ""),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 95673916\n", ""),
        (text(1, text(1, b"\xff\xfe") + text(2, "Relu")), "utf-8"),
        (text(1, text(1, "x")), "unexpected contents"),  # no operation
        (b"\x0a\xff\xff\xff\xff\x0f", "ends after its message"),
        (node("Relu", "x", ["y"]), "no node 'pool_3'"),
    ],
)
def test_files_that_are_not_the_graph(tmp_path, content, complaint):
    path = tmp_path / "graph.pb"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"is not ADM's frozen Inception graph, or is damaged \(.*{complaint}"):
        InceptionNetwork(path)


def test_files_that_are_cut_short(small_graph, tmp_path):
    content, path = small_graph.read_bytes(), tmp_path / "graph.pb"
    generator = random.Random(0)
    for _ in range(30):
        path.write_bytes(content[: generator.randrange(len(content) - 100_000)])
        with pytest.raises(UserError, match="is not ADM's frozen Inception graph, or is damaged"):
            InceptionNetwork(path)


def test_missing_graph_file(tmp_path):
    for path in (tmp_path / "none.pb", tmp_path):
        with pytest.raises(UserError, match="there is no graph file"):
            InceptionNetwork(path)
