"""The process that runs the Inception graph in TensorFlow 2: arrays of images in, arrays of features out.

    python evaluations/c2i/tensorflow_backend.py GRAPH.pb cpu|cuda

First writes TensorFlow's version, then for every array of images read from standard input the arrays of pool and
spatial features and logits. Ends when its input ends. Never imports PyTorch.
"""

import io
import os
import sys
from typing import IO

import numpy as np

SPATIAL_CHANNELS = 7


def main(graph_path: str, device: str) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # TensorFlow's own messages must not mix with the answers
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    try:
        import tensorflow as tf
    except ImportError as error:
        sys.exit(f"error: TensorFlow cannot be imported ({error}).")

    tf.config.experimental.enable_tensor_float_32_execution(False)
    session, images, features = _load(tf, graph_path)
    send(answers, np.array(tf.__version__))
    while (batch := receive(sys.stdin.buffer)) is not None:
        for array in session.run(features, {images: batch.astype(np.float32)}):
            send(answers, array)


def _load(tf, graph_path: str):
    """A session, the placeholder for images and the tensors (pool, spatial, logits)."""
    definition = tf.compat.v1.GraphDef()
    with open(graph_path, "rb") as file:
        definition.ParseFromString(file.read())
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
        names = ["pool_3:0", "mixed_6/conv:0", "softmax/logits/MatMul"]
        pool, spatial, classifier = tf.import_graph_def(
            definition, input_map={"ExpandDims:0": images}, return_elements=names, name=""
        )
        weight = classifier.inputs[1]
        pool = tf.reshape(pool, [-1, weight.shape[0]])
        spatial = spatial[..., :SPATIAL_CHANNELS]
        spatial = tf.reshape(spatial, [tf.shape(spatial)[0], -1])
        return tf.compat.v1.Session(graph=graph), images, (pool, spatial, tf.matmul(pool, weight))


def send(pipe: IO[bytes], array: np.ndarray) -> None:
    """Write an array: its size in bytes as .npy (8 bytes), then that .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    pipe.write(buffer.tell().to_bytes(8, "little") + buffer.getbuffer())
    pipe.flush()


def receive(pipe: IO[bytes]) -> np.ndarray | None:
    """The next array that `send` wrote; None if the pipe has ended."""
    size = int.from_bytes(pipe.read(8), "little")
    content = pipe.read(size)
    return np.load(io.BytesIO(content), allow_pickle=False) if content and len(content) == size else None


if __name__ == "__main__":
    main(*sys.argv[1:])
