"""Test linear checkpoints on the robustness sets: one table row per checkpoint, or per NAME with its runs' mean±std.

    python eval_robustness.py --pretrained ckpts/RUN/model_best_0199.pth.tar --val imagenet-100 \\
      --corruption imagenet-c --sketch imagenet-sketch --stylized stylized-imagenet --rendition imagenet-r
    python eval_robustness.py --pretrained patch-k16384-a2=RUN1.pth.tar,RUN2.pth.tar,RUN3.pth.tar --compare paper …
    torchrun --nproc-per-node=8 eval_robustness.py …
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from moco import classifier, distributed, failures, folders, launch, options, released, report, robustness

IMAGENET_100 = Path(__file__).parent / "preprocess" / "imagenet_100.txt"


def parse_args():
    parser = options.OptionParser("Test linear checkpoints on ImageNet-C, -Sketch, -R and Stylized-ImageNet.")
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained", nargs="+", action="extend", default=[], metavar="ROW",
                       help="[NAME=]FILE[,FILE…]: linear checkpoints, a table row each; several FILEs are its runs")
    model.add_argument("--classes", metavar="FILE", help="wnids, one a line, of a head that does not say them; sorted first")
    model.add_argument("--list-released", action="store_true", help="print the released checkpoints, then exit")
    data = parser.add_argument_group("test sets, any of them")
    for suite, layout in (("val", "<wnid>/*, or val/<wnid>/*"), ("corruption", "[<group>/]<corruption>/<severity>/<wnid>/*"),
                          ("sketch", "<wnid>/*"), ("stylized", "<wnid>/*, or val/<wnid>/*"), ("rendition", "<wnid>/*")):
        data.add_argument(f"--{suite}", metavar="DIR", help=layout)
    data.add_argument("--limit", type=options.positive_int, metavar="N", help="only the first N images of a class: a quick look")
    options.add_workers_option(data)
    data.add_argument("-b", "--batch-size", default=256, type=options.positive_int, metavar="N", help="images a batch")
    data.add_argument("--gpu", type=options.natural_int, metavar="N", help="the GPU of a single process")
    output = parser.add_argument_group("output")
    output.add_argument("--json", default="robustness.json", metavar="FILE",
                        help="every figure and its parts; an interrupted run goes on from it")
    output.add_argument("--compare", choices=["paper"], help="set the rows beside the paper's of the same NAME")
    output.add_argument("--plot", metavar="FILE.png", help="accuracy by corruption and severity; needs matplotlib")
    options.add_dry_run_option(output)
    output.add_argument("--allow-partial", action="store_true", help="exit with 0 though corruptions are missing")
    return parser.parse_args()


def check(args, rows):
    """Refuse, before anything is loaded, what could only fail later."""
    if not args.pretrained:
        raise failures.BadInput("nothing to test: --pretrained names the linear checkpoints")
    if not any(getattr(args, suite) for suite in robustness.SUITES):
        raise failures.BadInput("nothing to test on: give any of " + " ".join(f"--{suite} DIR" for suite in robustness.SUITES))
    if args.compare:
        report.check_published(rows)
    if args.plot and not args.corruption:
        raise failures.BadInput(f"--plot {args.plot}: it draws corruptions; give --corruption DIR")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise failures.BadInput(f"--plot {args.plot}: matplotlib is not installed; pip install matplotlib")
    options.check_file("--json", args.json)
    if args.plot:
        options.check_file("--plot", args.plot, endings=(".png", ".pdf", ".svg"))
    launch.process_counts(gpu=args.gpu)


def parse_rows(entries):
    """{name: files} of [NAME=]FILE[,FILE…] entries."""
    rows = {}
    for entry in entries:
        name, separator, files = entry.partition("=")
        if not separator or os.path.exists(entry):                    # a path may hold a "=", too
            name = files = entry
        if name in rows:
            raise failures.BadInput(f"--pretrained {entry}: the name {name} is taken by another row")
        rows[name] = files.split(",")
    return rows


def load_models(rows, args):
    """All checkpoints' models and options of pre-training, and the class list and crop size that they share."""
    models, pretraining, shared = [], [], None
    for path in [path for files in rows.values() for path in files]:
        model, saved = classifier.load_classifier(path)
        these = class_list(path, saved, model.fc.out_features, args), saved.get("image_size", 224)
        if shared is None:
            shared, first = these, path
        elif these != shared:
            raise failures.BadInput(f"--pretrained {path}: its classes or crop size are not those of {first};"
                                   " test them in two runs")
        models.append(model)
        pretraining.append(saved.get("pretraining") or {})
    return models, pretraining, *shared


def class_list(path, saved, width, args):
    """The wnid of each output: the checkpoint's own, those of --classes, those of --val, or ImageNet-100's."""
    if saved.get("wnids"):
        return saved["wnids"]
    if args.classes:
        wnids = read_classes(args.classes)
        if len(wnids) > width:
            raise failures.BadInput(f"--classes {args.classes}: {len(wnids)} classes, but the head of {path} has {width} outputs")
        return wnids
    if args.val:
        _, _, of_val = folders.list_photos(robustness.class_root(args.val))
        if len(of_val) == width:
            return of_val
    imagenet_100 = read_classes(IMAGENET_100)
    if width == len(imagenet_100) and (not args.val or set(imagenet_100) <= set(of_val)):
        return imagenet_100
    raise failures.BadInput(
        f"--pretrained {path}: its {width} outputs do not say their classes, and it is not clear which they are; name a file"
        f" of them with --classes (ImageNet-100's: {os.path.relpath(IMAGENET_100)}), or give as --val the data the head was"
        f" trained on, if it has {width} classes, or train the head with main_lincls.py, which stores them")


def read_classes(path):
    if not os.path.isfile(path):
        raise failures.BadInput(f"--classes {path}: there is no such file")
    try:
        with open(path) as file:
            wnids = sorted(file.read().split())
    except (OSError, UnicodeDecodeError) as error:
        raise failures.BadInput(f"--classes {path}: not a text file that can be read ({error})") from error
    if not wnids or len(set(wnids)) < len(wnids):
        raise failures.BadInput(f"--classes {path}: it must name each class once, one a line, as {os.path.relpath(IMAGENET_100)} does")
    return wnids


def evaluate(place, args, models, wnids, image_size, cells, result):
    """Score what an earlier run has not; the main process writes the report after each cell. All processes do this."""
    models = [model.to(place.device, memory_format=torch.channels_last) for model in models]
    workers = options.workers_per_process(args.workers, place.local_size)
    distributed.barrier()                                             # all have read the file before one writes it
    todo = [cell for cell in cells if cell.key not in result["cells"]]
    if distributed.is_main() and len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are done already, in {args.json}", file=sys.stderr)
    images = sum(len(cell.labels) for cell in todo)
    # In a log, where every update is a line, one in half a minute.
    with tqdm(total=images, unit="image", disable=not distributed.is_main(),
              mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for cell, scores in robustness.score(todo, models, wnids, image_size, args.batch_size, workers, place, bar.update):
            bar.set_description(cell.key, refresh=False)
            report.add(result, cell, scores, image_size, wnids)
            if distributed.is_main():
                report.save(args.json, result)
    if distributed.is_main():
        # In the order of the suites, however many starts it took.
        result["cells"] = {cell.key: result["cells"][cell.key] for cell in cells}
        result["table"] = report.by_row(result)
        report.save(args.json, result)
        tell(args, result)


def tell(args, result):
    print(report.table(result), *report.differences(result), *report.notes(result), sep="\n")
    if args.compare:
        print(report.comparison(result))
    if args.plot:
        report.plot(result, args.plot)
        print(f"wrote {args.plot}")
    print(f"wrote {args.json}", flush=True)


def main():
    args = parse_args()
    if args.list_released:
        return print(released.listing())
    rows = parse_rows(args.pretrained)
    check(args, rows)
    models, pretraining, wnids, image_size = load_models(rows, args)
    # Listing everything first finds a wrong folder before an hour of evaluation, and gives the bar its length.
    directories = {suite: getattr(args, suite) for suite in robustness.SUITES if getattr(args, suite)}
    cells = robustness.list_cells(directories, wnids, args.limit)
    result = report.new(rows, pretraining, wnids, image_size, args.limit)
    report.continue_from(args.json, result, cells)
    if args.dry_run:
        return options.echo(args, checkpoints=len(models), classes=len(wnids), size_of_crops=image_size, cells=len(cells),
                            cells_done_already=len(result["cells"]), images=sum(len(cell.labels) for cell in cells),
                            nothing_was_started="--dry-run")
    launch.launch(evaluate, (args, models, wnids, image_size, cells, result), gpu=args.gpu)
    if args.corruption and robustness.missing_corruptions([cell.key for cell in cells]) and not args.allow_partial:
        sys.exit(1)


if __name__ == "__main__":
    failures.run(main)
