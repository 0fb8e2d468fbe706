"""What the models' classes for the Hugging Face hub share: `save_pretrained`, `push_to_hub`, `from_pretrained`.

Imports huggingface_hub, which only `gpt_hf.py` and `vq_model_hf.py` need.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin

from pretrained_models.hub import one_sentence
from pretrained_models.hub_form import write_hub_form
from pretrained_models.provenance import code_version
from utils.checkpoint import content_hash, converted_from


class HubMixin(PyTorchModelHubMixin):
    """`PyTorchModelHubMixin` in this program's form: a configuration that says all, a model card, checked bytes."""

    about: dict[str, Any] = {"weights": "raw"}  # what is exported, as `write_hub_form` takes it

    def note(self, sha256: str, **about: Any) -> None:
        """Remember what the weights are and that they are those of `sha256`, which holds until they change."""
        origin = {"sha256": sha256, "content": content_hash({"config": self.hub_config()}, self.state_dict())}
        self.about = about | {"origin": origin}

    def hub_config(self) -> dict[str, Any]:
        """What builds the model again, as its checkpoints record it."""
        raise NotImplementedError

    def _save_pretrained(self, save_directory: Path) -> None:
        state, config = self.state_dict(), self.hub_config()
        about = self.about | {"code": code_version()}
        if converted_from(about | {"config": config}, state) is None:  # the weights have changed since
            about["metrics"] = None
        write_hub_form(save_directory, state, config, about)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to `repo_id`; `options` as `PyTorchModelHubMixin`'s. Raises `UserError`."""
        with one_sentence(repo_id):
            return super().push_to_hub(repo_id, **options)


def with_revision(name: str | Path, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else str(name)
