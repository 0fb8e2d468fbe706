"""The GPT as a model of the Hugging Face hub (docs/hub.md); the name is LlamaGen's."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.gpt import Transformer
from autoregressive.models.load import GPTSettings, build_gpt
from autoregressive.train.config import TrainSettings
from pretrained_models.catalogue import published_config
from pretrained_models.hub_mixin import HubMixin, with_revision
from pretrained_models.provenance import provenance
from utils.arguments import settings_from, speaking_of_arguments
from utils.checkpoint import read_checkpoint, recorded_settings

RECORDED = ("gpt_model", "image_size", "downsample_size", "conditioning", "tokenizer", "class_names")


class TransformerHF(Transformer, HubMixin, tags=["image-generation", "next-patch-prediction"]):
    """`Transformer` with `save_pretrained`, `push_to_hub` and `from_pretrained`."""

    recorded: dict[str, Any] = {}  # the configuration that it was read with

    def hub_config(self) -> dict[str, Any]:
        return dict.fromkeys(RECORDED) | self.recorded | {"model": asdict(self.args)}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **flags: Any
    ) -> "TransformerHF":
        """The model of a repository, a folder, or any other weights, frozen, in eval mode, in float32 on the CPU.

        `flags` are fields of `GPTSettings`. Raises `UserError`.
        """
        name = with_revision(pretrained_model_name_or_path, revision)
        with speaking_of_arguments():
            model, info = build_gpt(settings_from(GPTSettings, flags | {"gpt_ckpt": name}))
        with torch.device("meta"):
            twin = cls(model.args)
        twin.cls_embedding = model.cls_embedding
        twin.load_state_dict(model.state_dict(), strict=True, assign=True)
        twin.set_rope_tables()
        checkpoint = read_checkpoint(info.checkpoint)
        recorded = published_config(info.checkpoint) | recorded_settings(checkpoint)
        twin.recorded = {name: recorded.get(name) for name in RECORDED}
        told = provenance(checkpoint, Path(info.checkpoint), TrainSettings)
        twin.note(info.sha256, weights=info.weights, **told)
        return twin.requires_grad_(False).eval()
