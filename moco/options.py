"""Command line options that the scripts share, and the checks on what was typed."""

import argparse
import os
import random

from moco.failures import BadInput, one_line, speaks


class OptionParser(argparse.ArgumentParser):
    """argparse with defaults in the help, and errors of one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=lambda prog: _Help(
            prog, max_help_position=34, width=120))

    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: error: {message}") if speaks() else None)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default in ("", []):
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _format_args(self, action, default_metavar):
        if action.nargs == "+":                                       # "LR [LR ...]" twice takes a line of its own
            return f"{action.metavar or default_metavar}…"
        return super()._format_args(action, default_metavar)


def _number(kind, allowed, wanted):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value
    return parse


positive_int = _number(int, lambda v: 0 < v < 2**31, "a whole number of 1 or more, below 2**31")
natural_int = _number(int, lambda v: 0 <= v < 2**31, "a whole number of 0 or more, below 2**31")
seed_int = _number(int, lambda v: 0 <= v < 2**63, "a whole number from 0 to 2**63 - 1")
positive_float = _number(float, lambda v: 0 < v <= 1e38, "a number above 0 that fp32 can hold")
natural_float = _number(float, lambda v: 0 <= v <= 1e38, "a number of 0 or more that fp32 can hold")
fraction = _number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def positive_float_or_text(text):
    """For numbers that a path may follow: the script tells them apart."""
    try:
        return positive_float(text)
    except argparse.ArgumentTypeError:
        return text


def add_data_options(parser, workers=32, nargs=None):
    group = parser.add_argument_group("data")
    group.add_argument("data", metavar="DIR", nargs=nargs, help="data set with train/ (and val/), one folder a class")
    add_workers_option(group, workers)


def add_workers_option(group, workers=32):
    group.add_argument("-j", "--workers", default=workers, type=natural_int, metavar="N",
                       help="loading processes on this node, at most one a core")


def add_training_options(parser, *, epochs, batch_size, lr, schedule, weight_decay):
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", default=epochs, type=positive_int, metavar="N", help="epochs in all")
    group.add_argument("--start-epoch", default=0, type=natural_int, metavar="N", help="first epoch, for restarts by hand")
    group.add_argument("-b", "--batch-size", default=batch_size, type=positive_int, metavar="N",
                       help="images a step on this node, over all its GPUs")
    if isinstance(lr, list):
        group.add_argument("--lr", "--learning-rate", dest="lr", default=lr, nargs="+", type=positive_float_or_text,
                           metavar="LR", help="initial learning rate; of several, each trains a head")
    else:
        group.add_argument("--lr", "--learning-rate", dest="lr", default=lr, type=positive_float, metavar="LR",
                           help="initial learning rate")
    group.add_argument("--schedule", default=schedule, nargs="*", type=natural_int, metavar="EPOCH",
                       help="epochs at which the learning rate drops tenfold")
    group.add_argument("--momentum", default=0.9, type=fraction, metavar="M", help="momentum of SGD")
    group.add_argument("--wd", "--weight-decay", dest="weight_decay", default=weight_decay, type=natural_float,
                       metavar="W", help="weight decay")
    group.add_argument("--seed", default=None, type=seed_int, metavar="N", help="same seed, same run; default: drawn anew")
    return group


def add_precision_options(parser):
    group = parser.add_argument_group("speed")
    group.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), metavar="P",
                       help="what the encoders compute in: fp32, bf16, fp16")
    group.add_argument("--strict-fp32", action="store_true", help="fp32 without TF32 on NVIDIA GPUs")
    return group


def check_folder(option, path):
    """BadInput unless files can be written to the folder, which need not exist yet."""
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise BadInput(f"{option} {path}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"{option} {path}: {existing} cannot be written to; name a folder of your own")


def make_folder(option, path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{option} {path}: it cannot be made ({error}); name a folder of your own") from error


def check_file(option, path, endings=("",)):
    """BadInput unless a file of one of the endings can be written there."""
    if not path.lower().endswith(endings):
        raise BadInput(f"{option} {path}: end its name in {' or '.join(endings)}")
    if os.path.isdir(path):
        raise BadInput(f"{option} {path}: it is a folder; name a file")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise BadInput(f"{option} {path}: there is no folder {folder}")
    check_folder(option, folder)


def add_dry_run_option(group):
    group.add_argument("--dry-run", action="store_true", help="check everything, print what would be done, then exit")


def add_output_options(parser, ckpt_path):
    group = parser.add_argument_group("checkpoints and reports")
    group.add_argument("--ckpt_path", default=ckpt_path, metavar="CKPT", help="folder for checkpoints and log.jsonl")
    group.add_argument("--resume", default="", metavar="PATH|auto", help="go on from a checkpoint; auto: CKPT's last")
    group.add_argument("-p", "--print-freq", default=10, type=positive_int, metavar="N", help="steps between reports")
    group.add_argument("--max-bad-images", default=100, type=natural_int, metavar="N", help="unreadable images before a stop")
    add_dry_run_option(group)
    return group


def add_launch_options(parser):
    group = parser.add_argument_group("processes (none of these with torchrun)")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="one process a GPU of this node")
    group.add_argument("--world-size", default=-1, type=int, metavar="N", help="number of nodes")
    group.add_argument("--rank", default=-1, type=int, metavar="R", help="this node's number, from 0")
    group.add_argument("--dist-url", default="tcp://224.66.41.62:23456", metavar="URL",
                       help="where node 0 listens; one node finds a port itself")
    group.add_argument("--dist-backend", default="nccl", metavar="NAME", help="gloo is taken without a GPU")
    group.add_argument("--gpu", default=None, type=natural_int, metavar="N", help="the GPU of a single process")


def launch_settings(args):
    """The options of add_launch_options as launch.launch takes them."""
    return {"multiprocessing": args.multiprocessing_distributed, "world_size": args.world_size, "rank": args.rank,
            "dist_url": args.dist_url, "backend": args.dist_backend, "gpu": args.gpu}


def draw_seed():
    return random.SystemRandom().randrange(2**31)


def per_process(total, processes, name="--batch-size"):
    """total / processes, or BadInput with the nearest totals that divide."""
    if total % processes:
        below, above = total - total % processes, total - total % processes + processes
        nearest = f"{below} or {above}" if below else f"{above}"
        raise BadInput(f"{name} {total} does not divide among {processes} processes of this node; use {nearest}")
    return total // processes


def workers_per_process(total, processes):
    """Loading processes for each training process: their share of `total`, and never more than there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(-(-total // processes), max(1, cores // processes))


def echo(args, **derived):
    """Print every argument, then what follows from them."""
    width = max(map(len, [*vars(args), *derived]))
    for name, value in [*sorted(vars(args).items()), *derived.items()]:
        print(f"{name.replace('_', ' '):>{width}}  {value}", flush=True)
