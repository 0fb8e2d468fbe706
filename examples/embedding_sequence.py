"""A conditioning of your own: a sequence of several embeddings per image in place of a class label, as text would be.

    bash scripts/autoregressive/train_c2i.sh … --cls-token-num 4 --conditions embeddings.npy \
        --conditioning 'examples/embedding_sequence.py:EmbeddingSequence(width=16)'
    bash scripts/autoregressive/sample_c2i.sh … --conditions embeddings_to_draw.npy --cfg-scale 2.0 \
        --conditioning 'examples/embedding_sequence.py:EmbeddingSequence(width=16)'

`embeddings.npy` is float32 `(images, 4, 16)`, one row per image in the order of the codes.
"""

import torch
from torch import nn

from autoregressive.models.conditioning import Conditioning


class EmbeddingSequence(Conditioning):
    def __init__(self, args, width: int):
        """`args` are the model's settings: `cls_token_num` positions of `dim` channels stand before the image."""
        super().__init__()
        self.length = args.cls_token_num
        self.projection = nn.Linear(width, args.dim)
        self.null = nn.Parameter(torch.randn(self.length, args.dim) * args.initializer_range)

    def forward(self, cond: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, length, width)` to `(B, length, D)`; where `dropped` `(B,)`, the learned null condition of guidance."""
        projected = self.projection(cond.to(self.projection.weight.dtype))
        if dropped is None:
            return projected
        return torch.where(dropped[:, None, None], self.null.to(projected.dtype), projected)
