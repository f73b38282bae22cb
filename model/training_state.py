"""Training states on disk: with the data, everything a run needs to go on as if it had never been stopped.

    NAME.state/step_00000500/  facts.json    which run this is: options, data, tokenizer, architecture
                               state.pt      place in the data, random generators
                               model.pt      model and optimizers (with DeepSpeed a folder of files)
                               SHA256SUMS    of the files above (`sha256sum -c` reads it, too)

A state is written under a temporary name, brought to the disk, and renamed: under its final name it is complete. The
last two are kept, so that a newest one that the disk has damaged costs no more than the steps since the one before.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .checkpoint import file_hash, flush, write_json, write_tensors
from .cli import UserError
from .distributed import Run

KEPT = 2
SUMS = "SHA256SUMS"


class TrainingState(NamedTuple):
    folder: Path
    step: int
    facts: dict[str, Any]
    content: dict[str, Any]


def save_or_warn(run: Run, folder: Path, step: int, last: bool, works: Iterable[Callable[[], None]]) -> bool:
    """Does `works`, the writing of weights and state, one after the other on every process; whether all are done.

    What cannot be written is a warning as long as the run goes on, since the next interval tries again; at its `last`
    step it is an error.
    """
    error = next(filter(None, map(run.attempt, works)), None)
    if error is None:
        return True
    if run.is_main:
        remove_unfinished(folder)  # a full disk has no room for half a state
    message = f"step {step} could not be saved: {error}"
    if last:
        run.fail(message)
    if run.is_main:
        tqdm.write(f"warning: {message}")
    return False


def states_folder(weights: Path) -> Path:
    """out/pretrain_512.pth -> out/pretrain_512.state"""
    return weights.with_suffix(".state")


def begin_state(folder: Path, step: int) -> Path:
    """An empty folder under a temporary name, for the files of a state."""
    remove_unfinished(folder)
    temporary = unfinished_state(folder, step)
    temporary.mkdir(parents=True)
    return temporary


def remove_unfinished(folder: Path) -> None:
    for unfinished in folder.glob("*.tmp"):
        shutil.rmtree(unfinished)


def unfinished_state(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.tmp"


def finish_state(folder: Path, step: int, facts: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes what is missing and the sums of all files, and gives the state its name; of older ones the last is kept.

    States of later steps go, too: they are damaged, or the run would not have gone back behind them.
    """
    temporary = unfinished_state(folder, step)
    write_tensors(content, temporary / "state.pt")
    write_json(temporary / "facts.json", {"step": step, **facts})
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        flush(path)
    sums = [f"{file_hash(path)}  {path.relative_to(temporary)}\n" for path in files]
    (temporary / SUMS).write_text("".join(sums), encoding="utf-8")
    flush(temporary / SUMS)
    final = temporary.with_suffix("")
    if final.exists():  # damaged, or saved before; it stays until its successor is there
        os.replace(final, folder / "replaced.tmp")
    os.replace(temporary, final)
    flush_folder(folder)
    states = finished_states(folder)
    kept = [state for state in states if state <= final][-KEPT:]
    for state in {*states, *folder.glob("*.tmp")} - set(kept):
        shutil.rmtree(state)


def finished_states(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and path.suffix != ".tmp")


def newest_state(folder: Path) -> tuple[TrainingState | None, list[str]]:
    """The newest state that is intact, and a sentence for each newer one that is not.

    Raises:
        UserError: there are states, but none is intact.
    """
    complaints = []
    states = finished_states(folder)
    for path in reversed(states):
        damage = find_damage(path)
        if damage is None:
            facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
            content = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            return TrainingState(path, facts.pop("step"), facts, content), complaints
        complaints.append(f"{path} is damaged ({damage}) and not used")
    if states:
        raise UserError(f"{'; '.join(complaints)}. No other state is left: start anew with --resume never")
    return None, []


def find_damage(folder: Path) -> str | None:
    """What is wrong with a state; None if it is as it was written."""
    try:
        lines = (folder / SUMS).read_text(encoding="ascii").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        return f"{SUMS}: {error}"
    if not {"facts.json", "state.pt"} <= sums.keys():
        return f"{SUMS} is not complete"
    for name, digest in sums.items():
        try:
            if file_hash(folder / name) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return str(error)
    return None


def flush_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk; Windows cannot tell."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
