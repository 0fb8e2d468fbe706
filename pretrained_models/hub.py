"""Repositories of weights on the Hugging Face hub: found by name, fetched into the hub's own cache, pushed.

`ORG/NAME` names a repository, `ORG/NAME/FOLDER` a folder in it, `@REVISION` behind either a branch, tag or commit.
"""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.checkpoint import CONFIG, TOKENIZER_FOLDER, WEIGHTS
from utils.program import UserError, first_line

WORD = r"\w[\w.-]*"
REPOSITORY = re.compile(rf"(?P<name>{WORD}/{WORD})(?P<folder>/{WORD})?(@(?P<revision>[\w./-]+))?")
FILES = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".safetensors", ".npz")
LONGEST_REASON = 100  # characters of what an HTTP client says
LOGIN = "log in (hf auth login, or HF_TOKEN)"


def may_be_repository(name: str) -> bool:
    """Whether a name that is no path here can be a repository's."""
    return REPOSITORY.fullmatch(name) is not None and not name.endswith(FILES)


def is_repository(name: str) -> bool:
    """Whether `name` is ORG/NAME."""
    return re.fullmatch(f"{WORD}/{WORD}", name) is not None


@functools.cache
def fetch_repository(spelling: str) -> Path:
    """The folder in the hub's cache with `config.json` and `model.safetensors` of a repository.

    What has changed there since the last time is fetched; without a network, what is in the cache serves. The answer
    holds for the whole process, so that all its parts see one revision. Raises `UserError`.
    """
    parts = REPOSITORY.fullmatch(spelling)
    folder = f"{parts['folder']}/".removeprefix("/") if parts["folder"] else ""
    files = _Files(parts["name"], parts["revision"], folder + CONFIG)
    config = files.fetch(folder + CONFIG)
    root = config.parent.parent if folder else config.parent
    files.revision = root.name  # the commit: the other files are of the same
    files.fetch(folder + WEIGHTS)
    if not folder and files.has(f"{TOKENIZER_FOLDER}/{CONFIG}"):  # a GPT's repository with its tokenizer
        files.fetch(f"{TOKENIZER_FOLDER}/{WEIGHTS}")
    return config.parent


class _Files:
    """Files of a repository, from the hub, or from its cache alone if the hub is out of reach."""

    def __init__(self, repository: str, revision: str | None, first: str):
        self.repository, self.revision = repository, revision
        self.out_of_reach = self._out_of_reach(first)

    def fetch(self, filename: str) -> Path:
        with one_sentence(self.repository, filename, self.revision):
            return self._fetch(filename)

    def has(self, filename: str) -> bool:
        with one_sentence(self.repository, filename, self.revision):
            try:
                return self._fetch(filename).exists()
            except hub_library().errors.EntryNotFoundError:
                return False

    def _fetch(self, filename: str) -> Path:
        local = self.out_of_reach is not None
        try:
            found = hub_library().hf_hub_download(
                self.repository, filename, revision=self.revision, local_files_only=local
            )
        except hub_library().errors.LocalEntryNotFoundError as error:
            raise error from (self.out_of_reach or error.__cause__)
        return Path(found)

    def _out_of_reach(self, filename: str) -> Exception | None:
        """Why the hub does not answer at all: the library itself would try for half a minute."""
        library = hub_library()
        with one_sentence(self.repository, filename, self.revision):
            url = library.hf_hub_url(self.repository, filename, revision=self.revision)
        try:
            library.get_hf_file_metadata(url)
        except (library.errors.HfHubHTTPError, library.errors.EntryNotFoundError):
            return None  # it does answer, and what it says comes again
        except Exception as error:  # of whichever HTTP client this version of the library uses
            return error
        return None


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload what `folder` holds in the hub's form to `repository`, made if it does not exist; returns the URL.

    Raises `UserError`.
    """
    api = hub_library().HfApi()
    with one_sentence(repository):
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        ours = ["README.md", CONFIG, WEIGHTS, f"{TOKENIZER_FOLDER}/*"]
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=ours, commit_message="Weights and their configuration"
        )
    return f"{hub_library().constants.ENDPOINT}/{name}"


@contextmanager
def one_sentence(repository: str, filename: str = "", revision: str | None = None) -> Iterator[None]:
    """Turn what the hub's library raises into a `UserError`; failures of this machine's disk pass as they are."""
    errors = hub_library().errors
    try:
        yield
    except errors.GatedRepoError as error:
        page = f"{hub_library().constants.ENDPOINT}/{repository}"
        raise UserError(f"{repository} asks to accept its terms: do that at {page}, then {LOGIN}.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no file or folder {repository} here, and the hub has no repository of that name, or a private "
            f"one; check the name, or {LOGIN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision}; see its branches and tags on the hub.") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"there is no file or folder {repository} here, and the hub cannot be reached to look for a repository "
            f"of that name ({_reason(error.__cause__ or error)}); check the path, the network, or HF_ENDPOINT."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"the repository {repository} has no {filename}, so it is not in the form that is read here (docs/hub.md); "
            "published .pt files: bash scripts/download.sh"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{repository} cannot be the name of a repository: {_reason(error)}.") from error
    except Exception as error:  # of whichever HTTP client this version of the hub's library uses
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(_refusal(repository, filename, error)) from error


def _refusal(repository: str, filename: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses access to {repository}; {LOGIN} with a token that may do this."
    what = f"{filename} of {repository} could not be fetched" if filename else f"{repository} could not be written"
    if "onsistency check failed" in str(error):
        return f"{what}: another number of bytes arrived than the hub announced; run the same command again."
    return f"{what} ({_reason(error)}); check the network, or HF_ENDPOINT, then run the same command again."


def _reason(error: BaseException) -> str:
    text = first_line(error)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"


def hub_library():
    """The package, imported when it is needed; `UserError` if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise UserError(
            "repositories of the Hugging Face hub need the package huggingface_hub; run: pip install -r "
            "requirements.txt, or name a file or folder"
        ) from error
    return huggingface_hub
