"""Drawing several codes at a time: the same picture in fewer passes of the model.

A code is a fixed function of the codes before it and of the image's own randomness at its place. So all codes of a
window can be drawn at once from guesses of those before them, and the first of the window is then final, as is every
further one before which all guesses have come true. The next window starts behind them; its guesses are what was
drawn last, and where nothing was, the code above. This is Jacobi iteration (arXiv 2002.03629; for image codes arXiv
2410.01699), here with draws whose randomness is fixed beforehand: the only fixed point is the picture that is drawn
code by code, and nothing about the distribution changes. In float32 on the CPU every number is rounded as it is there,
too; elsewhere pictures differ by rounding, as they do between batch sizes.

Letters in shapes are those of models/generate.py, and W the codes of a window.
"""

from collections.abc import Iterator

import torch

from autoregressive.models.generate import CodeGenerator, Draw
from autoregressive.models.gpt import Transformer, TransformerBlock
from autoregressive.models.packed_linear import PackedLinear
from autoregressive.models.sampling import Sampling

# On a CPU: what was fastest, and for how many images at once anything was (docs/parallel-decoding.md).
USUAL_WINDOW, LARGEST_BATCH = 8, 2


def make_generator(
    model: Transformer,
    batch_size: int,
    length: int,
    sampling: Sampling,
    window: int | None = None,
    compile: bool = False,
    draw: Draw | None = None,
) -> CodeGenerator:
    """A generator that draws `window` codes in a pass; None: as many as make it fastest, if pictures stay the same."""
    if window is None:
        window = usual_window(model, batch_size) if draw is None and not compile else 1
    if window == 1:
        return CodeGenerator(model, batch_size, length, sampling, compile, draw)
    return ParallelCodeGenerator(model, batch_size, length, sampling, window, compile, draw)


def usual_window(model: Transformer, batch_size: int) -> int:
    """Codes at a time that make a batch fastest; 1 where rounding depends on it."""
    return USUAL_WINDOW if rounds_alike(model) and batch_size <= LARGEST_BATCH else 1


def rounds_alike(model: Transformer) -> bool:
    """Whether every number is rounded the same, however many images and codes a pass takes."""
    return isinstance(model.output, PackedLinear) and model.tok_embeddings.weight.dtype == torch.float32


class ParallelCodeGenerator(CodeGenerator):
    """`CodeGenerator` that draws a window of codes in every pass; each image has its window where it needs it."""

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        length: int,
        sampling: Sampling,
        window: int,
        compile: bool = False,
        draw: Draw | None = None,
    ) -> None:
        super().__init__(model, batch_size, length, sampling, compile, draw)
        self.window = min(window, length)
        with self.device:
            self.final = torch.zeros(batch_size, dtype=torch.int64)  # how many codes of each image are, from the first
            self.drawn = torch.zeros(batch_size, dtype=torch.int64)  # how many are, or are a guess that was drawn
            self.offsets = torch.arange(self.window)
            self.images = torch.arange(len(self.x)).repeat_interleave(self.window)  # whose keys a row of a pass has

    @torch.no_grad()
    def passes(self, cond: torch.Tensor, uniforms: torch.Tensor, known: torch.Tensor | None = None) -> Iterator[int]:
        """As `CodeGenerator.passes`; waits for the device after each pass, which decides how far the next one reads."""
        self.start(cond, uniforms, known)
        for state in (self.final, self.drawn, self.codes):
            state.zero_()
        fewest = most = 0
        while fewest < self.length:
            if self.known_until[fewest] - fewest > self.window:
                fewest = self._take_known(fewest)
                most = max(most, fewest)
                self.final.clamp_(min=fewest)
                self.drawn.clamp_(min=fewest)
            else:
                self._run(self.before + min(most + self.window, self.length), fewest < self.guided)
                fewest, most = torch.stack(self.final.aminmax()).tolist()
            yield fewest

    def _decode(self, length: int, guided: bool, some_known: bool) -> None:
        """One window of every image, from `self.codes` and `self.final` to better ones, reading `length` positions."""
        rows = 2 * self.batch_size if guided else self.batch_size
        # at the end of an image the window reaches back over codes that are final: shapes stay the same
        first = self.final.clamp(max=self.length - self.window)
        tokens = first.unsqueeze(1) + self.offsets  # (B, W)
        guesses = self._guesses(tokens, some_known)
        previous = self.codes.gather(1, (first - 1).clamp(min=0).unsqueeze(1))
        embedded = self.model.tok_embeddings(torch.cat([previous, guesses[:, :-1]], dim=1))  # (B, W, D)
        if guided:
            tokens, embedded = torch.cat([tokens, tokens]), torch.cat([embedded, embedded])
        x = torch.where((tokens == 0).unsqueeze(-1), self.x[:rows].unsqueeze(1), embedded)  # (R, W, D)
        positions = tokens + self.before  # (R, W)
        places = (self.images[: positions.numel()], positions.flatten())
        x = x.view(1, rows * self.window, -1)
        mask = self._spread(self.causal[:, :length][positions])
        x = self._through_layers(x, self.model.rope_1[places[1]], places, mask, rows)

        tokens = tokens[: self.batch_size]
        randomness = self.randomness[self.images[: tokens.numel()], tokens.flatten()]
        codes, finite = self._pick_codes(self, x.squeeze(0), guided, tokens.view(-1, 1), randomness)
        self.finite.logical_and_(finite)
        codes = torch.where(tokens < self.final.unsqueeze(1), guesses, codes.view_as(tokens))
        if some_known:
            codes = self._with_known(codes, tokens)
        self.codes.scatter_(1, tokens, codes)
        came_true = (codes == guesses)[:, :-1].cumprod(1).sum(1)
        self.final.copy_(first + 1 + came_true)
        self.drawn.copy_(first + self.window)

    def _guesses(self, tokens: torch.Tensor, some_known: bool) -> torch.Tensor:
        """Guesses `(B, W)` of the codes at `tokens`: as last drawn; else the nearest above that was drawn."""
        width = self.model.args.grid[1]
        rows_up = (tokens - self.drawn.unsqueeze(1)).div(width, rounding_mode="floor") + 1
        guesses = self.codes.gather(1, (tokens - width * rows_up.clamp(min=0)).clamp(min=0))
        return self._with_known(guesses, tokens) if some_known else guesses

    def _with_known(self, codes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        known = self.known.gather(1, tokens)
        return torch.where(known < 0, codes, known)

    def _attend(self, query, keys, values, mask) -> torch.Tensor:
        """Queries `(1, n_head, R*W, head_dim)` over `(R, n_kv_head, S, head_dim)`; `mask` is added to the scores."""
        query = query.squeeze(0).unflatten(1, (-1, self.window)).transpose(0, 1)  # (R, n_head, W, head_dim)
        attended = self._attend_several(query, keys, values, mask)
        return attended.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    @staticmethod
    def _project_and_store(layer: TransformerBlock, x, rope, keys, values, places) -> torch.Tensor:
        """Queries of `x` `(1, R*W, D)`; its keys and values go into the cache at `places`: rows and positions."""
        query, key, value = layer.before_attention(x, rope)  # (1, heads, R*W, head_dim)
        rows, positions = places
        keys[rows, :, positions] = key.squeeze(0).transpose(0, 1)
        values[rows, :, positions] = value.squeeze(0).transpose(0, 1)
        return query
