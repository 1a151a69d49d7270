"""Test linear checkpoints on the robustness sets: one table row per checkpoint, or per NAME with its runs' mean±std.

    python eval_robustness.py --pretrained ckpts/RUN/model_best_0199.pth.tar --val imagenet-100 \\
      --corruption imagenet-c --sketch imagenet-sketch --stylized stylized-imagenet --rendition imagenet-r
    python eval_robustness.py --pretrained patch=ckpts/RUN1/model_best_0199.pth.tar,ckpts/RUN2/model_best_0199.pth.tar …
"""

import json
import os
import statistics
import sys

import torch
from tqdm import tqdm

from moco import classifier, options, robustness

SUITES = {"val": "val", "corruption": "Corruption", "sketch": "Sketch", "stylized": "Stylized", "rendition": "Rendition"}


def parse_args():
    parser = options.OptionParser("Test linear checkpoints on ImageNet-C, -Sketch, -R and Stylized-ImageNet.")
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained", required=True, nargs="+", action="extend", metavar="ROW",
                       help="[NAME=]FILE[,FILE…]: linear checkpoints, a table row each; several FILEs are its runs")
    model.add_argument("--classes", metavar="FILE", help="wnids, one a line, of a head that does not say them; sorted first")
    data = parser.add_argument_group("test sets, any of them")
    for suite, layout in (("val", "<wnid>/*, or val/<wnid>/*"), ("corruption", "[<group>/]<corruption>/<severity>/<wnid>/*"),
                          ("sketch", "<wnid>/*"), ("stylized", "<wnid>/*, or val/<wnid>/*"), ("rendition", "<wnid>/*")):
        data.add_argument(f"--{suite}", metavar="DIR", help=layout)
    options.add_workers_option(data)
    data.add_argument("-b", "--batch-size", default=256, type=options.positive_int, metavar="N", help="images a batch")
    data.add_argument("--gpu", default=0, type=options.natural_int, metavar="N", help="the GPU to use, if there is one")
    output = parser.add_argument_group("output")
    output.add_argument("--json", default="robustness.json", metavar="FILE", help="every figure of the table, and its parts")
    args = parser.parse_args()
    if not any(getattr(args, suite) for suite in SUITES):
        raise options.BadInput("nothing to test on: give any of " + " ".join(f"--{suite} DIR" for suite in SUITES))
    return args


def parse_rows(entries):
    """{name: files} of [NAME=]FILE[,FILE…] entries."""
    rows = {}
    for entry in entries:
        name, separator, files = entry.partition("=")
        if not separator or os.path.exists(entry):                    # a path may hold a "=", too
            name = files = entry
        if name in rows:
            raise options.BadInput(f"--pretrained {entry}: the name {name} is taken by another row")
        rows[name] = files.split(",")
    return rows


def load_models(rows, classes_file):
    """All checkpoints' models, and the class list and crop size that they share."""
    listed = read_classes(classes_file) if classes_file else None
    models, sources = [], []
    for path in [path for files in rows.values() for path in files]:
        model, saved = classifier.load_classifier(path)
        wnids = saved.get("wnids") or listed
        if wnids is None:
            raise options.BadInput(f"--pretrained {path}: it does not say its classes; name a file of them with --classes")
        if model.fc.out_features < len(wnids):
            raise options.BadInput(f"--classes {classes_file}: {len(wnids)} classes, but the head of {path} has"
                                   f" {model.fc.out_features} outputs")
        models.append(model)
        sources.append((path, wnids, saved.get("image_size", 224)))
    for path, *shared in sources[1:]:
        if shared != list(sources[0][1:]):
            raise options.BadInput(f"--pretrained {path}: its classes or crop size are not those of {sources[0][0]};"
                                   " test them in two runs")
    return models, *sources[0][1:]


def read_classes(path):
    if not os.path.isfile(path):
        raise options.BadInput(f"--classes {path}: there is no such file")
    with open(path) as file:
        return sorted(file.read().split())


def evaluate(args, models, wnids, image_size, device):
    """{suite: [result of each model]} for the suites asked for."""
    folders = {suite: getattr(args, suite) for suite in SUITES if getattr(args, suite)}
    roots = {suite: folder if suite == "corruption" else robustness.class_root(folder) for suite, folder in folders.items()}
    workers = options.workers_per_process(args.workers, 1)
    scorer = robustness.Scorer(models, wnids, image_size, args.batch_size, workers, device)
    # Listing everything first finds a wrong folder before an hour of evaluation, and gives the bar its length.
    total = sum(sum(map(scorer.images, robustness.corruption_cells(root).values())) if suite == "corruption"
                else scorer.images(root) for suite, root in roots.items())
    results = {}
    with tqdm(total=total, unit="image", disable=not sys.stderr.isatty()) as bar:
        scorer.on_batch = bar.update
        for suite, root in roots.items():
            bar.set_description(suite)
            results[suite] = (robustness.score_corruptions(scorer, root) if suite == "corruption" else scorer.score(root))
    return results


def columns(results):
    """{column title: figure of each model}, in the order of the published table, then the figures beside it."""
    table = {title: [result["top1"] for result in results[suite]] for suite, title in SUITES.items() if suite in results}
    if "rendition" in results:
        table["Rendition, shared classes"] = [result["top1_shared_classes"] for result in results["rendition"]]
    for suite, title in SUITES.items():
        if suite in results and "shape_bias" in results[suite][0]:
            table["Shape bias"] = [result["shape_bias"] for result in results[suite]]
    return table


def by_row(rows, table):
    """{name: the figures of its runs in each column}"""
    first, grouped = 0, {}
    for name, files in rows.items():
        grouped[name] = [figures[first:first + len(files)] for figures in table.values()]
        first += len(files)
    return grouped


def print_table(grouped, titles):
    """A Markdown table: top-1 in percent; mean±std (sample) where a row has several runs."""
    print(f"| model | {' | '.join(titles)} |")
    print("|---|" + "---|" * len(titles))
    for name, cells in grouped.items():
        print(f"| {name} | {' | '.join(map(summary, cells))} |")


def print_differences(grouped, titles):
    """What the other rows measured against the first, in points."""
    (base, reference), *others = grouped.items()
    for name, cells in others:
        points = [statistics.fmean(runs) - statistics.fmean(base_runs) for runs, base_runs in zip(cells, reference)]
        print(f"{name} against {base}: " + ", ".join(f"{title} {change:+.2f}" for title, change in zip(titles, points)))


def summary(figures):
    mean = f"{statistics.fmean(figures):.2f}"
    return f"{mean}±{statistics.stdev(figures):.2f}" if len(figures) > 1 else mean


def write_json(path, rows, results, wnids, image_size):
    files = [(name, file) for name, files in rows.items() for file in files]
    runs = [{"row": name, "checkpoint": file, **{suite: per_model[i] for suite, per_model in results.items()}}
            for i, (name, file) in enumerate(files)]
    with open(path, "w") as file:
        json.dump({"image_size": image_size, "wnids": wnids, "runs": runs}, file, indent=1)


def main():
    args = parse_args()
    if torch.cuda.is_available() and args.gpu >= torch.cuda.device_count():
        raise options.BadInput(f"--gpu {args.gpu}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    rows = parse_rows(args.pretrained)
    models, wnids, image_size = load_models(rows, args.classes)
    device = torch.device("cuda", args.gpu) if torch.cuda.is_available() else torch.device("cpu")
    models = [model.to(device, memory_format=torch.channels_last) for model in models]
    results = evaluate(args, models, wnids, image_size, device)
    table = columns(results)
    grouped = by_row(rows, table)
    print_table(grouped, table)
    print()
    print_differences(grouped, table)
    for suite, per_model in results.items():
        note = ""
        if missing := per_model[0].get("missing"):
            note = f"; partial: {len(missing)} of 75 cells are missing ({', '.join(missing[:3])}, …)"
        print(f"{SUITES[suite]}: {per_model[0]['n']} images{note}")
    write_json(args.json, rows, results, wnids, image_size)
    print(f"wrote {args.json}")


if __name__ == "__main__":
    options.run(main)
