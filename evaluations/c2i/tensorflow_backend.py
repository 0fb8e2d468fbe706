"""The process that runs the Inception graph in TensorFlow 2: arrays of images in, arrays of features out.

    python evaluations/c2i/tensorflow_backend.py GRAPH.pb cpu|cuda PIPE

First sends TensorFlow's version through the pipe (a file descriptor), then for every array of images received the
arrays of pool and spatial features and logits. Ends when the other side does. Never imports PyTorch.
"""

import os
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

import numpy as np

SPATIAL_CHANNELS = 7


def main(graph_path: str, device: str, pipe: str) -> None:
    connection = Connection(int(pipe))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    try:
        import tensorflow as tf
    except ImportError as error:
        sys.exit(f"error: TensorFlow cannot be imported ({error}).")

    tf.config.experimental.enable_tensor_float_32_execution(False)
    for gpu in tf.config.list_physical_devices("GPU"):  # whose memory PyTorch needs as well
        tf.config.experimental.set_memory_growth(gpu, True)
    session, images, features = _load(tf, graph_path)
    connection.send(tf.__version__)
    with suppress(EOFError, ConnectionResetError):
        while True:
            connection.send(session.run(features, {images: connection.recv().astype(np.float32)}))


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


if __name__ == "__main__":
    main(*sys.argv[1:])
