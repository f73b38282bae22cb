"""A tokenizer folder -> text to ids and back, with nothing a user types ever becoming a special token."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from .cli import UserError

SHIPPED = Path(__file__).parent / "minimind_tokenizer"
FILES = ("tokenizer.json", "tokenizer.model")  # either of them holds the whole vocabulary


def load_tokenizer(folder: str | Path = SHIPPED) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder, or of a folder with nothing but a sentencepiece `tokenizer.model`.

    One without a bos token uses its eos token for both; one without a padding token pads with eos; one that puts a
    space before every text, as Mistral's, does so no longer.

    Raises:
        UserError: there is no tokenizer in that folder, or it has no end-of-sequence token.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in FILES):
        raise UserError(f"no tokenizer in {folder}: neither {' nor '.join(FILES)} is there")
    bare_sentencepiece = not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file()
    try:
        if bare_sentencepiece:
            tokenizer = LlamaTokenizer.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer in {folder}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-sequence token")
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    forget_prefix_space(tokenizer)
    return tokenizer


def forget_prefix_space(tokenizer: PreTrainedTokenizerBase) -> None:
    """A text's ids must not depend on whether it comes first, nor a decoded piece lose a space of its own.

    What precedes the vocabulary (normalizer, pre-tokenizer) adds the space, and the decoder takes one away.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: spec[name] for name in ("normalizer", "pre_tokenizer", "decoder")}
    changed = {name: without_prefix_space(part) for name, part in parts.items()}
    if changed == parts:
        return
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "post_processor": None}
    made = Tokenizer.from_str(json.dumps(spec | empty | changed))
    for name in changed:
        setattr(tokenizer.backend_tokenizer, name, getattr(made, name))
    # Where it is saved and loaded by transformers, its class makes these parts anew.
    tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = False


def without_prefix_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A part of a tokenizer.json; None where nothing is left of it."""
    if part is None or part["type"] == "Prepend" or (part["type"], part.get("content")) == ("Strip", " "):
        return None
    if part["type"] == "Sequence":
        (key,) = part.keys() - {"type"}  # normalizers, pretokenizers or decoders
        inner = (without_prefix_space(each) for each in part[key])
        return part | {key: [each for each in inner if each is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part.get("add_prefix_space") and part["type"] == "ByteLevel" and "use_regex" in part:
        return part | {"add_prefix_space": False}
    return part


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of plain texts; a typed `</s>` stays five characters, and no bos or eos is added."""
    if not texts:
        return []
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    ).input_ids


def tokenizer_hash(folder: str | Path) -> str:
    """sha256 of the file that holds the vocabulary: equal hashes give equal ids."""
    path = next(Path(folder) / name for name in FILES if (Path(folder) / name).is_file())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def forbid_parallel_tokenizers() -> None:
    """Called in worker processes: each has one core's share, and the threads of a forked parent are gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
