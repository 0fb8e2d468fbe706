"""Downloads published weights from the Hugging Face hub into pretrained_models/.

bash scripts/download.sh                     lists what exists and what is here
bash scripts/download.sh NAME [NAME…]        downloads; again, after an interruption: continues
"""

from pathlib import Path

from pretrained_models.catalogue import FOLDER, PUBLISHED, PublishedFile
from pretrained_models.hub import hub_library
from utils.commands import command
from utils.download import download as fetch
from utils.program import UserError, run
from utils.settings import option, parse, settings


@settings("published weights")
class DownloadSettings:
    names: tuple[str, ...] = option((), "published names; without any, they are listed", flag="names")
    folder: Path = option(FOLDER, "where files go")

    def __post_init__(self):
        for name in self.names:
            if name not in PUBLISHED:
                raise UserError(f"there is no published file {name}; the names are {', '.join(PUBLISHED)}.")


def main() -> None:
    chosen = parse(DownloadSettings, "Lists the published weights, or downloads those that are named.")
    for name in chosen.names:
        print(f"{name}: {download(name, chosen.folder)}")
    if not chosen.names:
        list_published(chosen.folder)


def list_published(folder: Path) -> None:
    for name, file in PUBLISHED.items():
        path = folder / name
        state = f"{path.stat().st_size / 2**20:,.0f} MiB here" if path.exists() else "not here"
        print(f"{name:26} {file.description:40} {file.repository:28} {state}")
    print(f"next: {command('download.sh')} NAME [NAME…]")


def download(name: str, folder: Path = FOLDER) -> Path:
    """Bring one file of `PUBLISHED` to `folder/name`; checks the size and SHA-256 that the hub says.

    Raises `UserError`. Not by `hf_hub_download`, which begins anew when it is started again.
    """
    file, path = PUBLISHED[name], folder / name
    if path.exists():
        return path
    library = hub_library()
    url = library.hf_hub_url(file.repository, file.filename)
    size, digest = _size_and_digest(url, name, file)
    remedy = f"download {url} by other means and put it there"
    return fetch(url, path, remedy, size=size, digest=digest, headers=library.utils.build_hf_headers())


def _size_and_digest(url: str, name: str, file: PublishedFile) -> tuple[int, str]:
    library = hub_library()
    try:
        remote = library.get_hf_file_metadata(url)
    except (library.errors.EntryNotFoundError, library.errors.RepositoryNotFoundError) as error:
        raise UserError(
            f"the hub has no file {file.filename} in {file.repository}, or wants a login for it (hf auth login)."
        ) from error
    except Exception as error:  # of whichever HTTP client this version of the hub's library uses
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the Hugging Face hub cannot be reached for {name} ({reason}); check the network (or HF_ENDPOINT), then "
            f"run the same command again: bash scripts/download.sh {name}"
        ) from error
    if remote.size is None:
        raise UserError(f"the hub does not say how large {name} is; give another HF_ENDPOINT, or try again later.")
    etag = remote.etag or ""
    return remote.size, etag if len(etag) == 64 else ""  # a large file's entity tag is its SHA-256


if __name__ == "__main__":
    run(main)
