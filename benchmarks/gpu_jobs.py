"""What benchmarks.gpu_check runs, in the order of importance, and what its figures must show."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    part: str
    name: str
    command: str  # after the interpreter
    seconds: int  # at most


# In the order of importance, so that nearly all GOALS have their figures in a first run of ten minutes; the limits are
# guessed for an H100. Every job's rows come in the order of importance, too. Names hold no commas, for `--only`.
GPU_JOBS = (
    Job("tests", "GPU tests", "-m pytest tests/gpu -m 'not slow'", 180),
    Job("training", "training GPT-B side 2", "-m benchmarks.training --batch-size 32 --sides 2", 150),
    Job("sampling", "sampling GPT-B", "-m benchmarks.sampling --batch-sizes 32 8", 240),
    Job(
        "training",
        "training GPT-L side 1",
        "-m benchmarks.training --gpt-model GPT-L --batch-size 32 --sides 1 --no-published",
        150,
    ),
    Job("samples", "50000 images GPT-B", "-m benchmarks.fid_samples --images 2048", 150),
    Job(
        "extraction",
        "extraction",
        "-m benchmarks.extraction --image-size 256 --images 384 --published-images 48 --num-workers 16 --repeats 1 "
        "--precisions tf32",
        100,
    ),
    Job(
        "evaluation",
        "evaluation",
        "-m benchmarks.evaluator --images 2048 --no-compile --no-tensorflow --dimensions 0 --features 0",
        100,
    ),
    Job("sampling", "sampling GPT-L", "-m benchmarks.sampling --models GPT-L --batch-sizes 32", 300),
    Job("decoding", "decoding GPT-B", "-m benchmarks.decoding --only attention draw step", 180),
    Job(
        "evaluation",
        "whole evaluation",
        "-m benchmarks.evaluator --images 0 --dimensions 0 --features 0 --whole 50000",
        480,
    ),
    Job("tests", "GPU tests compiled", "-m pytest tests/gpu -m slow", 300),
    Job(
        "training",
        "training GPT-XL",
        "-m benchmarks.training --gpt-model GPT-XL --batch-size 32 --sides 1 2 --no-published",
        300,
    ),
    Job("training", "training GPT-L", "-m benchmarks.training --gpt-model GPT-L --batch-size 32 --sides 2 1", 300),
    Job("training", "training GPT-B", "-m benchmarks.training --batch-size 32 --sides 1 4", 240),
    Job("training", "training step GPT-B", "-m benchmarks.training_choices --batch-size 32 --side 2", 240),
    Job(
        "extraction",
        "extraction bf16",
        "-m benchmarks.extraction --image-size 256 --images 384 --published-images 48 --num-workers 16 --repeats 1 "
        "--precisions bf16",
        150,
    ),
    Job("evaluation", "metrics", "-m benchmarks.evaluator --images 0", 180),
    Job("decoding", "decoder", "-m benchmarks.decoding --only decoder", 240),
    Job("tokenizer", "tokenizer", "-m benchmarks.tokenizer --image-size 256 --batch-size 16", 240),
    Job("loader", "loader", "-m benchmarks.loader --num-workers 16", 120),
    Job("training", "training GPT-B batch 128", "-m benchmarks.training --batch-size 128 --sides 1 2 4", 300),
    Job("sampling", "sampling GPT-B large", "-m benchmarks.sampling --batch-sizes 128 512 --no-published", 240),
    Job(
        "sampling",
        "sampling GPT-XL and GPT-XXL",
        "-m benchmarks.sampling --models GPT-XL GPT-XXL --batch-sizes 32 --no-published",
        300,
    ),
    Job(
        "decoding", "decoding GPT-L", "-m benchmarks.decoding --gpt-model GPT-L --batch-size 128 --only attention", 180
    ),
    Job("training", "training step GPT-L", "-m benchmarks.training_choices --gpt-model GPT-L --batch-size 32", 400),
    Job("parallel", "windows of codes", "-m benchmarks.parallel --batch-sizes 1 8", 300),
)
TINY_JOBS = (
    Job("tests", "GPU tests", "-m pytest tests/gpu", 300),
    Job("training", "training", "-m benchmarks.training --gpt-model GPT-Tiny --batch-size 1 --turns 1", 120),
    Job(
        "training",
        "training step",
        "-m benchmarks.training_choices --gpt-model GPT-Tiny --batch-size 1 --side 4 --turns 1",
        120,
    ),
    Job("sampling", "sampling", "-m benchmarks.sampling --models GPT-Tiny --batch-sizes 1 --image-size 64", 120),
    Job(
        "decoding",
        "decoding",
        "-m benchmarks.decoding --gpt-model GPT-Tiny --batch-size 1 --codes 16 --filled 16 --vq-model VQ-Tiny "
        "--decoded-at-once 1 --repeats 1",
        120,
    ),
    Job(
        "samples",
        "50000 images",
        "-m benchmarks.fid_samples --gpt-model GPT-Tiny --vq-model VQ-Tiny --image-size 16 --images 2 --batch-size 2",
        120,
    ),
    Job(
        "extraction",
        "extraction",
        "-m benchmarks.extraction --vq-model VQ-Tiny --image-size 16 --images 2 --batch-size 10 --num-workers 0 "
        "--repeats 1",
        120,
    ),
    Job(
        "evaluation",
        "evaluation",
        "-m benchmarks.evaluator --images 2 --batch-size 2 --image-size 32 --no-compile --no-tensorflow "
        "--dimensions 32 --features 64 --repeats 1",
        120,
    ),
    Job(
        "tokenizer",
        "tokenizer",
        "-m benchmarks.tokenizer --vq-model VQ-Tiny --image-size 32 --batch-size 1 --turns 1",
        120,
    ),
    Job(
        "loader",
        "loader",
        "-m benchmarks.loader --images 64 --batch-size 8 --steps 4 --published-steps 2 --num-workers 0 --repeats 1 "
        "--opened 1000",
        120,
    ),
    Job(
        "parallel",
        "windows of codes",
        "-m benchmarks.parallel --models GPT-Tiny --batch-sizes 1 --image-size 64 --windows 2 --draws gumbel "
        "--passes 2 --rounds 1",
        120,
    ),
)
PARTS = tuple(dict.fromkeys(job.part for job in GPU_JOBS))
# What the rows of a GPU must show: part of a row's name, the figure, at least (of times: at most).
GOALS = (
    (r"^training .*side 2$", "ratio", 1.3),
    (r"^training GPT-X?L,.*side 1$", "of_floor", 0.5),
    (r"^sampling .*batch 32,", "ratio", 10.0),
    (r"^sampling .*batch 8,", "ratio", 4.0),
    (r"^sampling GPT-L,", "of_floor", 0.6),
    (r"^50,000 images, GPT-B,", "here", 300.0),
    (r"^extraction .*tf32$", "ratio", 5.0),
    (r"^extraction .*tf32$", "of_floor", 0.8),
    (r"^whole evaluation of 50,000", "here", 300.0),
)
