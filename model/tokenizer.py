"""A tokenizer folder -> text to ids and back, with nothing a user types ever becoming a special token."""

import hashlib
import os
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from .cli import UserError

SHIPPED = Path(__file__).parent / "minimind_tokenizer"
FILES = ("tokenizer.json", "tokenizer.model")  # either of them holds the whole vocabulary


def load_tokenizer(folder: str | Path = SHIPPED) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder, or of a folder with nothing but a sentencepiece `tokenizer.model`.

    One without a bos token uses its eos token for both; one without a padding token pads with eos.

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
    return tokenizer


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
