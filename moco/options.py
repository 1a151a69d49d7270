"""Argument groups that the scripts share, checks of their values, and the printed configuration."""

import argparse
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Mapping

from moco.errors import UsageError, one_line, printable
from moco.processes.environment import is_local_main, is_main, usable_cores


class OptionParser(argparse.ArgumentParser):
    """argparse with defaults in the help and one-line errors. `args.defaults` holds the defaults of all options.

    A _ in an option's name is as good as a -. usage: with a first command to try, for want of arguments.
    """

    def __init__(self, description: str, usage: str | None = None):
        width = min(shutil.get_terminal_size().columns, 120)
        formatter = lambda prog: _HelpFormatter(prog, max_help_position=26, width=width)
        super().__init__(description=description, usage=usage, allow_abbrev=False, formatter_class=formatter)

    def parse_args(self, *args, recipes: Mapping[str, Mapping] = {}, **kwargs) -> argparse.Namespace:
        """recipes: {value of --recipe: the defaults that it stands for}; `args.defaults` stay the published ones."""
        namespace = super().parse_args(*args, **kwargs)
        defaults = {name: self.get_default(name) for name in vars(namespace) if name != "recipe"}
        if recipe := recipes.get(getattr(namespace, "recipe", None)):
            self.set_defaults(**recipe)
            namespace = super().parse_args(*args, **kwargs)
        namespace.defaults = defaults
        return namespace

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """Give options their published spelling, and refuse unknown ones before anything else."""
        words, known = list(sys.argv[1:] if args is None else args), self._option_string_actions
        if self.usage and not words and is_local_main():
            self.exit(2, f"{self.format_usage().strip()}\nall options: python {sys.argv[0]} --help\n")
        spelling = {name.replace("_", "-"): name for name in known}
        for place, word in enumerate(words[: words.index("--")] if "--" in words else words):
            name, equals, value = word.partition("=")
            if name not in known and re.match("--|-[^-.0-9]", name) and (name[:2] not in known or f"-{name}" in known):
                if name.replace("_", "-") not in spelling:
                    self.error(f"{name}: unknown; --help lists the options")
                words[place] = spelling[name.replace("_", "-")] + equals + value
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> None:
        self.exit(2, one_line(f"{self.prog}: error: {message}") if is_local_main() else None)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        none = action.default is False or action.default in (None, "", [])
        return action.help if none else super()._get_help_string(action)


# Types


def _number(kind: type, allowed: Callable, wanted: str) -> Callable:
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


positive_int = _number(int, lambda v: 0 < v < 2**31, "an integer of 1 or more, below 2**31")
nonnegative_int = _number(int, lambda v: 0 <= v < 2**31, "an integer of 0 or more, below 2**31")
seed_int = _number(int, lambda v: 0 <= v < 2**63, "an integer from 0 to 2**63 - 1")
positive_float = _number(float, lambda v: 0 < v <= 1e38, "a number above 0 that fp32 can hold")
nonnegative_float = _number(float, lambda v: 0 <= v <= 1e38, "a number of 0 or more that fp32 can hold")
unit_float = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def positive_float_or_text(text: str) -> float | str:
    """For numbers that a path may follow: the script tells them apart."""
    try:
        return positive_float(text)
    except argparse.ArgumentTypeError:
        return text


# The recipe of README's command: --recipe paper

PAPER = {
    "lr": 0.03, "batch_size": 128, "mlp": True, "moco_t": 0.2, "aug_plus": True, "cos": True, "epochs": 200,
    "robust": "patch", "num_nonsem": 1, "alpha": 2.0,
}  # fmt: skip
PATCHES, PAPER_PATCHES = (16, 56), (16, 72)  # px, at crops of 224 px: of the published defaults, of the recipe


def patch_sizes(recipe: str | None, size: int) -> tuple[int, int]:
    """The smallest and largest patch that are the same parts of a crop of `size` px as at 224."""
    low, high = PAPER_PATCHES if recipe else PATCHES
    return max(1, round(low * size / 224)), max(1, round(high * size / 224))


def queue_length(images: int) -> int:
    """The power of two next to an eighth of the images, at most 65536: 16384 for ImageNet-100."""
    return 2 ** min(16, max(0, round(math.log2(images / 8))))


# Groups of options
# fmt: off


def add_data_options(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("data", metavar="DIR", nargs=nargs, help="data set with train/ (and val/), one folder per class")
    add_workers_option(group)


def add_workers_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-j", "--workers", type=nonnegative_int, metavar="N",
                       help="data loader workers per node, at most one per core; default: cores less one per process")


def add_training_options(
    parser: argparse.ArgumentParser, *, epochs: int, batch_size: int, lr: float | list[float], schedule: list[int],
    weight_decay: float,
) -> argparse._ArgumentGroup:
    """The optimisation options with these defaults. A list as `lr` makes --lr take several values."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", default=epochs, type=positive_int, metavar="N", help="total number of epochs")
    group.add_argument("--start-epoch", default=0, type=nonnegative_int, metavar="N",
                       help="first epoch, for manual restarts")
    group.add_argument("-b", "--batch-size", default=batch_size, type=positive_int, metavar="N",
                       help="images per step on a node, over all its GPUs")
    several = isinstance(lr, list)
    group.add_argument("--lr", "--learning-rate", dest="lr", default=lr, metavar="LR", nargs="+" if several else None,
                       type=positive_float_or_text if several else positive_float,
                       help="initial learning rate" + several * "; with several, one head is trained for each")
    group.add_argument("--schedule", default=schedule, nargs="*", type=nonnegative_int, metavar="EPOCH",
                       help="epochs at which lr drops tenfold")
    group.add_argument("--momentum", default=0.9, type=unit_float, metavar="M", help="SGD momentum")
    group.add_argument("--wd", "--weight-decay", dest="weight_decay", default=weight_decay, type=nonnegative_float,
                       metavar="W", help="weight decay")
    group.add_argument("--seed", default=None, type=seed_int, metavar="N",
                       help="the same seed repeats a run; default: random")
    return group


def add_precision_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("speed")
    group.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), metavar="P",
                       help="of the encoders: fp32, bf16 or fp16")
    group.add_argument("--strict-fp32", action="store_true", help="fp32 without TF32 on NVIDIA GPUs")
    return group


def add_output_options(parser: argparse.ArgumentParser, ckpt_path: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("checkpoints and reports")
    group.add_argument("--ckpt_path", default=ckpt_path, metavar="CKPT", help="folder for checkpoints and log.jsonl")
    group.add_argument("--resume", default="", metavar="FILE|auto",
                       help="checkpoint to resume from; auto: the last in CKPT")
    group.add_argument("--save-steps", type=positive_int, metavar="N", help="also save every N steps of an epoch")
    group.add_argument("-p", "--print-freq", default=10, type=positive_int, metavar="N", help="steps between reports")
    group.add_argument("--max-bad-images", default=100, type=nonnegative_int, metavar="N",
                       help="stop at more unreadable images")
    add_dry_run_option(group)
    return group


def add_dry_run_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dry-run", action="store_true", help="check everything, print the settings, then exit")


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distributed launch (not needed with torchrun or srun)")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="one process per GPU of this node")
    group.add_argument("--world-size", default=-1, type=int, metavar="N", help="number of nodes")
    group.add_argument("--rank", default=-1, type=int, metavar="R", help="this node's number, from 0")
    group.add_argument("--dist-url", default="tcp://224.66.41.62:23456", metavar="URL",
                       help="address of node 0; a single node needs none")
    group.add_argument("--dist-backend", default="nccl", choices=("nccl", "gloo"), metavar="NAME",
                       help="nccl or gloo; without a GPU always gloo")
    group.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # torch.distributed.launch
    group.add_argument("--gpu", default=None, type=nonnegative_int, metavar="N", help="the GPU of a single process")


# fmt: on


SHARED = (  # options of all trainings that their processes must have in common
    "arch", "epochs", "start_epoch", "lr", "schedule", "momentum", "weight_decay", "seed", "precision", "strict_fp32",
    "save_steps", "max_bad_images",
)  # fmt: skip


def shared_options(args: argparse.Namespace, more: Iterable[str]) -> dict[str, object]:
    """{"--name": value} of the options that must be equal on all ranks: the common ones and `more`."""
    return {f"--{name.replace('_', '-')}": getattr(args, name) for name in dict.fromkeys([*SHARED, *more])}


# Checks


def check_folder(option: str, path: str) -> None:
    """Raise UsageError unless files can be written to the folder, which need not exist yet."""
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise UsageError(f"{option} {path}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: {existing} cannot be written to; choose a folder that can")


def check_file(option: str, path: str, endings: tuple[str, ...] = ("",)) -> None:
    """Raise UsageError unless a file with one of the endings can be written there."""
    if not path.lower().endswith(endings):
        raise UsageError(f"{option} {path}: its name must end in {' or '.join(endings)}")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{option} {path}: it is a folder or a device; name a file")
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):  # a long name, a loop of links
            raise UsageError(f"{option} {path}: {error.strerror}; choose another name") from error
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"{option} {path}: there is no folder {folder}")
    check_folder(option, folder)


def per_rank(total: int, ranks: int, name: str = "--batch-size") -> int:
    """total / ranks. Raises UsageError with the nearest totals that can be divided."""
    if total % ranks:
        below, above = total - total % ranks, total - total % ranks + ranks
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UsageError(f"{name} {total} cannot be divided among the {ranks} processes of this node; use {nearest}")
    return total // ranks


def workers_per_rank(total: int | None, ranks: int) -> int:
    """Each rank's share of `total` data loader workers, as far as cores and open files allow; None: cores less one."""
    cores = usable_cores()
    of_a_task = os.environ.get("SLURM_CPUS_PER_TASK", "")  # srun's tasks see their own cores only
    own = cores if of_a_task.isdecimal() and cores <= int(of_a_task) else max(1, cores // ranks)
    wanted = max(1, own - 1) if total is None else min(-(-total // ranks), own)
    files = os.sysconf("SC_OPEN_MAX")  # of which each worker needs some for its pipes and batches; -1: no limit
    return wanted if files < 0 else max(0, min(wanted, (files - 24) // 8))


# Configuration


def print_config(args: argparse.Namespace, derived: Mapping) -> None:
    """Print, once for all processes of a run, the settings that differ from the defaults, then the derived values."""
    if not is_main(args):
        return
    given = {name: value for name, value in sorted(vars(args).items()) if value != args.defaults.get(name, value)}
    done = {"dry_run": "nothing was started"} if args.dry_run else {}
    lines = [*(given | done).items(), *derived.items()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name.replace('_', ' '):>{width}}  {printable(text)}", flush=True)
