"""One command-line parser and one way to fail, for every script.

tyro is the parser: it reads options and their help from a dataclass and its comments, takes --max_steps and
--max-steps alike, names the nearest flag for an unknown one, and starts in a tenth of a second.
"""

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

Args = TypeVar("Args")


class UserError(Exception):
    """Something the user can put right: the message says what is wrong, where, and what to do."""


class Stopped(Exception):
    """A signal has ended the work, tidily: what was done is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run(main: Callable[[Any], None], options: type, argv: list[str] | None = None, default: Any = None) -> None:
    """Reads the command line into the dataclass `options` (or a union of them: subcommands) and calls main with it.

    With subcommands, `default` is an instance of the one that is meant when none is named. A UserError ends the
    process with its one line and exit code 2, as a wrong flag does.
    """
    sys.stdout.reconfigure(errors="replace")  # a terminal that has no Chinese shows question marks
    args = None
    try:
        args = parse(options, sys.argv[1:] if argv is None else argv, default)
        main(args)
    except UserError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:  # PyTorch has no common class for memory of CPU and GPU
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        fail(f"out of memory{what_to_lower(args)}")
    except Stopped as stopped:
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output left, as in `... | head`: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def what_to_lower(options: Any) -> str:
    """Of a script's options, those that memory depends on, in words."""
    names = ("batch_size", "max_batch", "max_seq_len", "rope_scaling")
    found = [f"--{name}" for name in names if getattr(options, name, None) is not None]
    if hasattr(options, "accumulation_steps"):
        found[0] += " (and raise --accumulation_steps as much)"
    return f": lower {' or '.join(found)}" if found else ""


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(options: type[Args], argv: list[str], default: Any = None) -> Args:
    """argv -> options. `--config FILE.yaml` sets options; flags on the command line win over it."""
    argv = [flag for flag in argv if not flag.startswith("--local_rank")]  # DeepSpeed's launcher adds it
    argv = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if default is not None and argv and first_flag(argv) == 0 and not {"-h", "--help"} & set(argv):
        argv = [type(default).__name__.lower(), *argv]  # options, and no subcommand to which they could belong
    command, flags = argv[: first_flag(argv)], argv[first_flag(argv) :]
    if "--config" in flags:
        at = flags.index("--config")
        if at + 1 == len(flags):
            raise UserError("--config needs the path of a YAML file")
        flags = yaml_flags(flags[at + 1]) + flags[:at] + flags[at + 2 :]
    settings = {} if default is None else {"default": default}
    config = (tyro.conf.OmitSubcommandPrefixes,)
    return tyro.cli(options, args=command + flags, config=config, use_underscores=True, **settings)


def first_flag(argv: list[str]) -> int:
    """Index of the first word that starts with a dash; words before it name a subcommand."""
    return next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))


def yaml_flags(path: str) -> list[str]:
    """A YAML mapping of option names to values, as the flags one would have typed."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold one option a line, as in `max_steps: 100`")
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags
