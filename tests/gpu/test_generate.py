"""Decoding on a device: golden generations; on GPUs by CUDA graphs, without waiting or allocating."""

import pytest
import torch

from autoregressive.models.generate import CodeGenerator, generate
from autoregressive.models.parallel import ParallelCodeGenerator
from autoregressive.models.sampling import Sampling, gumbel_noise
from tests.golden_gpt import golden_model
from tests.gpu import COMPILED, ON_GPU_ALONE
from tests.unit.test_generate import FIGURES, GENERATIONS, LABELS, case, uniforms


@pytest.mark.parametrize("key", GENERATIONS)
def test_golden_generations(device, key):
    codes = generate(golden_model().to(device), LABELS.to(device), 64, *case(key), sample_logits=False)
    assert codes.tolist() == FIGURES[key].tolist()


@pytest.mark.parametrize("filters", [dict(), dict(top_k=20), dict(top_p=0.9)])
def test_draws_are_those_of_the_cpu_in_any_batch(device, filters):
    """Float32 rounds differently elsewhere: a code changes only where a uniform number falls between two codes."""
    numbers, sampling = uniforms(3), Sampling(2.0, **filters)
    expected = CodeGenerator(golden_model(), 3, 64, sampling)(LABELS, numbers)
    model = golden_model().to(device)
    together = CodeGenerator(model, 3, 64, sampling)(LABELS.to(device), numbers.to(device)).cpu()
    alone = CodeGenerator(model, 1, 64, sampling)
    one_by_one = torch.cat([alone(LABELS[i : i + 1], numbers[i : i + 1]).cpu() for i in range(3)])
    for codes in (together, one_by_one):
        assert (codes == expected).double().mean() > 0.9


@pytest.mark.parametrize("interval", [-1, 10])
def test_given_codes_are_kept(device, interval):
    known = torch.full((3, 64), -1)
    known[:, ::5] = 7
    generator = CodeGenerator(golden_model().to(device), 3, 64, Sampling(2.0, interval))
    for _ in range(2):
        codes = generator(LABELS.to(device), uniforms(3).to(device), known.to(device)).cpu()
        assert (codes[:, ::5] == 7).all()
    assert (generator(LABELS.to(device), uniforms(3).to(device)).cpu()[:, ::5] != 7).any()


@ON_GPU_ALONE
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=COMPILED)])
def test_on_a_gpu_graphs_repeat_the_golden_generation_without_waiting(compile):
    generator = CodeGenerator(golden_model().cuda(), 3, 64, Sampling(2.0, 20, sample_logits=False), compile)
    labels, numbers = LABELS.cuda(), uniforms(3).cuda()
    assert generator(labels, numbers).tolist() == FIGURES["gen.cfg2.0.int20"].tolist()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        codes = generator(labels, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - allocated < 16  # for a batch, not for its 64 tokens
    assert codes.tolist() == FIGURES["gen.cfg2.0.int20"].tolist()


@ON_GPU_ALONE
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=COMPILED)])
@pytest.mark.parametrize("window", [3, 16])
def test_on_a_gpu_windows_repeat_the_golden_generation(compile, window):
    sampling = Sampling(2.0, 20, sample_logits=False)
    generator = ParallelCodeGenerator(golden_model().cuda(), 3, 64, sampling, window, compile)
    for _ in range(2):  # the second batch only replays
        assert generator(LABELS.cuda(), uniforms(3).cuda()).tolist() == FIGURES["gen.cfg2.0.int20"].tolist()


@ON_GPU_ALONE
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=COMPILED)])
def test_on_a_gpu_gumbel_draws_are_those_of_the_cpu(compile):
    sampling, numbers = Sampling(2.0, draw="gumbel"), uniforms(3)
    expected = CodeGenerator(golden_model(), 3, 64, sampling)(LABELS, numbers)
    on_gpu = [
        CodeGenerator(golden_model().cuda(), 3, 64, sampling, compile),
        ParallelCodeGenerator(golden_model().cuda(), 3, 64, sampling, 8, compile),
    ]
    for generator in on_gpu:  # float32 rounds differently there: a code changes only where two sums nearly tie
        codes = generator(LABELS.cuda(), numbers.cuda()).cpu()
        assert (codes == expected).double().mean() > 0.9
    numbers = numbers.flatten()
    torch.testing.assert_close(gumbel_noise(numbers.cuda(), 96).cpu(), gumbel_noise(numbers, 96), rtol=0, atol=1e-6)
