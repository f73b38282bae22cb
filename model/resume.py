"""What makes a run the same run: the facts that must not change, the random generators, the metrics, the signals."""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .checkpoint import LMCONFIG_FIELDS, file_hash, weights_hash
from .cli import Stopped, UserError
from .distributed import Run
from .LMConfig import LMConfig
from .options import TrainingOptions
from .tokenizer import tokenizer_hash
from .training_state import TrainingState, newest_state, states_folder

# Options that may change from one start to the next: they say where and how often, not what is trained. Paths are
# compared by the content behind them, --model by the architecture, batch and accumulation by their product.
FREE_OPTIONS = {
    *("data_path", "val_path", "tokenizer", "init_from", "model", "out_dir", "stage", "batch_size"),
    *("accumulation_steps", "epochs", "max_steps", "device", "compile", "num_workers", "deepspeed"),
    *("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe"),  # 0 means the preset's; the model's own are compared
    *("log_interval", "save_interval", "val_interval", "resume", "accept_changes", "lora_name", "merge", "plan"),
}
FORM_OF_STATE = ("engine", "processes")  # facts without which a state cannot even be read


def run_facts(
    args: TrainingOptions, config: LMConfig, data: Path, tokenizer: PreTrainedTokenizerBase, **more: Any
) -> dict[str, Any]:
    """What the final weights depend on, by name, as JSON can hold it; the length of the run is not among it."""
    architecture = {f"model {name}": getattr(config, name) for name in LMCONFIG_FIELDS if name != "max_seq_len"}
    options = {name: value for name, value in asdict(args).items() if name not in FREE_OPTIONS}
    contents = {
        "data": file_hash(data),
        "tokenizer": tokenizer_hash(tokenizer.name_or_path),
        "initial weights": weights_hash(args.init_from) if args.init_from else "fresh",
    }
    return json.loads(json.dumps(options | architecture | contents | more))


def find_state(weights: Path, facts: dict[str, Any], total_steps: int, args: TrainingOptions) -> TrainingState | None:
    """The state to go on from, with what is to be said about it; None for a fresh start.

    Raises:
        UserError: it belongs to a run that would have given other weights, or weights are there of which nobody knows
            the run.
    """
    folder = states_folder(weights)
    if args.init_from and Path(args.init_from).resolve() == weights.resolve():
        raise UserError(f"--init_from {args.init_from} is what this run would write over: name another --out_dir")
    if args.resume == "never":
        shutil.rmtree(folder, ignore_errors=True)
    elif weights.exists() and not folder.exists():
        raise UserError(f"{weights} is there, but no {folder}: move it away, or start over it with --resume never")
    try:
        folder.mkdir(parents=True, exist_ok=True)  # from now on, weights without a state are this run's
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    state, complaints = newest_state(folder)
    for complaint in complaints:
        print(f"warning: {complaint}", flush=True)
    if state is None:
        print(f"starting fresh: no training state in {folder}", flush=True)
        return None
    before = dict(state.facts)
    steps_before = before.pop("steps")
    unreadable = differences(*({name: each.get(name) for name in FORM_OF_STATE} for each in (before, facts)))
    if unreadable:
        raise UserError(
            f"{state.folder} cannot be read by this run: {unreadable[0]}. "
            "Go on with what it was, or start anew with --resume never"
        )
    changes = differences(before, facts)
    if state.step < total_steps < steps_before:
        changes.append(f"steps was {steps_before}, is {total_steps}")
    if changes and not args.accept_changes:
        raise UserError(
            f"{state.folder} is of another run: {'; '.join(changes)}. "
            "Go on all the same with --accept_changes, or start anew with --resume never"
        )
    if state.step < total_steps:
        print(f"going on after step {state.step}, from {state.folder}", *changes, sep="; ", flush=True)
    if total_steps > steps_before:
        print(f"the run is longer than it was: {steps_before} -> {total_steps} steps", flush=True)
    return state


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each fact that is no longer what it was, in words."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name} was {short(before.get(name))}, is {short(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def short(value: Any) -> str:
    """Hashes cut to what tells them apart."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def random_state() -> dict[str, Any]:
    """Of every random generator of this process, of types that can be loaded without running code."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class StopSignal:
    """Which signal, if any, has asked for an end."""

    signum = 0

    def note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """SIGINT and SIGTERM are noted instead of ending the process in the middle of something."""
    stop = StopSignal()
    before = {signum: signal.signal(signum, stop.note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_by_signal(run: Run, signum: int, step: int, saved_step: int) -> NoReturn:
    """Says after which step the run has stopped, and after which one it goes on."""
    name = signal.Signals(signum).name
    run.print(f"stopped by {name} after step {step}; the same command goes on after step {saved_step}")
    raise Stopped(signum)
