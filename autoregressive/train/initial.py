"""Starting from trained weights: those of other classes, or of another grid, too (docs/fine-tuning.md)."""

from pathlib import Path

import torch

from autoregressive.models.gpt import Transformer
from autoregressive.models.load import recorded_grid, size_of, table_sizes
from autoregressive.sample.class_names import class_names, parse_classes
from autoregressive.train.config import GPTChoice
from dataset.code_store import StoreMeta
from pretrained_models.catalogue import find_weights, published_config
from utils.checkpoint import load_strict, read_checkpoint, recorded_settings, select_weights
from utils.program import UserError

TABLE = "cls_embedding.embedding_table.weight"  # (classes, and the null class where there is one, D)
NULL = "null"
WITHOUT_WEIGHTS = ("n_head", "n_kv_head", "rope_base", "norm_eps", "cls_token_num")  # settings that no shape shows


def load_initial(model: Transformer, chosen: GPTChoice, codes: StoreMeta) -> list[str]:
    """Load the weights that `--init-from` names into a new model; returns what to say of it, line by line.

    Classes start as `--init-classes` says. Raises `UserError` for weights of another size or another codebook.
    """
    path = find_weights(chosen.init_from)
    checkpoint = read_checkpoint(path)
    recorded = published_config(path) | recorded_settings(checkpoint)
    state, kind = select_weights(checkpoint, path)
    said = [f"starting from the {kind} weights of {chosen.init_from}"]
    if TABLE in state and TABLE in model.state_dict():
        state, starts = with_classes(state, recorded, model, chosen.init_classes, path)
        said.append(starts)
    elif chosen.init_classes is not None:
        raise UserError("--init-classes is for class labels, not for a --conditioning of your own; leave it out.")
    _refuse_another_codebook(state, model, path)
    load_strict(model, state, path, f"it holds {size_of({}, state) or 'another model'}; give that as --gpt-model.")
    return said + list(_differences(recorded, model, codes))


def with_classes(
    state: dict[str, torch.Tensor], recorded: dict, model: Transformer, init_classes: str | None, path: Path
) -> tuple[dict[str, torch.Tensor], str]:
    """`state` with a table of `model`'s classes, each a copy of one of its own rows, and a line that says of which."""
    table, ours = state[TABLE], model.args.num_classes
    theirs = table_sizes(state, recorded.get("model", recorded).get("num_classes"), None)["num_classes"]
    has_null, needs_null = len(table) > theirs, model.args.class_dropout_prob > 0
    names = class_names(theirs, recorded.get("class_names"))
    if init_classes is None:
        rows = list(range(ours)) if ours == theirs else [theirs] * ours
    else:
        rows = [
            theirs if entry.strip() == NULL else parse_classes(entry, names, "--init-classes")[0]
            for entry in init_classes.split(",")
        ]
        rows = rows * ours if len(rows) == 1 else rows
    if len(rows) != ours:
        raise UserError(f"--init-classes names {len(rows)} classes for {ours}; give one for all, or one for each.")
    if not has_null and needs_null:
        raise UserError(f"{path} was trained without a null class; give --class-dropout-p 0.")
    if not has_null and theirs in rows:
        raise UserError(f"{path} has no null class for new ones to start from; name some of its own by --init-classes.")
    if rows == list(range(theirs)):
        said = f"its {theirs:,} classes are kept"
    elif set(rows) == {theirs}:
        said = f"{ours:,} classes in place of its {theirs:,}; each starts from its null class"
    else:
        starts = [f"{label} from {NULL if row == theirs else f'{row} {names[row]}'}" for label, row in enumerate(rows)]
        said = f"{ours:,} classes in place of its {theirs:,}: {', '.join(starts[:8])}{', …' if ours > 8 else ''}"
    return state | {TABLE: table[rows + [theirs] * needs_null]}, said


def _refuse_another_codebook(state: dict[str, torch.Tensor], model: Transformer, path: Path) -> None:
    held = table_sizes(state, None, None).get("vocab_size", model.args.vocab_size)
    if held != model.args.vocab_size:
        raise UserError(
            f"{path} was trained on a codebook of {held:,} codes, not {model.args.vocab_size:,}; extract the images "
            "with the tokenizer of its training, or train from the start."
        )


def _differences(recorded: dict, model: Transformer, codes: StoreMeta):
    """What else is new to the weights, a line each."""
    said = recorded | recorded.get("model", {})
    for name in WITHOUT_WEIGHTS:
        here, there = getattr(model.args, name), said.get(name)
        if there not in (None, here):
            yield f"warning: they were trained with {name} {there}, not {here}; their layers compute something else now"
    grid, trained_on = recorded_grid(recorded), (recorded.get("tokenizer") or {}).get("hash")
    if grid not in (None, model.args.grid):
        ours = "x".join(map(str, model.args.grid))
        yield f"the grid of {ours} codes is new to them: they were trained on {grid[0]}x{grid[1]}"
    if trained_on and codes.tokenizer.get("hash") not in (None, trained_on):
        yield (
            "warning: they were trained on codes of another tokenizer; unless yours was fine-tuned from that one, its "
            "codes mean something else"
        )
