"""Drawing windows of codes: bit for bit what is drawn code by code, in fewer passes."""

import functools

import pytest
import torch

from autoregressive.models.conditioning import Conditioning
from autoregressive.models.generate import CodeGenerator
from autoregressive.models.gpt import Transformer
from autoregressive.models.packed_linear import pack_linears
from autoregressive.models.parallel import ParallelCodeGenerator, make_generator, usual_window
from autoregressive.models.sampling import Sampling, draw_codes, draw_gumbel
from examples.min_p import min_p
from tests.golden_gpt import golden_args, golden_model
from tests.unit.test_generate import FIGURES, GENERATIONS, LABELS, Static, case, forced, uniforms

packed = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


class StaticParallelGenerator(Static, ParallelCodeGenerator):
    pass


class Vectors(Conditioning):
    """Three positions before the image."""

    def __init__(self, args):
        super().__init__()
        self.length = args.cls_token_num
        self.embedding_table = torch.nn.Embedding(11, self.length * args.dim)

    def forward(self, cond, dropped=None):
        labels = cond if dropped is None else torch.where(dropped, 10, cond)
        return self.embedding_table(labels).unflatten(-1, (self.length, -1))


@functools.cache
def model(**settings) -> Transformer:
    """With random weights and packed layers; the golden one without `settings`."""
    torch.manual_seed(0)
    if not settings:
        made = golden_model()
    else:
        conditioning = {"conditioning": Vectors} if "cls_token_num" in settings else {}
        made = Transformer(golden_args(**settings), **conditioning)
        torch.nn.init.normal_(made.output.weight, std=0.5)
    pack_linears(made)
    return made.eval()


class Recorder:
    """Draws codes and keeps the logits that each was drawn from, in every pass, by its random number."""

    def __init__(self, draw):
        self.draw, self.logits = draw, {}

    def __call__(self, logits, numbers, position):
        for number, row in zip(numbers.tolist(), logits, strict=True):
            self.logits.setdefault(number, []).append(row.clone())
        return self.draw(logits, numbers, position)


@packed
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(cfg_scale=2.0),
        dict(cfg_scale=2.0, cfg_interval=20),
        dict(cfg_scale=3.0, cfg_schedule="power-cosine", temperature=0.9, top_k=50, top_p=0.95),
    ],
)
@pytest.mark.parametrize("draw", [draw_codes, draw_gumbel])
@pytest.mark.parametrize(("batch_size", "windows"), [(1, (2, 3, 16, 64, 100)), (3, (2, 5, 64)), (7, (3, 16))])
def test_codes_and_their_logits_are_those_of_one_by_one(settings, draw, batch_size, windows):
    labels, numbers, sampling = torch.arange(batch_size), uniforms(batch_size), Sampling(**settings)
    one_by_one = Recorder(draw)
    expected = CodeGenerator(model(), batch_size, 64, sampling, draw=one_by_one)(labels, numbers)
    for window in windows:
        together = Recorder(draw)
        generator = ParallelCodeGenerator(model(), batch_size, 64, sampling, window, draw=together)
        assert torch.equal(generator(labels, numbers), expected)
        for number, [logits] in one_by_one.logits.items():
            assert any(torch.equal(logits, seen) for seen in together.logits[number])
        assert generator.finite


@packed
@pytest.mark.parametrize(
    "settings",
    [
        dict(n_kv_head=2),
        dict(n_kv_head=1),
        dict(block_size=24, grid=(4, 6)),
        dict(dim=200, n_head=2),
        dict(dim=160, n_head=2, vocab_size=1000),
        dict(cls_token_num=3),
    ],
)
def test_other_shapes_and_any_number_of_threads(settings):
    made, threads = model(**settings), torch.get_num_threads()
    length = made.args.block_size
    sampling = Sampling(2.0, 10, draw="gumbel")
    expected = CodeGenerator(made, 3, length, sampling)(LABELS, uniforms(3, length))
    try:
        for count, window in ((1, 5), (3, 16)):
            torch.set_num_threads(count)
            codes = ParallelCodeGenerator(made, 3, length, sampling, window)(LABELS, uniforms(3, length))
            assert torch.equal(codes, expected)
            alone = ParallelCodeGenerator(made, 1, length, sampling, window)
            assert torch.equal(alone(LABELS[1:2], uniforms(3, length)[1:2]), expected[1:2])
    finally:
        torch.set_num_threads(threads)


@packed
@pytest.mark.parametrize("draw", ["inverse-cdf", "gumbel"])
def test_fewer_passes_whose_codes_are_final(draw):
    generator = ParallelCodeGenerator(model(), 3, 64, Sampling(2.0, draw=draw), 16)
    numbers = uniforms(3)
    expected = CodeGenerator(model(), 3, 64, Sampling(2.0, draw=draw))(LABELS, numbers)
    for _ in range(2):
        counts = []
        for count in generator.passes(LABELS, numbers):
            assert torch.equal(generator.codes[:, :count], expected[:, :count])
            counts.append(count)
        assert counts == sorted(set(counts))
        assert counts[-1] == 64
        assert len(counts) < 48


@packed
@pytest.mark.parametrize("window", [4, 16])
def test_known_codes(window):
    sampling = Sampling(2.0, draw="gumbel")
    one_by_one = CodeGenerator(model(), 3, 64, sampling)
    generator = ParallelCodeGenerator(model(), 3, 64, sampling, window)
    free = one_by_one(LABELS, uniforms(3))
    given = torch.where(torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.5, (free + 1) % 96, -1)
    given[1] = -1
    assert torch.equal(generator(LABELS, uniforms(3), given), one_by_one(LABELS, uniforms(3), given))
    assert torch.equal(generator(LABELS, uniforms(3)), free)
    assert list(generator.passes(LABELS, uniforms(3), free)) == [64]  # nothing to draw


@packed
@pytest.mark.parametrize("settings", [dict(), dict(n_kv_head=2), dict(cls_token_num=3)])
def test_after_known_codes_logits_are_those_of_one_by_one(settings):
    made, sampling = model(**settings), Sampling(2.0, 40)
    other = CodeGenerator(made, 3, 64, sampling)(LABELS.flip(0), uniforms(3, seed=1))
    known = torch.full((3, 64), -1)
    known[:, :19], known[:, 30:50], known[0, 22:26] = other[:, :19], other[:, 30:50], other[0, 22:26]
    one_by_one = Recorder(draw_codes)
    expected = forced(CodeGenerator(made, 3, 64, sampling, draw=one_by_one), LABELS, uniforms(3), known)
    drawn = uniforms(3)[known < 0].tolist()
    most = {1: 2 + 64 - 19 - 20, 4: 2 + 64 - 19 - 20, 16: 40}
    for window, limit in most.items():
        recorder = Recorder(draw_codes)
        generator = make_generator(made, 3, 64, sampling, window, draw=recorder)
        assert len(list(generator.passes(LABELS, uniforms(3), known))) <= limit
        assert torch.equal(generator.codes, expected)
        for number in drawn:
            assert any(torch.equal(one_by_one.logits[number][0], seen) for seen in recorder.logits[number])


@pytest.mark.parametrize("key", GENERATIONS)
@pytest.mark.parametrize("window", [3, 16])
def test_golden_generations_with_static_shapes(key, window):
    generator = StaticParallelGenerator(golden_model(), 3, 64, Sampling(*case(key), sample_logits=False), window)
    for _ in range(2):  # the second batch only replays
        assert generator(LABELS, uniforms(3)).tolist() == FIGURES[key].tolist()
    assert len(generator.captured) <= 9


@pytest.mark.parametrize("settings", [dict(n_kv_head=2), dict(block_size=24, grid=(4, 6)), dict(cls_token_num=3)])
def test_static_shapes_give_what_single_steps_give(settings):
    made, sampling = model(**settings), Sampling(2.0, sample_logits=False)
    length = made.args.block_size
    expected = CodeGenerator(made, 3, length, sampling)(LABELS, uniforms(3, length))
    codes = StaticParallelGenerator(made, 3, length, sampling, 8)(LABELS, uniforms(3, length))
    assert torch.equal(codes, expected)


@packed
def test_a_sampler_of_the_users_own():
    draw = functools.partial(min_p, threshold=0.1, cooling=0.02)
    expected = make_generator(model(), 3, 64, Sampling(2.0), 1, draw=draw)(LABELS, uniforms(3))
    assert torch.equal(make_generator(model(), 3, 64, Sampling(2.0), 8, draw=draw)(LABELS, uniforms(3)), expected)


def test_compiled_once_for_all_layers_and_positions(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sampling = Sampling(2.0, 20, sample_logits=False)
    generator = ParallelCodeGenerator(golden_model(), 3, 64, sampling, 8, compile=True)
    assert generator(LABELS, uniforms(3)).tolist() == FIGURES["gen.cfg2.0.int20"].tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6


def test_windows_are_chosen_where_images_do_not_depend_on_them():
    if torch.backends.mkldnn.is_available():
        assert usual_window(model(), 1) > 1
        assert usual_window(model(), 512) == 1
        assert isinstance(make_generator(model(), 1, 64, Sampling(2.0)), ParallelCodeGenerator)
        assert type(make_generator(model(), 1, 64, Sampling(2.0), draw=min_p)) is CodeGenerator
    assert usual_window(golden_model(), 1) == 1  # its layers are not packed
    in_bf16 = golden_model().to(torch.bfloat16)
    pack_linears(in_bf16)
    assert usual_window(in_bf16, 1) == 1
    assert make_generator(in_bf16, 1, 64, Sampling(2.0), 16)(LABELS[:1], uniforms(1)).shape == (1, 64)
    assert type(make_generator(golden_model(), 1, 64, Sampling(2.0), 1)) is CodeGenerator


def test_logits_that_are_not_finite_are_noticed():
    broken = golden_model()
    torch.nn.init.constant_(broken.norm.weight, torch.nan)
    generator = ParallelCodeGenerator(broken, 3, 64, Sampling(2.0), 16)
    generator(LABELS, uniforms(3))
    with pytest.raises(FloatingPointError, match="not finite"):
        generator.check_finite()
