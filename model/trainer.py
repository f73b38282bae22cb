"""The plumbing round a training step: batches, precision, accumulation, clipping, logging, saving.

Which loss is trained is the script's business: it takes a micro-batch from `batches`, calls the model, and hands the
output to `step`.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .attention import takes_varlen
from .backends import build_backend
from .batches import GlobalBatch, GlobalBatches, RowSource
from .checkpoint import save_weights
from .cli import Stopped
from .curves import draw_curve
from .dataset import Batch
from .distributed import Run
from .metrics import Group, MetricsFile, Window
from .model import LMOutput, Transformer
from .optim import learning_rate_factor
from .options import TrainingOptions
from .plan import plan_ahead
from .probe import peak_bytes
from .products import has_bfloat16
from .resume import end_by_signal, find_state, random_state, run_facts, set_random_state, stop_signals
from .training_state import (
    TrainingState,
    begin_state,
    finish_state,
    save_or_warn,
    states_folder,
    unfinished_state,
)

MOST_BAD_IN_A_ROW = 10


@dataclass
class Place:
    """How far a run has come."""

    epoch: int = 0
    groups: int = 0  # global batches done in this epoch
    step: int = 0  # updates done in all
    tokens: int = 0  # trained on in all, padding not counted
    bad_in_a_row: int = 0  # updates left out since the last that was not


class Trainer:
    """Takes a model through `data` as the options say, from where an earlier run with the same options was stopped.

    Args:
        tokenizer: copied beside the weights.
        weights: the `.pth` to write; metrics, curve, description and training states lie beside it.
        validate: gives figures of held-out data ("val_loss", ...); called on every process.
        save: what writes the weights; a stage that trains an adapter has its own.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: PreTrainedTokenizerBase,
        data: RowSource,
        args: TrainingOptions,
        run: Run,
        weights: Path,
        validate: Callable[[], dict[str, float]] | None = None,
        save: Callable[..., None] = save_weights,
    ):
        self.raw_model, self.data, self.args, self.run = model.train(), data, args, run
        self.weights, self.tokenizer, self.validate, self.save_weights = weights, tokenizer, validate, save
        self.dtype = pick_dtype(args.dtype, run.device)
        self.varlen = takes_varlen(model.config, run.device, self.dtype, data.max_seq_len, args.compile)
        plan_ahead(model, data, args, run, weights, self.dtype)  # settles args.batch_size, or ends here
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)  # ZeRO-3 hides them
        self.backend = build_backend(model, args, run, self.dtype)
        self.model = self.backend.model
        self.global_batches = GlobalBatches(data, args, run)
        self.total_steps = args.max_steps or args.epochs * len(self.global_batches)
        self.place, self.window = Place(), Window()
        self.metrics = MetricsFile(weights.with_suffix(".metrics.jsonl"))

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches, to the end of the run.

        Raises:
            Stopped: SIGINT or SIGTERM came; the step at work was finished and everything saved.
        """
        with stop_signals() as stop:
            if not self.begin():
                return
            while self.place.step < self.total_steps:
                for global_batch in self.global_batches.epoch(self.place.epoch, self.place.groups):
                    started = time.monotonic()
                    num_targets, num_tokens, stopped = self.count(global_batch, stop.signum)
                    if stopped:
                        self.stop(stop.signum or signal.SIGTERM)
                    self.group = Group()
                    for batch in global_batch.micro_batches:
                        self.last_of_group = batch is global_batch.micro_batches[-1]
                        self.backend.before_forward(self.last_of_group)
                        yield batch.to(self.run.device)._replace(num_targets=num_targets)
                    self.after_update(global_batch, num_tokens, time.monotonic() - started)
                    if self.place.step == self.total_steps:
                        break
                else:
                    self.place.epoch, self.place.groups = self.place.epoch + 1, 0
            self.finish()
            if stop.signum:  # it came in the last step
                raise Stopped(stop.signum)

    def count(self, global_batch: GlobalBatch, signum: int) -> tuple[int, int, bool]:
        """On all processes together: targets, tokens, and whether any of them is to stop."""
        counts = [[batch.num_targets, batch.num_tokens, signum] for batch in global_batch.micro_batches]
        num_targets, num_tokens, signums = self.run.sum(torch.tensor(counts).sum(0)).tolist()
        # A global batch without a single target still gives a number: 0 / 1.
        return max(1, num_targets), num_tokens, signums > 0

    def autocast(self) -> AbstractContextManager:
        """Matrix products in the chosen type, and what only they read; the rest in float32."""
        return torch.autocast(self.run.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, output: LMOutput) -> None:
        """One micro-batch's backward pass, and after the group's last one the update."""
        self.group.add(output)
        self.backend.backward(output.loss)
        if self.last_of_group:
            bad = torch.tensor(self.group.finite().count(False))
            finite = int(self.run.sum(bad)) == 0
            factor = learning_rate_factor(self.place.step, self.total_steps, self.args.warmup_steps, self.args.schedule)
            self.grad_norm, self.well = self.backend.update(factor, finite)

    def after_update(self, global_batch: GlobalBatch, num_tokens: int, seconds: float) -> None:
        place, args = self.place, self.args
        place.step, place.groups, place.tokens = place.step + 1, place.groups + 1, place.tokens + num_tokens
        place.bad_in_a_row = 0 if self.well else place.bad_in_a_row + 1
        self.window.add(self.group, self.well, num_tokens, seconds)
        if not self.well:
            self.report_bad_numbers(global_batch.rows)
        self.bar.update()
        last = place.step == self.total_steps
        if place.step % args.log_interval == 0 or place.step == 1 or last:
            self.log()
        if self.validate and (last or (args.val_interval and place.step % args.val_interval == 0)):
            self.log_validation()
        if last or (args.save_interval and place.step % args.save_interval == 0):
            self.save()

    def report_bad_numbers(self, rows: list[list[int]]) -> None:
        """Tells which data gave a loss or a gradient that is not finite; ten times in a row end the run."""
        finite = self.run.gather(all(self.group.finite()))
        reason = "the gradient is not finite" if all(finite) else "the loss is not finite"
        # Of a gradient nobody knows where it comes from, but a loss has its micro-batch.
        suspects = [part for part, well in zip(rows, self.group.finite(), strict=True) if all(finite) or not well]
        where = sum(self.run.gather([self.data.where(row) for part in suspects for row in part]), [])
        if self.run.is_main:
            self.metrics.write({"step": self.place.step, "skipped": reason, "where": where})
            tqdm.write(f"step {self.place.step}: {reason}, update skipped; data: {'; '.join(where)}")
        if self.place.bad_in_a_row == MOST_BAD_IN_A_ROW:
            self.run.fail(
                f"the run has diverged: {MOST_BAD_IN_A_ROW} updates in a row skipped, up to step {self.place.step}. "
                "Go on from the last state with a lower --learning_rate and --accept_changes, or look at the data"
            )

    def begin(self) -> bool:
        """Goes to where an earlier run was stopped; False if that is the end."""
        self.facts = self.run.from_main(self.own_facts)
        state = self.run.from_main(lambda: find_state(self.weights, self.facts, self.total_steps, self.args))
        if state is not None:
            self.restore(state)
        if self.place.step >= self.total_steps:
            self.run.print(
                f"{self.weights} is finished, {self.place.step} steps: a larger --max_steps or --epochs goes on"
            )
            return False
        if self.run.is_main:
            self.metrics.cut(self.place.step)
        self.started, self.saved_step = time.monotonic(), self.place.step
        processes = f"{self.run.world_size} process{'es' if self.run.world_size > 1 else ''}"
        self.run.print(
            f"{self.parameters:,} parameters on {self.run.device} ({str(self.dtype).removeprefix('torch.')}), "
            f"{len(self.data):,} rows of {self.data.max_seq_len} tokens, {self.total_steps} steps of "
            f"{self.global_batches.rows_each} rows, {processes}"
        )
        main = self.run.is_main
        self.bar = tqdm(
            total=self.total_steps, initial=self.place.step, unit="step", disable=not main, dynamic_ncols=True
        )
        return True

    def own_facts(self) -> dict[str, Any]:
        more = {"rows of a step": self.global_batches.rows_each, "dtype": str(self.dtype), **self.backend.facts()}
        return run_facts(self.args, self.raw_model.config, self.data.path, self.tokenizer, **more)

    def restore(self, state: TrainingState) -> None:
        self.backend.load(state.folder)
        self.place, self.window = Place(**state.content["place"]), Window(**state.content["window"])
        # Another global batch, if that change was accepted: as many rows of the epoch are done.
        self.place.groups = self.place.groups * state.facts["rows of a step"] // self.global_batches.rows_each
        if not self.run.is_main:  # its losses are sums over all processes
            self.window.loss = self.window.aux_loss = 0.0
        generators = state.content["random"]
        if self.run.rank < len(generators):  # there may be more processes than there were
            set_random_state(generators[self.run.rank])

    def log(self) -> None:
        self.window.sum(self.run)
        means, self.window = self.window.means(), Window()
        line = {
            "step": self.place.step,
            "epoch": round(self.place.epoch + self.place.groups / len(self.global_batches), 4),
            "tokens": self.place.tokens,
            "lr": self.backend.learning_rate,
            "grad_norm": self.grad_norm,
            **means,
        }
        if self.run.is_main:
            self.metrics.write(line)
        loss = math.nan if line["loss"] is None else line["loss"]
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {line['lr']:.2g}, {line['tokens_per_s']:,.0f} tokens/s")

    def log_validation(self) -> None:
        figures = self.validate()
        self.raw_model.train()
        if self.run.is_main:
            self.metrics.write({"step": self.place.step, "tokens": self.place.tokens, **figures})
            words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
            tqdm.write(f"step {self.place.step}: {words}")

    def save(self) -> None:
        """Weights, then the training state: a run whose state says that it is finished has its weights in place."""
        self.run.attempt(self.draw)  # for want of a picture nothing is lost
        self.window.sum(self.run)
        random = self.run.gather(random_state())
        content = dict(place=asdict(self.place), window=asdict(self.window), random=random)
        weights = self.backend.weights()  # on every process: they may be spread over all of them
        works = (
            partial(self.write_weights, weights),
            self.open_state,
            self.write_shard,
            partial(self.close_state, content),
        )
        last = self.place.step >= self.total_steps
        if save_or_warn(self.run, states_folder(self.weights), self.place.step, last, works):
            self.saved_step = self.place.step

    def draw(self) -> None:
        if self.run.is_main:
            draw_curve(self.metrics.path, self.weights.with_suffix(".png"))

    def write_weights(self, weights: dict[str, Tensor]) -> None:
        if self.run.is_main:
            facts = dict(stage=str(self.weights.relative_to(self.args.out_dir).with_suffix("")), **asdict(self.place))
            self.save_weights(self.weights, self.raw_model, self.tokenizer.name_or_path, weights, **facts)

    def open_state(self) -> None:
        if self.run.is_main:
            begin_state(states_folder(self.weights), self.place.step)

    def write_shard(self) -> None:
        self.backend.save(unfinished_state(states_folder(self.weights), self.place.step))

    def close_state(self, content: dict[str, Any]) -> None:
        if self.run.is_main:
            self.metrics.flush()
            finish_state(
                states_folder(self.weights), self.place.step, {"steps": self.total_steps, **self.facts}, content
            )

    def stop(self, signum: int) -> NoReturn:
        self.bar.close()
        if self.place.step > self.saved_step:
            self.save()
        end_by_signal(self.run, signum, self.place.step, self.saved_step)

    def finish(self) -> None:
        self.bar.close()
        minutes = (time.monotonic() - self.started) / 60
        self.run.print(
            f"saved {self.weights} after {self.place.step} steps, {self.place.tokens:,} tokens, "
            f"{minutes:.1f} min, peak memory {peak_memory(self.run.device):.2f} GB"
        )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU or a CPU that has it, float16 on an older GPU, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU where there is one, else of this process."""
    return peak_bytes(device) / 1e9
