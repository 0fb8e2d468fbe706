"""What stands before the image: a class label, or any sequence of vectors.

A conditioning of your own (docs/extending.md) is a module with a `forward` like `LabelEmbedder`'s.
"""

import torch
from torch import nn

from utils.program import first_line


class Conditioning(nn.Module):
    """Turns what is known of each image into the `length` vectors that precede its codes (ModelArgs.cls_token_num)."""

    def forward(self, cond: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors `(B, length, D)` of `cond` `(B, …)`.

        Images where `dropped` `(B,)` bool is true get the null condition that classifier-free guidance contrasts with.
        """
        raise NotImplementedError

    def check(self, cond: torch.Tensor) -> None:
        """Raise `ValueError` for conditions that the model does not know."""


@torch.no_grad()
def try_conditioning(conditioning: nn.Module, cond: torch.Tensor, length: int, dim: int) -> None:
    """Raise `ValueError` unless `cond` `(B, …)` becomes vectors `(B, length, dim)`, dropped or not."""
    shape = "x".join(map(str, cond.shape[1:])) or "single"
    for dropped in (None, torch.ones(len(cond), dtype=torch.bool, device=cond.device)):
        try:
            vectors = conditioning(cond, dropped)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise ValueError(
                f"the conditioning does not take {shape} {cond.dtype} values per image ({first_line(error)})"
            ) from error
        if (found := getattr(vectors, "shape", None)) != (len(cond), length, dim):
            raise ValueError(
                f"the conditioning gives {found and tuple(found)} for {len(cond)} images, not "
                f"{(len(cond), length, dim)}: {length} vectors each (--cls-token-num) of {dim} numbers"
            )


class LabelEmbedder(Conditioning):
    """Class labels `(B,)` int64 to one vector each; the null class, where there is one, is index `num_classes`."""

    def __init__(self, args):
        super().__init__()
        if args.cls_token_num != 1:
            raise ValueError("a class label stands at one position: cls_token_num must be 1")
        self.num_classes = args.num_classes
        self.embedding_table = nn.Embedding(args.num_classes + (args.class_dropout_prob > 0), args.dim)

    def forward(self, cond: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
        labels = cond if dropped is None else torch.where(dropped, self.num_classes, cond)
        return self.embedding_table(labels).unsqueeze(1)

    def check(self, cond: torch.Tensor) -> None:
        if cond.min() < 0 or cond.max() >= self.embedding_table.num_embeddings:
            raise ValueError(f"labels must lie in 0..{self.num_classes - 1}")
