"""What turns losses into updates: gradients, their exchange, clipping, and the optimizers' steps."""

import math
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import write_tensors
from .cli import UserError
from .distributed import Run
from .model import Transformer
from .optim import build_optimizers
from .options import TrainingOptions

if TYPE_CHECKING:
    from .deepspeed_backend import DeepSpeedBackend


def build_backend(
    model: Transformer, args: TrainingOptions, run: Run, dtype: torch.dtype
) -> "TorchBackend | DeepSpeedBackend":
    """The one that --deepspeed asks for."""
    if not args.deepspeed:
        return TorchBackend(model, args, run, dtype)
    os.environ["DS_ACCELERATOR"] = run.device.type  # read once, when DeepSpeed is imported
    try:
        from .deepspeed_backend import DeepSpeedBackend
    except ImportError as error:
        run.fail(f"--deepspeed needs DeepSpeed, for Linux: pip install deepspeed ({error})")
    return DeepSpeedBackend(model, args, run, dtype)


class TorchBackend:
    """PyTorch's own: one process, or several with DDP, each with the whole model and the same updates."""

    def __init__(self, model: Transformer, args: TrainingOptions, run: Run, dtype: torch.dtype):
        self.raw_model, self.run, self.args = model, run, args
        if args.compile:  # how many tokens visit an expert stays a number inside the graph, instead of breaking it
            torch._dynamo.config.capture_scalar_outputs = True
        self.model = run.wrap(torch.compile(model) if args.compile else model)
        self.optimizer = "muon" if args.optimizer == "auto" else args.optimizer
        self.optimizers = build_optimizers(model, self.optimizer, args.learning_rate, args.weight_decay)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=dtype == torch.float16)

    def before_forward(self, last: bool) -> None:
        self.run.synchronize_gradients(self.model, last)

    def backward(self, loss: Tensor) -> None:
        # Losses are sums divided by the global batch's targets, but DDP averages gradients over processes.
        self.scaler.scale(loss * self.run.world_size).backward()

    def update(self, factor: float, finite: bool) -> tuple[float, bool]:
        """One step of every optimizer, at `factor` times the peak learning rate, unless a number is not finite.

        Args:
            finite: whether the losses are, on every process.

        Returns:
            the gradient's norm before clipping, and whether all is well (so it is, too, where float16's scaler merely
            had chosen too large a scale: it skips such a step and lowers it).
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = self.args.learning_rate * factor * group["lr_scale"]
        most = self.args.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), most))
        well = finite and (math.isfinite(norm) or self.scaler.get_scale() > 1)
        for optimizer in self.optimizers:
            if finite and math.isfinite(norm):
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm, well

    @property
    def learning_rate(self) -> float:
        return self.optimizers[0].param_groups[0]["lr"]

    def facts(self) -> dict[str, Any]:
        """What of this the final weights depend on."""
        return {"engine": "torch", "optimizer": self.optimizer}

    def weights(self) -> dict[str, Tensor]:
        return trained_state(self.raw_model)

    def save(self, folder: Path) -> None:
        """Every process calls it; as all of them hold the same, one writes."""
        if self.run.is_main:
            content = {
                "model": trained_state(self.raw_model),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
            }
            write_tensors(content, folder / "model.pt")

    def load(self, folder: Path) -> None:
        """Raises UserError where what was saved is of another model or other optimizers."""
        read = partial(torch.load, folder / "model.pt", map_location="cpu", weights_only=True)
        content = self.run.from_main(read)
        try:
            load_trained_state(self.raw_model, content["model"])
            for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
                decays = [group["weight_decay"] for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, decay in zip(optimizer.param_groups, decays, strict=True):
                    group["weight_decay"] = decay  # a changed option, once accepted, counts
            self.scaler.load_state_dict(content["scaler"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{folder} does not fit this model and optimizer: start anew with --resume never"
            ) from error


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors without frozen ones: all of them, or of a model with an adapter the adapter's."""
    frozen = frozen_names(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raises RuntimeError where `state` is not exactly what trained_state gives of such a model."""
    frozen = frozen_names(model)
    model.load_state_dict({name: value for name, value in model.state_dict().items() if name in frozen} | state)


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
