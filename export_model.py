"""Hand a model on: in the layouts that other programs read, or back to a .pth.

    python export_model.py                                             # a transformers folder of the newest model
    python export_model.py --format llama                              # ... that needs no code of ours: vLLM, SGLang
    python export_model.py --format gguf --gguf_type q8_0              # for llama.cpp and Ollama
    python export_model.py --format llama2c --checkpoint out/full_sft_512.pth
    python export_model.py --format pth --checkpoint export/full_sft_512-llama --output out/full_sft_512.pth
    python export_model.py --push_to_hub NAME/minimind                 # also upload the folder

Before anything gets its name, it is read in a fresh process, and its logits are compared with the model's on fixed
prompts. What comes out, in export/: a folder (transformers, llama), or a folder with the one file and what goes with
it (gguf: an Ollama Modelfile). A mixture of experts becomes an ERNIE-4.5-MoE, which the same programs know.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.cli import UserError, run

if TYPE_CHECKING:
    from model.model import Transformer


@dataclass
class Args:
    """Write a model in the layout of another program, checked; or make a .pth of such a folder."""

    format: Literal["transformers", "llama", "gguf", "llama2c", "pth"] = "transformers"  # what to make
    checkpoint: str = ""  # a .pth, a transformers or a Llama folder; empty: the newest chat model in out_dir
    out_dir: str = "out"  # where to look for the newest checkpoint
    output: str = ""  # folder to make (for pth: the file); empty: export/NAME-FORMAT
    tokenizer: str = ""  # folder of the tokenizer; empty: the one that comes with the checkpoint
    lora: str = ""  # folder of an adapter (LoRA) to merge into the weights first
    gguf_type: Literal["f32", "f16", "q8_0"] = "f16"  # numbers of a gguf: 32, 16 or about 8.5 bits each
    push_to_hub: str = ""  # also upload the folder to this repository of huggingface.co, as in NAME/minimind
    result_dir: str = "ceval_result"  # results of eval_ceval.py, for the model card
    rope_scaling: float | None = None  # stretch the context by this factor, and let the export do so, too
    rope_theta: float | None = None  # base of the rotary wavelengths, for weights without a .json; none: 10000
    n_heads: int | None = None  # query heads, for weights without a .json beside them; none: 16


def main(args: Args) -> None:
    if args.push_to_hub:
        check_upload(args.format)
    source, model, tokenizer = load(args)
    suffix = f"-{args.gguf_type}" if args.format == "gguf" else ""
    output = Path(args.output or f"export/{name_of(args, source)}-{args.format}{suffix}")
    if args.format == "pth" and not args.output:
        raise UserError("name the file to make, as in --output out/full_sft_512.pth")
    if output.exists():
        raise UserError(f"{output} exists already: remove it, or name another with --output")
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[args.format](args, temporary, source, model, tokenizer)
        if args.format != "pth":
            os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{output}: done")
    if args.push_to_hub:
        push(output, args.push_to_hub)


def name_of(args: Args, source: Path) -> str:
    adapter = f"-{Path(args.lora).name}" if args.lora else ""
    return source.absolute().name.removesuffix(".pth") + adapter


def load(args: Args) -> tuple[Path, "Transformer", Any]:
    """The checkpoint's path, its model and its tokenizer."""
    from model.adapters import with_adapter
    from model.checkpoint import has_tokenizer, load_model, newest_checkpoint
    from model.export import foreign_type, from_llama
    from model.tokenizer import SHIPPED, load_tokenizer

    path = Path(args.checkpoint) if args.checkpoint else newest_checkpoint(args.out_dir, ("full_sft", "dpo"))
    overrides = dict(rope_scaling=args.rope_scaling, rope_theta=args.rope_theta, n_heads=args.n_heads)
    if path.is_dir() and foreign_type(path):
        model = from_llama(path, **overrides).eval()
        tokenizer = load_tokenizer(args.tokenizer or (path if has_tokenizer(path) else SHIPPED))
    else:
        model, tokenizer = load_model(path, "cpu", args.tokenizer or None, **overrides)
    if args.lora:
        model = with_adapter(model, args.lora).eval()
    print(f"{path}: {model.num_parameters():,} parameters", flush=True)
    return path, model, tokenizer


def write_folder(args: Args, folder: Path, source: Path, model: "Transformer", tokenizer: Any) -> None:
    from model.export import write_llama_folder, write_transformers_folder
    from model.export_check import check_export
    from model.model_card import model_card

    write = write_llama_folder if args.format == "llama" else write_transformers_folder
    write(folder, model, tokenizer)
    card = model_card(name_of(args, source), args.format, model, source, args.lora, Path(args.result_dir))
    (folder / "README.md").write_text(card, encoding="utf-8")
    told(check_export(args.format, folder, model, tokenizer))


def write_gguf_folder(args: Args, folder: Path, source: Path, model: "Transformer", tokenizer: Any) -> None:
    from model.export import context_of
    from model.export_check import check_export
    from model.gguf_file import modelfile, rounded, write_gguf

    folder.mkdir()
    name = name_of(args, source)
    file = folder / f"{name}-{args.gguf_type}.gguf"
    write_gguf(file, model, tokenizer, args.gguf_type, name)
    text = modelfile(file.name, tokenizer, context_of(model.config))
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    told(check_export("gguf", file, rounded(model, args.gguf_type).eval(), tokenizer))


def write_llama2c_folder(args: Args, folder: Path, source: Path, model: "Transformer", tokenizer: Any) -> None:
    from model.export import write_llama2c
    from model.export_check import check_export

    folder.mkdir()
    file = folder / f"{name_of(args, source)}.bin"
    write_llama2c(file, model)
    told(check_export("llama2c", file, model, tokenizer))


def write_pth(args: Args, _: Path, source: Path, model: "Transformer", tokenizer: Any) -> None:
    """A Llama folder is read by transformers' own Llama, too; code that lies in a folder of ours is never run."""
    from model.checkpoint import has_tokenizer, save_weights
    from model.export import foreign_type
    from model.export_check import check_export

    changed = args.lora or args.rope_scaling or args.rope_theta or args.n_heads
    if source.is_dir() and foreign_type(source) and has_tokenizer(source) and not changed:
        told(check_export("llama", source, model, tokenizer))
    save_weights(Path(args.output), model, tokenizer.name_or_path, stage=Path(args.output).stem)


def told(difference: float) -> None:
    print(f"read back in a fresh process: logits differ by {difference:.1e} at most", flush=True)


WRITERS: dict[str, Callable[..., None]] = {
    "transformers": write_folder,
    "llama": write_folder,
    "gguf": write_gguf_folder,
    "llama2c": write_llama2c_folder,
    "pth": write_pth,
}


def check_upload(kind: str) -> None:
    """Before any work is done."""
    from huggingface_hub import get_token

    if kind not in ("transformers", "llama"):
        raise UserError("--push_to_hub uploads transformers folders: choose --format transformers or llama")
    if get_token() is None:
        raise UserError("--push_to_hub needs a token: log in with `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str) -> None:
    """Raises UserError where the hub cannot be reached or refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder} is made, but not uploaded to {repository}: {reason}") from error
    print(f"uploaded to https://huggingface.co/{repository}")


if __name__ == "__main__":
    run(main, Args)
