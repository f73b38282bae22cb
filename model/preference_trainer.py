"""trl's DPO trainer with what trainer.py promises: weights, metrics and training states of its kind, exact resuming.

trl and transformers do the batches, the loss, the gradients, the optimizer and the processes; here is which files are
written, when, and what is read from them.
"""

import math
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainerControl
from trl import DPOConfig, DPOTrainer

from .adapters import base_hash, merge, save_adapter
from .backends import load_trained_state, trained_state
from .checkpoint import save_weights, write_tensors
from .cli import Stopped
from .curves import draw_preference_curves
from .distributed import Run
from .metrics import MetricsFile
from .model import Transformer
from .optim import ADAM_BETAS
from .preferences import PairCollator, PreferenceData
from .resume import end_by_signal, find_state, random_state, run_facts, set_random_state, stop_signals
from .trainer import MOST_BAD_IN_A_ROW, peak_memory, pick_dtype
from .training_state import begin_state, finish_state, save_or_warn, states_folder

warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)  # trl's name for it
NAMES = {  # of trl's figures, in our metrics
    "learning_rate": "lr",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
}


class PreferenceTrainer(DPOTrainer):
    """Takes a model through pairs of answers, from where an earlier run with the same options was stopped.

    Args:
        args: the options of 5-dpo_train.py.
        reference: what the model was, if it is to be asked at each step; None with an adapter, which can be taken off,
            and where its answers are computed beforehand.
        weights: the `.pth` to write; metrics, curve, description and training states lie beside it.
        adapter: train one of these, instead of the whole model.
        validate: gives figures of held-out pairs; called on every process.
    """

    def __init__(
        self,
        model: Transformer,
        reference: Transformer | None,
        tokenizer: PreTrainedTokenizerBase,
        data: PreferenceData,
        args: Any,
        run: Run,
        weights: Path,
        adapter: LoraConfig | None = None,
        validate: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        self.options, self.run, self.weights, self.tokenizer, self.validate = args, run, weights, tokenizer, validate
        self.metrics = MetricsFile(weights.with_suffix(".metrics.jsonl"))
        self.rows_each = args.batch_size * args.accumulation_steps * run.world_size
        batches = math.ceil(len(data.pairs) / (args.batch_size * run.world_size))
        self.total_steps = args.max_steps or args.epochs * math.ceil(batches / args.accumulation_steps)
        dtype = pick_dtype(args.dtype, run.device)
        more = {"rows of a step": self.rows_each, "dtype": str(dtype), "engine": "trl"}
        self.facts = run.from_main(lambda: run_facts(args, model.config, data.path, tokenizer, **more))
        self.base_sha256 = base_hash(model) if adapter else ""
        self.bad_in_a_row, self.tokens, self.since, self.random, self.signum = 0, 0, 0.0, [], 0
        os.environ.setdefault("DS_ACCELERATOR", run.device.type)  # else accelerate has DeepSpeed guess aloud
        super().__init__(
            model=model.train(),
            ref_model=reference,
            args=trl_options(args, run, dtype, self.total_steps, weights.parent),
            data_collator=PairCollator(pad_token_id=tokenizer.pad_token_id),
            train_dataset=Dataset.from_list(data.pairs),
            processing_class=tokenizer,
            callbacks=[BetweenSteps(self)],
            peft_config=adapter,
        )
        self.remove_callback(PrinterCallback)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # its ids are ready

    def _send_telemetry(self) -> None:
        """trl would tell its makers that it is used."""

    def go(self) -> None:
        """Trains to the end.

        Raises:
            Stopped: SIGINT or SIGTERM came; the step at work was finished and everything saved.
        """
        state = self.run.from_main(lambda: find_state(self.weights, self.facts, self.total_steps, self.options))
        first = self.saved_step = state.step if state else 0
        if first >= self.total_steps:
            self.run.print(f"{self.weights} is finished, {first} steps: a larger --max_steps or --epochs goes on")
            return
        if self.run.is_main:
            self.metrics.cut(first)
        if self.validate and not state:
            self.log_validation()
        self.random = state.content["random"] if state else []
        trained, processes = sum(p.numel() for p in self.model.parameters() if p.requires_grad), self.run.world_size
        self.run.print(
            f"{trained:,} trained parameters on {self.run.device}, {len(self.train_dataset):,} pairs, "
            f"{self.total_steps} steps of {self.rows_each} pairs, {processes} process{'es' if processes > 1 else ''}"
        )
        started = self.since = time.monotonic()
        self.bar = tqdm(
            total=self.total_steps, initial=first, unit="step", disable=not self.run.is_main, dynamic_ncols=True
        )
        with stop_signals() as self.stop_signal, self.bar:
            self.train(resume_from_checkpoint=str(state.folder) if state else None)
        if isinstance(self.model_wrapped, DistributedDataParallel):
            self.run.wrapped.append(self.model_wrapped)
        if self.state.global_step < self.total_steps:
            end_by_signal(self.run, self.signum, self.state.global_step, self.saved_step)
        self.run.print(
            f"saved {self.weights} after {self.total_steps} steps, {(time.monotonic() - started) / 60:.1f} min, "
            f"peak memory {peak_memory(self.run.device):.2f} GB"
        )
        if self.signum:  # it came in the last step
            raise Stopped(self.signum)

    def after_step(self, control: TrainerControl) -> None:
        step, options = self.state.global_step, self.options
        last = step >= self.total_steps
        if self.validate and (last or (options.val_interval and step % options.val_interval == 0)):
            self.log_validation()
        due = bool(options.save_interval) and step % options.save_interval == 0
        stopped = self.stopped()
        control.should_log |= last or step == 1
        control.should_save = last or due or stopped
        control.should_training_stop |= last or stopped
        self.bar.update()

    def after_save(self, control: TrainerControl) -> None:
        """A signal that came meanwhile ends the run here, before a step that would have to be saved, too."""
        control.should_training_stop |= self.stopped() and self.saved_step == self.state.global_step

    def stopped(self) -> bool:
        """Whether a signal has come to any process: all of them must end in the same step."""
        self.signum = max(self.run.gather(self.stop_signal.signum))
        return self.signum > 0

    def log_validation(self) -> None:
        started = time.monotonic()
        found = self.validate(self.model)
        if self.run.is_main:
            self.metrics.write({"step": self.state.global_step, **found})
            words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
            tqdm.write(f"step {self.state.global_step}: {words}")
        self.since += time.monotonic() - started  # tokens/s are of training alone

    def note(self, logs: dict[str, float]) -> None:
        """What trl tells of the steps since it told last."""
        if "loss" not in logs:  # a summary at the end
            return
        now, tokens = time.monotonic(), logs.get("num_tokens", 0)
        line = {"step": self.state.global_step, "epoch": round(self.state.epoch, 4), "loss": logs["loss"]}
        line |= {"grad_norm": logs["grad_norm"]} | {name: logs[key] for key, name in NAMES.items()}
        line["tokens_per_s"] = round((tokens - self.tokens) / (now - self.since), 1)
        self.tokens, self.since = tokens, now
        if self.run.is_main:
            self.metrics.write(line)
        words = f"loss {line['loss']:.3f}, accuracy {line['accuracy']:.2f}, margin {line['margin']:.3f}"
        self.bar.set_postfix_str(f"{words}, lr {line['lr']:.2g}")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Ends the run before an update that is not finite; float16's scaler may pass over some to find its scale."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
        if self.bad_in_a_row > (MOST_BAD_IN_A_ROW if self.accelerator.scaler else 0):
            self.run.fail(
                f"the run has diverged: the gradient of step {self.state.global_step + 1} is not finite. "
                "Go on from the last state with a lower --learning_rate and --accept_changes, or look at the data"
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """In place of transformers': weights, then a training state of ours."""
        started, step = time.monotonic(), self.state.global_step
        self.run.attempt(self.draw)  # for want of a picture nothing is lost
        content = {"random": self.run.gather(random_state())}
        works = (self.write_weights, partial(self.write_state, content))
        if save_or_warn(self.run, states_folder(self.weights), step, step >= self.total_steps, works):
            self.saved_step = step
        self.since += time.monotonic() - started

    def draw(self) -> None:
        if self.run.is_main:
            draw_preference_curves(self.metrics.path, self.weights.with_suffix(".png"))

    def write_state(self, content: dict[str, Any]) -> None:
        """All processes have the same: one writes."""
        if not self.run.is_main:
            return
        self.metrics.flush()
        folder = begin_state(states_folder(self.weights), self.state.global_step)
        scaler = self.accelerator.scaler
        tensors = {
            "model": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
        }
        write_tensors(tensors, folder / "model.pt")
        self.state.save_to_json(str(folder / "trainer_state.json"))
        facts = {"steps": self.total_steps, **self.facts}
        finish_state(states_folder(self.weights), self.state.global_step, facts, content)

    def write_weights(self) -> None:
        """The model; with an adapter that one, and at the end also the model with it in its weights."""
        if not self.run.is_main:
            return
        state = self.state
        facts = dict(stage=self.weights.stem, step=state.global_step, beta=self.beta, loss_type=self.options.loss_type)
        if not self.base_sha256:
            save_weights(self.weights, self.model, self.tokenizer.name_or_path, **facts)
            return
        folder = self.weights.parent / "lora" / self.weights.stem
        tensors = trained_state(self.model)
        save_adapter(folder, self.model, self.tokenizer.name_or_path, tensors, self.base_sha256, **facts)
        if state.global_step >= self.total_steps:
            merge(self.options.init_from, folder, self.weights, tokenizer=self.options.tokenizer, **facts)

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        load_trained_state(self.model, read_state(folder)["model"])

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is not None:
            content = read_state(folder)
            self.optimizer.load_state_dict(content["optimizer"])
            self.lr_scheduler.load_state_dict(content["scheduler"])

    def _load_scaler(self, folder: str | None) -> None:
        if folder is not None and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(read_state(folder)["scaler"])

    def _load_rng_state(self, folder: str | None) -> None:
        if self.run.rank < len(self.random):  # there may be more processes than there were
            set_random_state(self.random[self.run.rank])


class BetweenSteps(TrainerCallback):
    """Hands transformers' events on to the trainer."""

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> TrainerControl:
        self.trainer.after_step(control)
        return control

    def on_save(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> TrainerControl:
        self.trainer.after_save(control)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.trainer.note(logs or {})


def read_state(folder: str) -> dict[str, Any]:
    return torch.load(Path(folder) / "model.pt", map_location="cpu", weights_only=True)


def trl_options(args: Any, run: Run, dtype: torch.dtype, total_steps: int, folder: Path) -> DPOConfig:
    options = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation_steps,
        max_steps=total_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        adam_beta1=ADAM_BETAS[0],
        adam_beta2=ADAM_BETAS[1],
        max_grad_norm=args.grad_clip,
        beta=args.beta,
        loss_type=list(args.loss_type),
        precompute_ref_log_probs=args.precompute_reference,
        max_length=None,  # the ids are short enough already
        seed=args.seed,
        use_cpu=run.device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=args.num_workers,
        dataloader_pin_memory=run.device.type == "cuda",
        logging_steps=args.log_interval,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the trainer says when
        disable_tqdm=True,  # it has a bar of its own
        report_to="none",
    )
    options._n_gpu = 1  # of several GPUs one is this process's: without a launcher transformers would take all
    return options
