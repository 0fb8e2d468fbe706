"""Decoding with a cache against golden generations and against the teacher-forced model."""

import functools
import gc
import weakref

import pytest
import torch

from autoregressive.models.generate import CodeGenerator, generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling import Sampling, guidance_scales, guided_tokens
from tests.golden_gpt import golden_args, golden_figures, golden_model

FIGURES = golden_figures()
LABELS = torch.from_numpy(FIGURES["cls"])
GENERATIONS = [key for key in FIGURES if key.startswith("gen.")]


def case(key: str) -> tuple[float, int]:
    scale, interval = key.removeprefix("gen.cfg").split(".int")
    return float(scale), int(interval)


def uniforms(batch: int, length: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Static:
    """The path of GPUs, its static shapes and masks, on the CPU: a captured graph is a call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.on_gpu, self.length_step, self.captured = True, 8, []

    def _capture(self, *settings):
        self.captured.append(settings)
        return functools.partial(self._decode, *settings)


class StaticGenerator(Static, CodeGenerator):
    pass


@pytest.mark.parametrize("key", GENERATIONS)
def test_golden_generations(key):
    codes = generate(golden_model(), LABELS, 64, *case(key), sample_logits=False)
    assert codes.tolist() == FIGURES[key].tolist()


@pytest.mark.parametrize("key", GENERATIONS)
def test_golden_generations_with_static_shapes(key):
    scale, interval = case(key)
    generator = StaticGenerator(golden_model(), 3, 64, Sampling(scale, interval, sample_logits=False))
    for _ in range(2):  # the second batch only replays
        assert generator(LABELS, uniforms(3)).tolist() == FIGURES[key].tolist()
    lengths = [length for length, *_ in generator.captured]
    assert sorted(set(lengths)) == list(range(8, 65, 8))
    assert len(lengths) <= len(set(lengths)) + 1  # one more where guidance ends inside a length


def greedy_by_forward(model: Transformer, labels: torch.Tensor) -> torch.Tensor:
    codes = torch.zeros(len(labels), model.args.block_size, dtype=torch.int64)
    for token in range(model.args.block_size):
        codes[:, token] = model(codes, labels)[0][:, token].argmax(-1)
    return codes


@pytest.mark.parametrize("settings", [dict(n_kv_head=2), dict(n_kv_head=1), dict(block_size=24, grid=(4, 6))])
@pytest.mark.parametrize("kind", [CodeGenerator, StaticGenerator])
def test_the_cache_gives_what_the_whole_model_gives(settings, kind):
    torch.manual_seed(0)
    model = Transformer(golden_args(**settings)).eval()
    torch.nn.init.normal_(model.output.weight)
    generator = kind(model, 3, model.args.block_size, Sampling(sample_logits=False))
    codes = generator(LABELS, uniforms(3, model.args.block_size))
    assert torch.equal(codes, greedy_by_forward(model, LABELS))


@pytest.mark.parametrize("length", [1, 2, 63])
def test_the_first_tokens_of_an_image(length):
    codes = generate(golden_model(), LABELS, length, 2.0, sample_logits=False)
    assert codes.tolist() == FIGURES["gen.cfg2.0.int-1"][:, :length].tolist()


def test_a_draw_depends_on_its_own_uniform_numbers_only():
    model, settings = golden_model(), dict(cfg_scale=2.0, top_k=50, top_p=0.95, temperature=0.9)
    codes = generate(model, LABELS, 64, **settings, uniforms=uniforms(3))
    order = torch.tensor([2, 0, 1])
    assert torch.equal(generate(model, LABELS[order], 64, **settings, uniforms=uniforms(3)[order]), codes[order])
    assert not torch.equal(generate(model, LABELS, 64, **settings, uniforms=uniforms(3, seed=1)), codes)


def test_without_uniform_numbers_the_seed_of_pytorch_decides():
    model = golden_model()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(generate(model, LABELS, 64, 2.0))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_one_generator_serves_many_batches():
    model, sampling = golden_model(), Sampling(cfg_scale=2.0, cfg_interval=5)
    generator = CodeGenerator(model, 3, 64, sampling)
    first = generator(LABELS, uniforms(3))
    generator(LABELS.flip(0), uniforms(3, seed=1))
    assert torch.equal(generator(LABELS, uniforms(3)), first)


@pytest.mark.parametrize("kind", [CodeGenerator, StaticGenerator])
def test_known_codes_are_kept_and_the_others_follow_them(kind):
    generator = kind(golden_model(), 3, 64, Sampling(2.0))
    free = generator(LABELS, uniforms(3))
    known = torch.where(torch.rand(3, 64) < 0.5, (free + 1) % 96, -1)
    codes = generator(LABELS, uniforms(3), known)
    assert torch.equal(codes[known >= 0], known[known >= 0])
    first = (known >= 0).long().argmax(1)
    for image in range(3):
        assert torch.equal(codes[image, : first[image]], free[image, : first[image]])
    assert not torch.equal(codes[known < 0], free[known < 0])
    assert torch.equal(generator(LABELS, uniforms(3), codes), codes)
    assert torch.equal(generator(LABELS, uniforms(3), torch.full((3, 64), -1)), free)
    assert torch.equal(generator(LABELS, uniforms(3)), free)


def forced(generator: CodeGenerator, *batch) -> torch.Tensor:
    """What is drawn where known codes are put in one by one."""
    generator.start(*batch)
    for token in range(generator.length):
        generator.step(token)
    return generator.codes.clone()


@pytest.mark.parametrize(
    ("kept", "passes"),
    [
        ([range(24)], 1 + 40),
        ([range(24), range(30, 50)], 1 + 6 + 1 + 14),  # guidance ends within the second
        ([range(5, 6), range(20, 64)], 5 + 1 + 14 + 1),
        ([range(64)], 1),
    ],
)
@pytest.mark.parametrize("kind", [CodeGenerator, StaticGenerator])
def test_consecutive_known_codes_take_one_pass(kind, kept, passes):
    generator = kind(golden_model(), 3, 64, Sampling(2.0, 40))
    other = generator(LABELS.flip(0), uniforms(3, seed=1))
    known = torch.full((3, 64), -1)
    for places in kept:
        known[:, places] = other[:, places]
    expected = forced(generator, LABELS, uniforms(3), known)
    counts = list(generator.passes(LABELS, uniforms(3), known))
    assert torch.equal(generator.codes, expected)
    assert len(counts) == passes
    assert counts == sorted(set(counts))
    assert counts[-1] == 64


def test_the_model_is_left_as_it_was():
    model = golden_model(resid_dropout_p=0.5, ffn_dropout_p=0.5).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    codes = generate(model, LABELS, 64, 2.0, sample_logits=False)
    assert codes.tolist() == FIGURES["gen.cfg2.0.int-1"].tolist()  # without dropout
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_compiled_once_for_all_layers_and_positions(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = CodeGenerator(golden_model(), 3, 64, Sampling(2.0, 20, sample_logits=False), compile=True)
    assert generator(LABELS, uniforms(3)).tolist() == FIGURES["gen.cfg2.0.int20"].tolist()
    # before attention, after attention, and the next codes; each with and without the unconditional half
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6


def test_the_unconditional_half_is_dropped_after_the_interval():
    generator = StaticGenerator(golden_model(), 3, 64, Sampling(2.0, 20))
    rows = []
    before_attention = generator._before_attention
    generator._before_attention = lambda layer, x, *rest: rows.append(len(x)) or before_attention(layer, x, *rest)
    generator(LABELS, uniforms(3))
    generator_steps = [rows[i] for i in range(0, len(rows), 3)]  # 3 layers
    assert generator_steps == [6] * 22 + [3] * 42


def test_guidance_schedules():
    assert guidance_scales("constant", 4.0, 5).tolist() == [4.0] * 5
    assert guidance_scales("linear", 3.0, 5).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    cosine = guidance_scales("power-cosine", 3.0, 4, power=1.0)
    torch.testing.assert_close(cosine, torch.tensor([1.0, 2 - 2**-0.5, 2.0, 2 + 2**-0.5]))
    later = guidance_scales("power-cosine", 3.0, 64, power=2.75)
    assert (later <= guidance_scales("power-cosine", 3.0, 64, power=1.0)).all()
    assert (later.diff() >= 0).all()
    with pytest.raises(ValueError, match="no guidance schedule"):
        guidance_scales("cubic", 3.0, 4)


@pytest.mark.parametrize("schedule", ["linear", "power-cosine"])
def test_schedules_change_the_images_and_end_at_the_constant_scale(schedule):
    model = golden_model()
    codes = generate(model, LABELS, 64, 4.0, cfg_schedule=schedule, uniforms=uniforms(3))
    assert not torch.equal(codes, generate(model, LABELS, 64, 4.0, uniforms=uniforms(3)))


def test_guided_tokens():
    assert [guided_tokens(2.0, interval, 64) for interval in (-1, 0, 20, 100)] == [64, 2, 22, 64]
    assert guided_tokens(1.0, 20, 64) == 0


@pytest.mark.parametrize(
    "settings",
    [
        dict(cfg_scale=0.5),
        dict(cfg_interval=-2),
        dict(cfg_schedule="cubic"),
        dict(cfg_power=0.0),
        dict(temperature=-1.0),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.5),
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings)) if "cfg_schedule" not in settings else "schedule"):
        generate(golden_model(), LABELS, 4, **settings)


@pytest.mark.parametrize(
    ("model_settings", "labels", "length", "scale", "message"),
    [
        ({}, [0], 0, 1.0, "1 to 64 tokens"),
        ({}, [0], 65, 1.0, "1 to 64 tokens"),
        ({}, [11], 4, 1.0, "0..9"),
        ({}, [-1], 4, 1.0, "0..9"),
        (dict(class_dropout_prob=0.0), [0], 4, 2.0, "no null class"),
    ],
)
def test_what_a_model_cannot_generate(model_settings, labels, length, scale, message):
    with pytest.raises(ValueError, match=message):
        generate(Transformer(golden_args(**model_settings)), torch.tensor(labels), length, scale)


@pytest.mark.parametrize("sample_logits", [False, True])
def test_logits_that_are_not_finite_are_an_error(sample_logits):
    model = golden_model()
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, LABELS, 4, 2.0, sample_logits=sample_logits)


@pytest.mark.parametrize("compile", [False, True])
def test_caches_go_with_the_generator(monkeypatch, compile):
    """At once, not when cycles are collected: a GPU's memory must not hold two batches' caches."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    generator = CodeGenerator(golden_model(), 3, 64, Sampling(2.0), compile)
    generator(LABELS, uniforms(3))
    alive = weakref.ref(generator)
    gc.collect()
    gc.disable()
    try:
        del generator
        assert alive() is None
    finally:
        gc.enable()
