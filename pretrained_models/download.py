"""Downloads published weights from the Hugging Face hub into pretrained_models/; continues interrupted downloads.

bash scripts/download.sh                     lists what exists and what is here
bash scripts/download.sh NAME [NAME…]        downloads; again, after an interruption
"""

import argparse
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from pretrained_models.catalogue import FOLDER, PUBLISHED, PublishedFile
from utils.files import sha256
from utils.program import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="published names, as listed without any")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where files go (default: pretrained_models/)")
    args = parser.parse_args()
    for name in args.names:
        if name not in PUBLISHED:
            raise UserError(f"there is no published file {name}; the names are {', '.join(PUBLISHED)}.")
    for name in args.names:
        print(f"{name}: {download(name, args.folder)}")
    if not args.names:
        list_published(args.folder)


def list_published(folder: Path) -> None:
    for name, file in PUBLISHED.items():
        path = folder / name
        state = f"{path.stat().st_size / 2**20:,.0f} MiB here" if path.exists() else "not here"
        print(f"{name:26} {file.description:40} {file.repository:28} {state}")
    print("next: bash scripts/download.sh NAME [NAME…]")


def download(name: str, folder: Path = FOLDER) -> Path:
    """Bring one file of `PUBLISHED` to `folder/name`, or continue to; checks its size and SHA-256. Raises `UserError`.

    `hf_hub_download` begins anew when it is started again; here the part that has arrived is kept and continued.
    """
    file, target = PUBLISHED[name], folder / name
    if target.exists():
        return target
    url = hf_hub_url(file.repository, file.filename)
    try:
        remote = get_hf_file_metadata(url)
        if remote.size is None:
            raise UserError(f"the hub does not say how large {name} is; give another HF_ENDPOINT, or try again later.")
        version = (remote.etag or "unknown")[:16]
        part = target.with_name(f".{target.name}.{version}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as stream:
            if stream.tell() > remote.size:
                stream.seek(0)
                stream.truncate()
            if stream.tell() < remote.size:
                http_get(url, stream, resume_size=stream.tell(), headers=build_hf_headers(), expected_size=remote.size)
    except Exception as error:
        raise _explained(error, name, file) from error
    if part.stat().st_size != remote.size or (len(remote.etag or "") == 64 and sha256(part) != remote.etag):
        part.unlink()
        raise UserError(f"{name} arrived damaged (its size or SHA-256 is not the hub's) and was removed; run the same "
                        f"command again: bash scripts/download.sh {name}")  # fmt: skip
    return part.rename(target)


def _explained(error: Exception, name: str, file: PublishedFile) -> Exception:
    """The sentence for a failed download; `error` itself where there is none to say."""
    again = f"run the same command again to continue: bash scripts/download.sh {name}"
    names = {cls.__name__ for cls in type(error).__mro__}  # of whichever HTTP client this version of the hub uses
    if names & {"ConnectionError", "ConnectError", "ConnectTimeout", "LocalEntryNotFoundError"}:
        return UserError(
            f"the Hugging Face hub cannot be reached for {name}; check the network (or HF_ENDPOINT), then {again}"
        )
    if isinstance(error, EntryNotFoundError | RepositoryNotFoundError):
        return UserError(f"the hub has no file {file.filename} in {file.repository}, or wants a login for it "
                         "(hf auth login).")  # fmt: skip
    if isinstance(error, HfHubHTTPError):
        return UserError(f"the hub refused {name} ({str(error).splitlines()[0]}); {again}")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return UserError(f"{name} arrived with another size than the hub announced; {again}")
    if names & {"TransportError", "RequestException", "TimeoutError"}:
        return UserError(f"the download of {name} broke off ({type(error).__name__}); {again}")
    return error


if __name__ == "__main__":
    run(main)
