"""The process that runs the Inception graph in TensorFlow 2: arrays of images in, arrays of features out.

    python -m evaluations.c2i.tensorflow_backend GRAPH.pb cpu|cuda

First writes TensorFlow's version, then for every array of images read from standard input the arrays of pool and
spatial features and logits, all in .npy format. Ends when its input ends. Never imports PyTorch.
"""

import os
import sys

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
    _send(answers, np.array(tf.__version__))
    while batch := _receive():
        for array in session.run(features, {images: batch[0].astype(np.float32)}):
            _send(answers, array)


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


def _send(pipe, array: np.ndarray) -> None:
    np.lib.format.write_array(pipe, array, allow_pickle=False)
    pipe.flush()


def _receive() -> list[np.ndarray]:
    """The next array, in a list that is empty at the end of the input."""
    if not sys.stdin.buffer.peek(1):
        return []
    return [np.lib.format.read_array(sys.stdin.buffer, allow_pickle=False)]


if __name__ == "__main__":
    main(*sys.argv[1:])
