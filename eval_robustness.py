"""Test linear checkpoints on the robustness sets: one table row per checkpoint, or mean±std of several runs per NAME.

    python eval_robustness.py --pretrained ckpts/RUN/model_best_0199.pth.tar --val imagenet-100 \\
      --corruption imagenet-c --sketch imagenet-sketch --stylized stylized-imagenet --rendition imagenet-r \\
      --set imagenet-a=imagenet-a
    python eval_robustness.py --pretrained patch-k16384-a2=RUN1.pth.tar,RUN2.pth.tar,RUN3.pth.tar --compare paper …
    torchrun --nproc-per-node=8 eval_robustness.py …
"""

import argparse
import itertools
import os
import re
import signal
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

if __name__ in ("__main__", "__mp_main__") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends silently; cli_main restores it

import torch.nn as nn
from tqdm import tqdm

from moco import options
from moco.errors import UsageError, printable
from moco.evaluation import classifier, paper, released, report, results, scores, testsets
from moco.evaluation.testsets import TestSet
from moco.processes import launch
from moco.processes.exits import cli_main


class Inputs(NamedTuple):
    """The models and test sets, and the report that gets their results."""

    models: list[nn.Module]
    wnids: list[str]  # the class of each output
    image_size: int
    test_sets: list[TestSet]
    result: dict
    lock: object  # on --json: held while an input of a process


def parse_args() -> argparse.Namespace:
    use = "%(prog)s [options]\nto begin: python %(prog)s --pretrained ckpts/RUN --val DIR"
    parser = options.OptionParser("Test linear checkpoints on ImageNet-C, -Sketch, -R and other sets.", use)
    # fmt: off
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained", nargs="+", action="extend", default=[], metavar="ROW",
                       help="[NAME=]RUN[,RUN…]: runs' folders or linear checkpoints, a row each, means of several RUNs")
    model.add_argument("--classes", metavar="FILE",
                       help="class list, one wnid per line, for heads that store none; see docs/evaluation.md")
    model.add_argument("--list-released", action="store_true", help="print the released checkpoints, then exit")
    data = parser.add_argument_group("test sets, any of them")
    for name, suite in testsets.SUITES.items():
        data.add_argument(f"--{name}", metavar="DIR", dest=name, help=suite.layout)
    data.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=DIR", dest="sets",
                      help="further sets, <wnid>/* or val/<wnid>/*, in a column NAME; shape bias of cue conflicts")
    data.add_argument("--limit", type=options.positive_int, metavar="N", help="only the first N images per class")
    options.add_workers_option(data)
    data.add_argument("-b", "--batch-size", default=256, type=options.positive_int, metavar="N",
                      help="images per batch")
    data.add_argument("--gpu", type=options.nonnegative_int, metavar="N", help="the GPU of a single process")
    options.add_precision_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", default="robustness.json", metavar="FILE",
                        help="results of all models and test sets; what is in it is not repeated")
    output.add_argument("--compare", choices=["paper"], help="compare with the published rows of the same NAME")
    output.add_argument("--by-class", action="store_true", help="also print accuracy by class, against the first row")
    output.add_argument("--latex", action="store_true", help="also print the table for LaTeX (booktabs)")
    options.add_dry_run_option(output)
    output.add_argument("--allow-partial", action="store_true", help="exit with 0 even if corruptions are missing")
    # fmt: on
    return parser.parse_args()


# ---------------------------------------------------------------- checks, before anything is evaluated


def validate_args(args: argparse.Namespace, rows: Collection[str]) -> None:
    """Refuse options that could only fail later."""
    if not args.pretrained:
        raise UsageError("nothing to test: --pretrained names the linear checkpoints")
    if not args.sets and not any(vars(args)[suite] for suite in testsets.SUITES):
        suites = " ".join(f"--{suite} DIR" for suite in testsets.SUITES)
        raise UsageError(f"nothing to test on: use any of {suites} --set NAME=DIR")
    if args.by_class and len(rows) < 2:
        raise UsageError("--by-class: it compares rows with the first; name two or more, as --pretrained A=FILE B=FILE")
    options.check_file("--json", args.json)
    local_world_size, _ = launch.resolve_world_size(args)
    launch.check_devices(launch.devices_of(local_world_size, args.gpu), args.precision)


def parse_rows(entries: Iterable[str]) -> dict[str, list[str]]:
    """{name: files} of [NAME=]RUN[,RUN…] entries: files, or folders that hold one linear checkpoint."""
    rows = {}
    for entry in entries:
        name, separator, files = entry.partition("=")
        if not separator or os.path.exists(entry):  # a path may hold a "=", too
            name = files = entry
        if name in rows:
            raise UsageError(f"--pretrained {entry}: the name {name} is taken by another row")
        paths = [files] if os.path.exists(files) else files.split(",")  # a path may hold a comma, too
        rows[name] = [released.local_path(path, linear=True) for path in paths]
    return rows


def parse_sets(entries: Iterable[str]) -> dict[str, str]:
    """{name: directory} of NAME=DIR entries."""
    sets: dict[str, str] = {}
    for entry in entries:
        name, _, directory = entry.partition("=")
        if not directory or os.path.isdir(entry):
            name = re.sub(r"[^\w.+-]", "-", os.path.basename(os.path.normpath(entry))) or "NAME"
            raise UsageError(f"--set {entry}: a set needs a name and a folder, as in --set {name}={entry}")
        titles = [suite.title for suite in testsets.SUITES.values()]
        taken = [*sets, *testsets.SUITES, *titles, *report.CUES, *report.SETTINGS]
        if name.casefold() in map(str.casefold, taken):
            raise UsageError(f"--set {name}=…: there is a column of this name already; use another")
        if not re.fullmatch(r"\w[\w .+-]{0,39}", name):
            raise UsageError(f"--set {name}=…: a name is up to 40 letters, digits, spaces and . + - _")
        sets[name] = directory
    return sets


def load_models(
    rows: Mapping[str, Sequence[str]], args: argparse.Namespace
) -> tuple[list, list[dict], list[str], int, str]:
    """The models, what made each, and the class list and crop size that they share, with the list's source."""
    models, made, shared, origin = [], [], None, ""
    for path in itertools.chain(*rows.values()):
        model, saved = classifier.load_classifier(path)
        wnids, found = testsets.head_classes(path, saved, model.fc.out_features, args.classes, args.val)
        own = wnids, saved.get("image_size", 224)
        if shared not in (None, own):
            raise UsageError(
                f"--pretrained {path}: its classes or crop size are not the others'; test it in a second run"
            )
        shared = own
        models.append(model)
        made.append(classifier.made_with(saved, f"--pretrained {path}"))
        origin = origin or found
    return models, made, *shared, origin


# ---------------------------------------------------------------- evaluation


def evaluate(ctx: launch.DistContext, args: argparse.Namespace, inputs: Inputs) -> None:
    """Score the test sets that the result lacks; rank 0 saves it after each. All ranks must call this."""
    result, test_sets = inputs.result, inputs.test_sets
    main_rank = ctx.rank == 0
    models, dtype = classifier.prepare(inputs.models, ctx.device, args.precision, args.strict_fp32)
    workers = options.workers_per_rank(args.workers, ctx.local_world_size)
    chosen = {test_set.key: results.unfinished(result, test_set) for test_set in test_sets}
    todo = [test_set for test_set in test_sets if chosen[test_set.key]]
    if main_rank and (done := len(test_sets) - len(todo)):
        print(f"{done} of {len(test_sets)} test sets are already in {args.json}; evaluating the rest", file=sys.stderr)
    images = sum(len(test_set.labels) for test_set in todo)
    interval = 0.1 if sys.stderr.isatty() else 30  # in a log every update is a line
    with tqdm(total=images, unit="image", disable=not main_rank, mininterval=interval) as bar:
        for test_set, scored in scores.score(
            todo, models, inputs.wnids, inputs.image_size, args.batch_size, workers, ctx, bar.update, chosen, dtype
        ):
            bar.set_description(test_set.key, refresh=False)
            results.add(result, test_set, scored)
            if main_rank:
                results.save(args.json, result)
    if main_rank:
        # In the order of the suites, also after a resumed evaluation.
        result["cells"] = {test_set.key: result["cells"][test_set.key] for test_set in test_sets}
        result["table"] = report.by_row(result)
        found = report.differences(result)
        result["differences"] = {row: {d.name: [d.change, d.error] for d in found[row]} for row in found}
        results.save(args.json, result)
        print_report(args, result)


def print_report(args: argparse.Namespace, result: Mapping) -> None:
    print(report.table(result))
    print(*map(printable, [*report.difference_lines(result), *report.notes(result)]), sep="\n")
    if args.compare:
        print(paper.comparison(result))
    if args.by_class:
        print(report.by_class_table(result))
    if args.latex:
        print(report.latex(result))
    print(f"wrote {args.json}", flush=True)


def main() -> None:
    args = parse_args()
    if args.list_released:
        listing = [f"{released.SCHEME}{name:28}  {link}" for name, link in released.links().items()]
        return print(*listing, sep="\n") if launch.is_main(args) else None
    rows, sets = parse_rows(args.pretrained), parse_sets(args.sets)
    validate_args(args, rows)
    models, made, wnids, image_size, origin = load_models(rows, args)
    # Listing all test sets first finds a wrong folder before hours of evaluation, and tells the bar its length.
    directories = {suite: vars(args)[suite] for suite in testsets.SUITES if vars(args)[suite]}
    directories |= {f"{testsets.FURTHER}/{name}": directory for name, directory in sets.items()}
    test_sets = testsets.list_test_sets(directories, wnids, args.limit)
    result = results.new(rows, made, wnids, image_size, args.limit, args.precision) | {"classes_from": origin}
    if args.compare:
        paper.check_recipes(result["checkpoints"])
    inputs = Inputs(models, wnids, image_size, test_sets, result, results.lock("--json", args.json))
    if launch.is_main(args) and not args.dry_run:
        inputs.lock.acquire()  # before the file is read
    results.reuse_results(args.json, result, test_sets)
    if args.dry_run:
        derived = {
            "classes": f"{len(wnids)}{origin and f', taken to be {origin}'}",
            "crops": f"{image_size} px",
            "test_sets": f"{len(test_sets)}, of which {len(result['cells'])} are done",
            "images": sum(len(test_set.labels) for test_set in test_sets),
        }
        return options.print_config(args, derived)
    agree = {
        "--pretrained": len(models),
        "--precision": args.precision,
        "the class list": wnids,
        "images of the test sets": {each.key: len(each.labels) for each in test_sets},
        "test sets in --json": sorted(result["cells"]),
    }
    launch.launch(evaluate, args, inputs, agree)
    if report.missing(result) and not args.allow_partial:
        sys.exit(1)


if __name__ == "__main__":
    cli_main(main, again="run the same command again to continue")
