"""Repeat the study of docs/emoji.md: what non-semantic negatives do on pictures that other people drew.

    python -m docs.studies.emoji run --packages packages --work emoji-work --jobs 2
    python -m docs.studies.emoji untrained --work emoji-work
    python -m docs.studies.emoji report --results emoji-work/results.jsonl

`run` makes the data, trains, probes and tests with the repository's scripts, as a user would, and appends a JSON line
to DIR/results.jsonl for each finished run; it can be stopped and restarted. `report` rewrites the tables between the
marks in docs/emoji.md. What is run, and in which order, was fixed before the first run.
"""

import argparse
import datetime
import itertools
import json
import shlex
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from docs.studies import effect_mechanism
from docs.studies.runs import REPOSITORY, read_results, script, work_through
from docs.studies.tables import difference, markdown, mean_sd, p_row, rewrite
from moco.encoders import build_encoder
from moco.evaluation import retrieval

SEEDS = (201, 202, 203, 204, 205)
TUNING_SEED = 1
LENGTHS, ERROR = (20, 40, 80), 1.7  # epochs; a standard error of val on the tuning data, points
ARCH, SIZE = "resnet10", 56
PRETRAIN = shlex.split(
    f"-a {ARCH} --image-size {SIZE} --batch-size 64 -j 1 --mlp --moco-m 0.99 --aug-plus --cos --patch-ratio 4 18"
    " --precision bf16 --print-freq 1000"
)
PROBE = shlex.split(
    f"-a {ARCH} -j 1 --lr 0.3 --batch-size 128 --epochs 20 --schedule 10 15 18 --precision bf16 --print-freq 1000"
)  # fmt: skip
GALLERY = "noto"
COLUMNS = ("val", "Rendition", "Sketch", "Silhouette", "Photo", "Clip art", "Corruption", "Retrieval")
MECHANISM = {
    "key": "cos q·k", "negative": "cos q·t", "other": "cos q·other", "closer": "t closer than k, %",
    "colour": "colour R²",
}  # fmt: skip
NAMED = {"silhouette": "Silhouette", "photo, shared classes": "Photo", "clipart, shared classes": "Clip art"}
PAGES = ("emoji.md", "emoji-tables.md")
DRAWING = threading.Lock()  # the crops of the mechanism's measures come from a generator that all threads share


class Run(NamedTuple):
    """One pre-training with its probe and tests."""

    data: str  # "tune", "emoji"
    negatives: str  # "none", "patch", "texture"
    alpha: float
    seed: int
    lr: float
    k: int
    t: float
    epochs: int

    @property
    def arm(self) -> str:
        return "plain" if self.negatives == "none" else f"{self.negatives}{self.alpha:g}"

    @property
    def name(self) -> str:
        return f"{self.data}_{self.arm}_lr{self.lr:g}_k{self.k}_t{self.t:g}_epochs{self.epochs}_seed{self.seed}"

    def pretraining_options(self) -> list[str]:
        negatives = [f"--robust={self.negatives}", f"--alpha={self.alpha:g}"] if self.negatives != "none" else []
        schedule = [f"--lr={self.lr:g}", f"--moco-k={self.k}", f"--moco-t={self.t:g}", f"--epochs={self.epochs}"]
        return [*schedule, *(negatives or ["--robust=none"]), f"--seed={self.seed}"]


GRID = [
    Run("tune", "none", 0, TUNING_SEED, lr, k, t, LENGTHS[0])
    for lr, k, t in itertools.product((0.03, 0.06, 0.12), (512, 2048), (0.1, 0.2))
]
ARMS = {  # titles of the study's rows: (negatives, alpha, seeds)
    "plain": ("none", 0, SEEDS),
    "+ Patch, alpha 2": ("patch", 2, SEEDS),
    "+ Texture, alpha 2": ("texture", 2, SEEDS[:3]),
    "+ Patch, alpha 1": ("patch", 1, SEEDS[:3]),
    "+ Patch, alpha 3": ("patch", 3, SEEDS[:3]),
}


def best(results: Mapping[str, dict], runs: Sequence[Run]) -> Run | None:
    """The run with the highest val; None until all have been made."""
    if any(run.name not in results for run in runs):
        return None
    return max(runs, key=lambda run: results[run.name]["figures"]["val"])


def stages(results: Mapping[str, dict]) -> dict[str, list[Run]]:
    """All runs, in order. Settings and length follow from plain's val on the tuning data, once it is there."""
    tuned = best(results, GRID)
    longer = [tuned._replace(epochs=epochs) for epochs in LENGTHS] if tuned else []
    chosen = length(results, longer)
    runs = {
        title: [chosen._replace(data="emoji", negatives=negatives, alpha=alpha, seed=seed) for seed in seeds]
        for title, (negatives, alpha, seeds) in ARMS.items()
        if chosen
    }
    plain, patch, *others = runs.values() if runs else ([], [])
    pairs = [run for pair in zip(plain, patch) for run in pair]
    return {"tuning": GRID, "length": longer, "pairs": pairs, "others": sum(others, [])}


def length(results: Mapping[str, dict], longer: Sequence[Run]) -> Run | None:
    """The shortest of these runs that the next longer one betters by less than a standard error of val; else the last.

    None until all have been made.
    """
    if not longer or best(results, longer) is None:
        return None
    figures = [results[run.name]["figures"]["val"] for run in longer]
    gains = [after - before for before, after in itertools.pairwise(figures)]
    enough = [run for run, gain in zip(longer, gains) if gain < ERROR]
    return enough[0] if enough else longer[-1]


# --- running


def make_data(work: Path, packages: Path, name: str) -> None:
    """The data set of that name below `work`, made if it is not there, for the study with textures."""
    out, log = work / name, work / "data.log"
    script(log, "preprocess/emoji.py", "--packages", packages, "--out", out, *(["--tune"] if name == "tune" else []))
    if name != "tune":
        photos, textures = out / "unlabeled", out / "unlabeled-texture"
        sizes = "--patch", 24, "--size", 64
        places = "--imagenet_path", photos, "--imagenet_t_path", textures
        script(log, "preprocess/imagenet_texture_syn.py", *sizes, *places)


def measure(run: Run, work: Path) -> dict:
    """Pre-train, probe and test one run: its line of the results."""
    data, folder = work / run.data, work / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    log, last = folder / "output.log", f"{run.epochs - 1:04}.pth.tar"
    checkpoint, head = folder / f"checkpoint_{last}", folder / f"checkpoint_robust_{last}"
    pictures, seconds = data / ("unlabeled-texture" if run.negatives == "texture" else "unlabeled"), {}
    if not checkpoint.exists():
        options = (*PRETRAIN, *run.pretraining_options(), "--resume", "auto", "--ckpt_path", folder)
        seconds["pretrain"] = script(log, "moco-non-sem-neg.py", *options, pictures)
    options = (*PROBE, f"--seed={run.seed}", "--pretrained", checkpoint, "--ckpt_path", folder)
    seconds["probe"] = script(log, "main_lincls.py", *options, data)
    figures, seconds["test"] = evaluate(head, folder / "table.json", data, log)  # of the last epoch's head
    with DRAWING:
        encode = effect_mechanism.encoder(effect_mechanism.load_backbone(head))
        cosines = effect_mechanism.cosines(encode, sorted((data / "val").glob("*/*.png")))
    paths = pictures_of(data / "artists")
    by_artist = retrieve(paths, {artist: encode(centre_crops(own)) for artist, own in paths.items()})
    figures["Retrieval"] = statistics.fmean(by_artist.values())
    line = {
        "name": run.name,
        **run._asdict(),
        "figures": figures,
        "retrieval": by_artist,
        "mechanism": cosines | colour(encode, data),
        "last_epoch": json.loads((folder / "log.jsonl").read_text().splitlines()[-1]),
        "seconds": seconds,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    for path in folder.glob("*.pth.tar"):
        if path not in (head, checkpoint):
            path.unlink()
    return line


def evaluate(head: Path, report: Path, data: Path, log: Path) -> tuple[dict[str, float], float]:
    """({column: percent} of a linear checkpoint on all test sets, on tuning data on val alone; seconds)"""
    options = ["--val", data]
    if data.name != "tune":
        options += [part for suite in ("rendition", "sketch", "corruption") for part in (f"--{suite}", data / suite)]
        options += ["--set", *(f"{name}={data / name}" for name in ("silhouette", "photo", "clipart"))]
    seconds = script(log, "eval_robustness.py", "-j", 1, "--pretrained", f"row={head}", *options, "--json", report)
    table = json.loads(report.read_text())["table"]["row"]
    return {NAMED.get(column, column): value for column, (value,) in table.items()}, seconds


def centre_crops(paths: list[Path]) -> torch.Tensor:
    """As the evaluation sees these pictures, (N, 3, SIZE, SIZE) in [0, 1]."""
    return effect_mechanism.v2.functional.center_crop(effect_mechanism.read(paths), [SIZE, SIZE])


def pictures_of(artists: Path) -> dict[str, list[Path]]:
    """{artist: the paths of the pictures}"""
    return {folder.name: sorted((folder / "val" / "all").glob("*.png")) for folder in sorted(artists.iterdir())}


def retrieve(paths: Mapping[str, list[Path]], vectors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """{artist: percent of the pictures whose nearest by GALLERY shows the same subject}. vectors: (N, d) of each."""
    names = {artist: [path.stem for path in own] for artist, own in paths.items()}
    return {
        artist: 100 * statistics.fmean(retrieval.matches(own, names[artist], vectors[GALLERY], names[GALLERY]))
        for artist, own in vectors.items()
        if artist != GALLERY
    }


def measure_untrained(work: Path) -> None:
    """Append a line to work/results.jsonl for each measure without training: networks as drawn, and baselines."""
    paths, found = pictures_of(work / "emoji" / "artists"), {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        backbone = build_encoder(ARCH, 1)
        backbone.fc = torch.nn.Identity()
        encode = effect_mechanism.encoder(backbone)
        vectors = {artist: encode(centre_crops(own)) for artist, own in paths.items()}
        found[f"untrained, seed {seed}"] = retrieve(paths, vectors)
    made = {
        artist: retrieval.vectors(retrieval.Features(artist, torch.empty(0), [*map(str, own)]), retrieval.BASELINES)
        for artist, own in paths.items()
    }
    for kind in retrieval.BASELINES:
        found[kind] = retrieve(paths, {artist: own[kind] for artist, own in made.items()})
    with (work / "results.jsonl").open("a") as file:
        for name, by_artist in found.items():
            file.write(json.dumps({"name": name, "retrieval": by_artist}) + "\n")


def colour(encode: effect_mechanism.Encoder, data: Path) -> dict[str, float]:
    """R² in percent of a picture's mean colour, read linearly from the features: from those of train/, on val/."""
    images = {split: centre_crops(sorted((data / split).glob("*/*.png"))) for split in ("train", "val")}
    features = [encode(own) for own in images.values()]
    return {"colour": effect_mechanism.regression_r2(*features, *(own.mean(dim=(2, 3)) for own in images.values()))}


# --- tables


def tables(results: Mapping[str, dict]) -> dict[str, str]:
    """{mark in PAGES: the table that stands there}"""
    made = stages(results)
    runs = made["pairs"] + made["others"]
    own = {
        title: {run.seed: results[run.name] for run in runs if run[1:3] == arm[:2] and run.name in results}
        for title, arm in ARMS.items()
    }
    figures = {title: {seed: line["figures"] for seed, line in lines.items()} for title, lines in own.items()}
    mechanism = {title: {seed: line["mechanism"] for seed, line in lines.items()} for title, lines in own.items()}
    untrained = {f"untrained, seed {seed}": seed for seed in SEEDS}
    artists = {
        "untrained": {seed: results[name]["retrieval"] for name, seed in untrained.items() if name in results},
        **{kind: {0: results[kind]["retrieval"]} for kind in retrieval.BASELINES if kind in results},
        **{title: {seed: line["retrieval"] for seed, line in lines.items()} for title, lines in own.items()},
    }
    artists = {
        title: {seed: own | {"mean": statistics.fmean(own.values())} for seed, own in lines.items()}
        for title, lines in artists.items()
    }
    names = next((own for lines in artists.values() for own in lines.values()), {})
    tuned = [
        [f"{run.lr:g}", str(run.k), f"{run.t:g}", str(run.epochs), *shown(results, run)]
        for run in [*made["tuning"], *made["length"][1:]]
    ]
    return {
        "tuning": markdown(["lr", "K", "T", "epochs", "val", "Retrieval"], tuned),
        "study": comparison(figures, dict(zip(COLUMNS, COLUMNS))),
        "artists": means(artists, dict(zip(names, names))),
        "mechanism": means(mechanism, MECHANISM, digits=2),
        "runs": markdown(
            ["", *COLUMNS],
            [
                [f"{title}, seed {seed}", *(f"{line[column]:.1f}" for column in COLUMNS)]
                for title, lines in figures.items()
                for seed, line in lines.items()
            ],
        ),
    }


def shown(results: Mapping[str, dict], run: Run) -> list[str]:
    """Cells of a tuning run."""
    figures = results.get(run.name, {}).get("figures", {})
    return [f"{figures[column]:.1f}" if column in figures else "–" for column in ("val", "Retrieval")]


Figures = Mapping[str, Mapping[int, Mapping[str, float]]]  # {title of an arm: {seed: figures}}


def means(figures: Figures, columns: Mapping[str, str], digits: int = 1) -> str:
    """Mean±sd of each arm, and paired differences of those with the seeds of plain, without a test."""
    rows = mean_rows(figures, columns, digits) + [row for row, _ in difference_rows(figures, columns)]
    return markdown(["", "seeds", *columns.values()], rows)


def comparison(figures: Figures, columns: Mapping[str, str]) -> str:
    """As `means`, with the p of each difference: of three pairs it has two degrees of freedom."""
    rows = mean_rows(figures, columns)
    for row, pairs in difference_rows(figures, columns):
        rows += [row] + ([["p (Holm)", "", *p_row(pairs)]] if len(pairs[0]) >= 3 else [])
    return markdown(["", "seeds", *columns.values()], rows)


def mean_rows(figures: Figures, columns: Iterable[str], digits: int = 1) -> list[list[str]]:
    return [
        [title, str(len(own)), *(mean_sd([each[column] for each in own.values()], digits) for column in columns)]
        for title, own in figures.items()
        if own
    ]


def difference_rows(figures: Figures, columns: Iterable[str]) -> list[tuple[list[str], list[list[float]]]]:
    """(row of the table, paired differences of each column) of the arms that were trained, plain aside."""
    rows, plain = [], figures["plain"]
    for title in [title for title in ARMS if title != "plain"]:
        own = figures[title]
        both = [seed for seed in own if seed in plain]
        if both:
            pairs = [[own[seed][column] - plain[seed][column] for seed in both] for column in columns]
            rows.append(([f"{title} − plain", str(len(both)), *map(difference, pairs)], pairs))
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Repeat the study of docs/emoji.md.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, probe and test what is not done yet")
    run.add_argument("--packages", type=Path, required=True, metavar="DIR", help="as of preprocess/emoji.py")
    run.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of data, runs and results.jsonl")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, one thread each (default: 1)")
    untrained = commands.add_parser("untrained", help="retrieval by untrained networks, colours, pixels and edges")
    untrained.add_argument("--work", type=Path, required=True, metavar="DIR", help="as for run, once it made the data")
    report = commands.add_parser("report", help="tables of docs/emoji.md")
    report.add_argument("--results", type=Path, required=True, metavar="FILE.jsonl", help="what run wrote")
    report.add_argument("--docs", type=Path, default=REPOSITORY / "docs", metavar="DIR", help="folder of the page")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.command == "report":
        rewrite(args.docs, PAGES, tables(read_results(args.results)))
        return
    torch.set_num_threads(1)
    work = args.work.resolve()
    if args.command == "untrained":
        measure_untrained(work)
        return
    packages = args.packages.resolve()
    work_through(work, args.jobs, stages, lambda run: measure(run, work), lambda name: make_data(work, packages, name))


if __name__ == "__main__":
    main()
