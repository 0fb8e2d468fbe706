"""TensorFlow's own answer, in a process of its own: `python -m tests.tensorflow_reference GRAPH IMAGES.npz OUT.npz`.

Rewrites GRAPH as TensorFlow serializes it, runs it on every array in IMAGES.npz, and writes for each `NAME.pool`,
`NAME.spatial` and `NAME.probabilities` (softmax of the pool features times the classifier's weight, without its bias).
"""

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

from tests.inception_graph import InceptionGraph

needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed")


def synthetic_images(seed: int, count: int, height: int = 32, width: int = 32, contrast: float = 1.0) -> np.ndarray:
    """Smooth random colour fields (count, height, width, 3), uint8; `contrast` makes another distribution."""
    random = np.random.default_rng(seed)
    rows, columns = np.linspace(0, 4, height)[:, None, None], np.linspace(0, 4, width)[None, :, None]
    frequency, phase, level = random.uniform(0.5, 3, (3, count, 1, 1, 3)) * [[[[[1]]]], [[[[2]]]], [[[[40]]]]]
    waves = np.sin(frequency * rows + phase) * np.cos(phase * columns - frequency)
    noise = random.normal(0, 8, (count, height, width, 3))
    return np.clip(60 + level + 60 * contrast * waves + noise, 0, 255).astype(np.uint8)


@cache
def graph_and_answers(narrower: int) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A graph as TensorFlow writes it, image sets, and what TensorFlow makes of them."""
    folder = Path(mkdtemp(prefix="npp-inception-"))
    graph = InceptionGraph(narrower).save(folder / "graph.pb")
    images = {"real": synthetic_images(0, 24), "generated": synthetic_images(1, 20, contrast=0.6)}
    if narrower > 1:
        images |= {"large": synthetic_images(2, 2, 320, 400), "same": synthetic_images(3, 2, 299, 299)}
    np.savez(folder / "images.npz", **images)
    command = [sys.executable, "-m", "tests.tensorflow_reference", graph, folder / "images.npz", folder / "answers.npz"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    with np.load(folder / "answers.npz") as answers:
        return graph, images, dict(answers)


def main(graph_path: str, images_path: str, answers_path: str) -> None:
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1")
    import tensorflow as tf

    definition = tf.compat.v1.GraphDef()
    definition.ParseFromString(Path(graph_path).read_bytes())
    Path(graph_path).write_bytes(definition.SerializeToString())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        fed = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])  # the graph's own takes one image at a time
        tf.import_graph_def(definition, input_map={"ExpandDims:0": fed}, name="")
        fetch = session.graph.get_tensor_by_name
        pool = tf.reshape(fetch("pool_3:0"), [-1, fetch("softmax/weights:0").shape[0]])
        spatial = fetch("mixed_6/conv:0")[..., :7]
        wanted = {
            "pool": pool,
            "spatial": tf.reshape(spatial, [tf.shape(spatial)[0], -1]),
            "probabilities": tf.nn.softmax(tf.matmul(pool, fetch("softmax/weights:0"))),
        }
        answers = {}
        with np.load(images_path) as images:
            for name, array in images.items():
                values = session.run(wanted, {fed: array.astype(np.float32)})
                answers |= {f"{name}.{key}": value for key, value in values.items()}
    np.savez(answers_path, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
