"""One process or two, replicas or shards, one micro-batch or several: the same data order and the same losses."""

import sys

import pytest

from autoregressive.train import train_c2i
from tests.tiny_training import (
    NO_DROPOUT,
    assert_same_state,
    command,
    interrupting,
    last_checkpoint,
    rows,
    tiny_store,
    train,
)


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def alone(codes, tmp_path_factory):
    results = tmp_path_factory.mktemp("alone")
    assert train(command(codes, results, "--ema", no=NO_DROPOUT)) == [0]
    return results


def assert_same_training(results, other, tolerance=1e-5):
    for mine, theirs in zip(rows(results), rows(other), strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance, rel=tolerance)
    assert_same_state(last_checkpoint(results)["model"], last_checkpoint(other)["model"], "model", 1e-4)
    assert_same_state(last_checkpoint(results)["ema"], last_checkpoint(other)["ema"], "ema", 1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(parallel, codes, alone, tmp_path):
    assert train(command(codes, tmp_path, "--ema", "--parallel", parallel, no=NO_DROPOUT), world_size=2) == [0, 0]
    assert_same_training(tmp_path, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiling_ahead_leaves_no_gradients(parallel, codes, alone, tmp_path):
    """The passes that compile each level come before the first step; here they run without the compiler."""

    def no_compiler():
        train_c2i.compile_model = lambda model: None

    arguments = command(codes, tmp_path, "--ema", "--compile", "--parallel", parallel, no=NO_DROPOUT)
    assert train(arguments, world_size=2, before=no_compiler) == [0, 0]
    assert_same_training(tmp_path, alone)


@pytest.mark.parametrize("processes", [1, 2])
def test_gradient_accumulation_changes_nothing(processes, codes, alone, tmp_path):
    arguments = command(
        codes, tmp_path, "--ema", no=NO_DROPOUT, parts={"--gradient-accumulation-steps": 4 // processes}
    )
    assert train(arguments, world_size=processes) == [0] * processes
    assert_same_training(tmp_path, alone)


@pytest.mark.parametrize(
    ("first", "then"),
    [(("ddp", 1), ("fsdp", 2)), (("fsdp", 2), ("ddp", 2)), (("ddp", 2), ("ddp", 1)), (("fsdp", 2), ("ddp", 1))],
    ids=str,
)
def test_a_checkpoint_continues_in_another_world(first, then, codes, alone, tmp_path):
    def part(parallel, stop_after=None):
        before = interrupting(stop_after, lambda: sys.exit(9), written=True) if stop_after else lambda: None
        arguments = command(codes, tmp_path, "--ema", "--parallel", parallel[0], no=NO_DROPOUT)
        return train(arguments, parallel[1], before=before)

    assert part(first, stop_after=8) == [9] * first[1]  # after the checkpoint of step 6, in level 2
    assert part(then) == [0] * then[1]
    assert_same_training(tmp_path, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_in_the_same_world_is_bit_exact_with_dropout(parallel, codes, tmp_path):
    stop = interrupting(8, lambda: sys.exit(9), written=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(command(codes, whole, "--parallel", parallel), 2) == [0, 0]
    assert train(command(codes, parts, "--parallel", parallel), 2, before=stop) == [9, 9]
    assert train(command(codes, parts, "--parallel", parallel), 2) == [0, 0]
    for key in ("model", "optimizer", "metrics"):
        assert_same_state(last_checkpoint(parts)[key], last_checkpoint(whole)[key], key)
    assert rows(parts) == rows(whole)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_validating_the_averages_leaves_the_training_as_it_is(parallel, codes, tmp_path):
    """Under FSDP a pass without gradients leaves the root gathered: the next step must not find the averages there."""
    flags = ["--ema", "--parallel", parallel]
    assert train(command(codes, tmp_path / "plain", *flags, no=NO_DROPOUT), 2) == [0, 0]
    watching = NO_DROPOUT | {"--val-code-path": codes, "--val-every": 2}
    assert train(command(codes, tmp_path / "watched", *flags, no=watching), 2) == [0, 0]
    for key in ("model", "ema", "optimizer"):
        assert_same_state(last_checkpoint(tmp_path / "watched")[key], last_checkpoint(tmp_path / "plain")[key], key)
