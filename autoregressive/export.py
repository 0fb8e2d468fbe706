"""Converts weights between checkpoints and the form of the Hugging Face hub, without loss in either direction.

bash scripts/export.sh SOURCE FOLDER                      a checkpoint, run folder or published name to the hub's form
bash scripts/export.sh SOURCE FILE.pt                     a folder or repository in the hub's form to a checkpoint
bash scripts/export.sh SOURCE FOLDER --push ORG/NAME      and from there to the hub
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from autoregressive.export_records import Record, metrics_of, read_record
from autoregressive.models.load import check_tokenizer
from pretrained_models.hub import is_repository, push
from pretrained_models.hub_form import remove_tokenizer, write_hub_form
from pretrained_models.provenance import code_version
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.arguments import settings_from, speaking_of_arguments
from utils.checkpoint import TOKENIZER_FOLDER, WEIGHTS, WEIGHTS_CHOICES
from utils.commands import command
from utils.files import atomic_file
from utils.program import UserError, run
from utils.settings import REQUIRED, option, parse, settings

UNRECORDED = ("gpt_model", "image_size", "downsample_size", "num_classes", "vq_model")


@settings("what to convert")
class ExportSettings:
    source: str = option(
        REQUIRED,
        "weights of a GPT or a tokenizer: a checkpoint, a run folder, a published name, or a folder or repository in "
        "the form of the Hugging Face hub",
        flag="source",
    )
    target: Path = option(REQUIRED, "folder for the hub's form, or FILE.pt for a checkpoint", flag="target")
    weights: str = option(
        "auto", "averaged (ema) or raw weights; auto: averaged where there are any", choices=WEIGHTS_CHOICES
    )
    tokenizer: str | None = option(
        None,
        "tokenizer of the GPT, to go into its folder (default: where the GPT's checkpoint says that it lies, if it is "
        "still there)",
        aliases=("--vq-ckpt",),
    )
    vq_weights: str = option(
        "auto",
        "averaged (ema) or raw weights of --tokenizer; auto: those that the GPT was trained with",
        choices=WEIGHTS_CHOICES,
    )
    push: str | None = option(None, "upload the folder to this repository of the hub, ORG/NAME; made if need be")
    private: bool = option(False, "a repository that --push makes is private")
    report: Path | None = option(None, "report of the evaluator (SAMPLE.json), whose metrics go into the model card")
    license: str | None = option(
        None,
        "licence of the weights, by its name on the hub, such as cc-by-nc-4.0 (default: as the source says; mit for "
        "published weights; else none is stated)",
    )
    gpt_model: str | None = option(None, "size of the GPT, if the source does not say it")
    image_size: int | None = option(None, "pixels per side, if the source does not say it", at_least=1)
    downsample_size: int | None = option(None, "pixels per side of one code, if the source does not say it", at_least=1)
    num_classes: int | None = option(None, "classes of the GPT, if the source does not say it", at_least=1)
    vq_model: str | None = option(None, "name of the tokenizer, if its file does not say it (VQ-16, VQ-8, …)")

    def __post_init__(self):
        if self.push is not None and not is_repository(self.push):
            raise UserError(f"--push {self.push!r} cannot be a repository of the hub; give ORG/NAME.")
        if self.push is not None and self.is_checkpoint:
            raise UserError("--push uploads the hub's form; name a folder instead of a .pt file, or leave it out.")
        if self.private and self.push is None:
            raise UserError("--private is for the repository of --push; give both.")

    @property
    def is_checkpoint(self) -> bool:
        return self.target.suffix in (".pt", ".pth")


def main() -> None:
    chosen = parse(ExportSettings, "Converts weights between checkpoints and the form of the Hugging Face hub.")
    source, tokenizer = read_source(chosen), None
    if chosen.is_checkpoint:
        write_checkpoint(source, chosen)
    elif chosen.push and chosen.target.resolve() == source.path.resolve():
        refuse_changes(chosen)
    else:
        tokenizer = tokenizer_of(source, chosen)
        write_folder(source, tokenizer, chosen)
    print(f"{source} are in {chosen.target}")
    if tokenizer is not None:
        print(f"{tokenizer}, its tokenizer, are in {chosen.target / TOKENIZER_FOLDER}")
    if chosen.push:
        print(f"pushed: {push(chosen.target, chosen.push, chosen.private)}")
    print(f"next: {next_command(source, tokenizer, chosen)}")


def refuse_changes(chosen: ExportSettings) -> None:
    """Raise `UserError` if flags ask for something else than to upload the folder as it is."""
    allowed = ("source", "target", "push", "private", "weights")
    for name in [f.name for f in fields(chosen) if f.name not in allowed and getattr(chosen, f.name) != f.default]:
        raise UserError(
            f"{chosen.target} is uploaded as it is, without --{name.replace('_', '-')}; write it anew with this flag, "
            "from what it was made of, into another folder."
        )


def save_pretrained(gpt: str | Path, folder: str | Path, /, **flags: Any) -> Path:
    """Write the GPT that `gpt` names, and its tokenizer, into `folder` in the hub's form; returns the folder.

    `flags` are further fields of `ExportSettings`, such as `tokenizer`, `weights`, `report` and `push`. Raises
    `UserError`.
    """
    with speaking_of_arguments():
        for name, value in (("gpt", gpt), ("folder", folder)):
            if not isinstance(value, str | Path) or not str(value):
                raise UserError(f"{name} must be a name or a path, not {value!r}.")
        chosen = settings_from(ExportSettings, flags | {"source": gpt, "target": folder})
        source = read_source(chosen)
        write_folder(source, tokenizer_of(source, chosen), chosen)
        if chosen.push:
            push(chosen.target, chosen.push, chosen.private)
        return chosen.target


def read_source(chosen: ExportSettings) -> Record:
    return read_record(chosen.source, chosen.weights, **{name: getattr(chosen, name) for name in UNRECORDED})


def tokenizer_of(source: Record, chosen: ExportSettings) -> Record | None:
    """The tokenizer that a GPT was trained with, if one is given or lies where the GPT's checkpoint says."""
    if not source.is_gpt:
        if chosen.tokenizer is not None:
            raise UserError(f"{source.path} is a tokenizer itself; leave --tokenizer out.")
        return None
    place, trained = source.places.get("tokenizer"), source.config["tokenizer"]
    name = chosen.tokenizer or (place if place and Path(place).exists() else None)
    if name is None:
        print("its tokenizer is not known here and not in the folder; --tokenizer puts it there")
        return None
    weights = (trained.get("weights") or "auto") if chosen.vq_weights == "auto" else chosen.vq_weights
    built_in = trained.get("name") if trained.get("name") in VQ_models else None
    tokenizer = read_record(name, weights, vq_model=chosen.vq_model or built_in)
    if tokenizer.is_gpt:
        raise UserError(f"--tokenizer {name} is a GPT; give the tokenizer on whose codes it was trained.")
    check_tokenizer(trained, tokenizer, str(source.path))
    return tokenizer


def write_folder(source: Record, tokenizer: Record | None, chosen: ExportSettings) -> None:
    """`source` in the hub's form, with its tokenizer in a folder inside."""
    folder = chosen.target
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder, or FILE.pt for a checkpoint.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / WEIGHTS).exists():
        raise UserError(f"{folder} holds other files; name a new folder.")
    for read in (source, tokenizer):
        if read is not None and folder.resolve() in (read.path.resolve(), *read.path.resolve().parents):
            raise UserError(f"{folder} holds what is to be converted; name another folder.")
    about = described(source, chosen)
    name = chosen.push or folder.name
    if tokenizer is None:
        remove_tokenizer(folder)  # of weights that were here before
    else:
        part, known = f"{name}/{TOKENIZER_FOLDER}", {"code": code_version()}
        known["license"] = tokenizer.told["license"] or chosen.license
        write_hub_form(folder / TOKENIZER_FOLDER, tokenizer.state, tokenizer.config, tokenizer.about | known, part)
    write_hub_form(folder, source.state, source.config, about, name)


def described(source: Record, chosen: ExportSettings) -> dict[str, Any]:
    """What is written of `source` beside its configuration: as it says itself, unless flags say otherwise."""
    given = {"license": chosen.license, "metrics": metrics_of(chosen.report)}
    return source.about | {"code": code_version()} | {name: value for name, value in given.items() if value is not None}


def write_checkpoint(source: Record, chosen: ExportSettings) -> None:
    """`source` as a `.pt` that this program and the published ones read."""
    target = chosen.target
    if target.exists():
        raise UserError(f"{target} exists; name another file, or remove it.")
    about = described(source, chosen)
    about["args"] = about.pop("training")  # as trainers call it
    checkpoint = {"model": source.state, "config": source.config, "places": source.places, **about}
    with atomic_file(target) as file:
        torch.save(checkpoint, file)


def next_command(source: Record, tokenizer: Record | None, chosen: ExportSettings) -> str:
    """A first look at what was written: a picture, or the tokenizer's reconstructions."""
    written = chosen.push or chosen.target
    own = source.config.get("conditioning")
    if not source.is_gpt:
        return command("tokenizer/reconstruction_vq.sh", vq_ckpt=written, data_path="IMAGES")
    if tokenizer is not None:
        decoder: str | Path = f"{written}/{TOKENIZER_FOLDER}" if chosen.push else chosen.target / TOKENIZER_FOLDER
    else:
        place = source.places.get("tokenizer")
        decoder = Path(place) if place and Path(place).exists() else "TOKENIZER.pt"
    return command(
        "autoregressive/sample_one_c2i.sh",
        gpt_ckpt=written,
        vq_ckpt=decoder,
        conditioning=own and own.split(" sha256 ")[0],
    )


if __name__ == "__main__":
    run(main)
