"""The VQ tokenizer as a model of the Hugging Face hub (docs/hub.md); the name is LlamaGen's."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrained_models.hub_mixin import HubMixin, with_revision
from pretrained_models.provenance import provenance
from tokenizer.tokenizer_image.load import TokenizerSettings, build_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from tokenizer.tokenizer_image.vq_setup import VQTrainSettings
from utils.arguments import settings_from, speaking_of_arguments
from utils.checkpoint import read_checkpoint
from utils.program import UserError


class VQModelHF(VQModel, HubMixin, tags=["image-tokenizer"]):
    """`VQModel` with `save_pretrained`, `push_to_hub` and `from_pretrained`."""

    name = "VQ-16"  # of the architecture, which its settings change

    def hub_config(self) -> dict[str, Any]:
        return asdict(self.config) | {"vq_model": self.name, "vq_model_identity": self.name}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **flags: Any
    ) -> "VQModelHF":
        """The tokenizer of a repository, a folder, or any other weights, frozen, in eval mode, on the CPU.

        `flags` are fields of `TokenizerSettings`. Raises `UserError`.
        """
        name = with_revision(pretrained_model_name_or_path, revision)
        with speaking_of_arguments():
            model, info = build_tokenizer(settings_from(TokenizerSettings, flags | {"vq_ckpt": name}))
        if not isinstance(model, VQModel):
            raise UserError(f"{name} holds {info.name}, no VQ tokenizer; load it by build_tokenizer.")
        with torch.device("meta"):
            twin = cls(model.config)
        twin.load_state_dict(model.state_dict(), strict=True, assign=True)
        twin.name = info.name
        told = provenance(read_checkpoint(info.checkpoint), Path(info.checkpoint), VQTrainSettings)
        twin.note(info.sha256, weights=info.weights, **told)
        return twin.requires_grad_(False).eval()
