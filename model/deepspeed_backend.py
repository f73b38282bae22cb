"""The work of backends.py done by DeepSpeed, whose ZeRO spreads training over the processes (Rajbhandari et al. 2020).

Stage 1 gives each process a share of the optimizer's state, stage 2 also of the gradients, stage 3 also of the weights.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from .checkpoint import file_hash, write_tensors
from .deepspeed_config import read_config
from .distributed import Run, join_alone
from .model import Transformer
from .optim import build_optimizers
from .options import TrainingOptions

TAG = "deepspeed"  # the folder in a training state
STORED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class DeepSpeedBackend:
    """A DeepSpeed engine with the interface of TorchBackend. It takes over the parameters of the model."""

    def __init__(self, model: Transformer, args: TrainingOptions, run: Run, dtype: torch.dtype):
        self.raw_model, self.args, self.run = model, args, run
        config = run.from_main(lambda: read_config(args, run.world_size, dtype))
        self.stage = config["zero_optimization"]["stage"]
        join_alone(run)
        self.engine = self.start(config)
        self.model = self.engine
        if args.compile:
            self.engine.compile()

    def start(self, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # its calls have newer names
        # An operation for inference on CPUs, which takes a compiler and half a minute to build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        (optimizer,) = build_optimizers(self.raw_model, "adamw", self.args.learning_rate, self.args.weight_decay)
        try:
            engine, *_ = deepspeed.initialize(model=self.raw_model, optimizer=optimizer, config=config)
        except (ValueError, AssertionError) as error:  # a configuration that it does not like
            self.run.fail(f"DeepSpeed cannot work with --deepspeed {self.args.deepspeed}: {error}")
        engine.checkpoint_engine = Files()
        # A script beside the state that makes weights of it: ours lie there already. If writing it failed on one
        # process (a full disk), the others would wait for ever.
        engine._copy_recovery_script = lambda folder: None
        if hasattr(engine.optimizer, "loss_scaler"):  # its optimizer for gradients of float32 beside bfloat16 has none
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # the trainer ends runs that diverge
        return engine

    def before_forward(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        # Losses are sums divided by the global batch's targets, but DeepSpeed averages gradients over processes. Of a
        # loss that is not finite no gradient shall be, so that DeepSpeed leaves the update out, on all processes.
        factor = torch.where(loss.detach().isfinite(), float(self.run.world_size), float("nan"))
        self.engine.backward(loss * factor, scale_wrt_gas=False)

    def update(self, factor: float, finite: bool) -> tuple[float, bool]:
        """One step at `factor` times the peak learning rate; DeepSpeed skips it if the gradient is not finite.

        Returns:
            the gradient's norm before clipping, and whether all is well, as TorchBackend.update.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * factor
        may_overflow = getattr(self.engine.optimizer, "loss_scale", 1) > 1
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm, finite and (self.engine.was_step_applied() or may_overflow)

    @property
    def learning_rate(self) -> float:
        return self.engine.optimizer.param_groups[0]["lr"]

    def facts(self) -> dict[str, Any]:
        """What of this the final weights depend on; a state is in as many parts as there are processes."""
        settings = Path(self.args.deepspeed)
        return {
            "engine": f"zero{self.stage}",
            "processes": self.run.world_size,
            "optimizer": "adamw",
            "DeepSpeed settings": file_hash(settings) if settings.is_file() else "",
        }

    def weights(self) -> dict[str, Tensor]:
        """What is trained, in float32 and whole, on the main process; elsewhere nothing. Every process calls it."""
        weights = {}
        for name, parameter in self.raw_model.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
                if self.run.is_main:
                    weights[name] = whole.cpu()
        return weights

    def save(self, folder: Path) -> None:
        """Every process writes its share.

        Raises:
            OSError: the disk is full, say.
        """
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        self.engine.checkpoint_engine.raise_error()

    def load(self, folder: Path) -> None:
        decays = [group["weight_decay"] for group in self.engine.optimizer.param_groups]
        self.engine.load_checkpoint(str(folder), tag=TAG)
        for group, decay in zip(self.engine.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # a changed option, once accepted, counts


class Files(TorchCheckpointEngine):
    """How DeepSpeed writes and reads the files of a state."""

    def __init__(self):
        super().__init__()
        self.error: OSError | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            write_tensors(state_dict, Path(path))
        except OSError as error:  # raised here, it would leave the other processes waiting
            self.error = error

    def raise_error(self) -> None:
        error, self.error = self.error, None
        if error:
            raise error

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        with torch.serialization.safe_globals(STORED_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)
