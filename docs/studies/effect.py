"""Repeat the study of docs/effect.md: what non-semantic negatives do on the generated data and on FashionMNIST.

    python -m docs.studies.effect run --work effect-work --jobs 2
    python -m docs.studies.effect mechanism --work effect-work
    python -m docs.studies.effect report --results effect-work/results.jsonl --mechanism effect-work/mechanism.jsonl

`run` trains, probes and tests with the three scripts, as a user would, and appends a JSON line to DIR/results.jsonl for
each finished run; runs with a line there are not repeated, so that it can be stopped and restarted. `report` rewrites
the tables between the marks in docs/effect.md and docs/effect-tables.md. The seeds below were fixed before the first
result; none is left out.
"""

import argparse
import datetime
import itertools
import json
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

from docs.studies.runs import REPOSITORY, read_results, script, work_through
from docs.studies.tables import difference, markdown, mean_sd, p_row, rewrite

DATA_SEED, SECOND_DATA_SEED = 2001, 2002
SEEDS, SECOND_SEEDS = (101, 102, 103, 104, 105), (106, 107, 108)
DEFAULTS = {"lr": 0.06, "moco-k": 512, "moco-t": 0.2, "epochs": 20}  # what the study varies, with alpha
PRETRAIN = shlex.split(
    "-a resnet10 --image-size 56 --batch-size 64 -j 1 --mlp --moco-m 0.99 --aug-plus --cos --patch-ratio 4 18"
    " --precision bf16 --print-freq 62"
)
PROBE = shlex.split(
    "-a resnet10 -j 1 --lr 0.1 --batch-size 128 --epochs 20 --schedule 8 14 18 --precision bf16 --print-freq 1000"
)
COLUMNS = ("val", "Corruption", "Sketch", "Stylized", "Rendition", "Shape bias")
PAGES = ("effect.md", "effect-tables.md")  # of docs/, with the tables
QUICKSTART = REPOSITORY / "docs" / "studies" / "quickstart.json"  # of the table.json that QUICKSTART_SEEDS=5 writes


class Run(NamedTuple):
    """One pre-training with its probe and tests."""

    data: str  # "shapes-2001", "fashion"
    alpha: float | None  # None: no negatives, plain MoCo v2
    seed: int
    settings: tuple = ()  # (name, value) that differ from DEFAULTS

    @property
    def name(self) -> str:
        parts = [
            "plain" if self.alpha is None else f"alpha{self.alpha:g}",
            *(f"{name}{value:g}" for name, value in self.settings),
        ]
        return f"{self.data}_{'_'.join(parts)}_seed{self.seed}"

    def pretraining_options(self) -> list[str]:
        options = [f"--{name}={value:g}" for name, value in (DEFAULTS | dict(self.settings)).items()]
        negatives = ["--robust=none"] if self.alpha is None else ["--robust=patch", f"--alpha={self.alpha:g}"]
        return [*options, *negatives, f"--seed={self.seed}"]


def changed(**settings: float) -> tuple:
    """Settings as a Run keeps them: without those that are the defaults."""
    named = {name.replace("_", "-"): value for name, value in settings.items()}
    return tuple((name, value) for name, value in named.items() if DEFAULTS[name] != value)


MAIN, SECOND = f"shapes-{DATA_SEED}", f"shapes-{SECOND_DATA_SEED}"
DATA_OF = dict.fromkeys(SEEDS, MAIN) | dict.fromkeys(SECOND_SEEDS, SECOND)  # training seed → its generated data
GRID = [
    changed(lr=lr, moco_k=k, moco_t=t) for lr, k, t in itertools.product((0.06, 0.03, 0.12), (512, 2048), (0.2, 0.1))
]


def stages(results: dict[str, dict]) -> dict[str, list[Run]]:
    """All runs, in order. Which settings are plain's best follows from the grid, once its val accuracies are there."""
    queue = {
        "paired": [Run(MAIN, alpha, seed) for seed in SEEDS for alpha in (None, 2)],
        "sweep": [Run(MAIN, alpha, seed) for seed in SEEDS[:3] for alpha in (2.5, 3, 1, 1.5)],
        "grid": [Run(MAIN, None, SEEDS[0], settings) for settings in GRID],
        "equal time": [Run(MAIN, None, seed, changed(epochs=24)) for seed in SEEDS],
    }
    best = best_settings(results)
    queue["best"] = [Run(MAIN, None, seed, best) for seed in SEEDS] if best is not None else []
    queue["fashion"] = [Run("fashion", alpha, seed) for seed in SEEDS[:3] for alpha in (None, 2)]
    queue["best, alpha 2"] = [Run(MAIN, 2, seed, best) for seed in SEEDS] if best is not None else []
    queue["second data seed"] = [Run(SECOND, alpha, seed) for seed in SECOND_SEEDS for alpha in (None, 2)]
    queue["alpha 0"] = [Run(MAIN, 0, seed) for seed in SEEDS[:3]]
    return queue


def best_settings(results: dict[str, dict]) -> tuple | None:
    """The settings of the grid at which plain MoCo's val is highest; None until the grid is complete."""
    found = {settings: results.get(Run(MAIN, None, SEEDS[0], settings).name) for settings in GRID}
    if None in found.values():
        return None
    return max(found, key=lambda settings: found[settings]["figures"]["val"])


# --- running


def make_data(work: Path, name: str) -> Path:
    """The data set of that name below `work`, made if it is not there."""
    folder = work / name
    log = work / "data.log"
    if name.startswith("shapes-"):
        script(log, "preprocess/shapes.py", "--out", folder, "--seed", name.removeprefix("shapes-"), "--workers", 1)
    elif not (folder / "complete").exists():
        from docs.studies import effect_fashion

        script(
            log,
            "preprocess/torchvision_folders.py",
            "--dataset",
            "fashionmnist",
            "--root",
            effect_fashion.RAW,
            "--out",
            work / "fashion-all",
        )
        effect_fashion.subset(work / "fashion-all", folder)
        (folder / "complete").touch()
    return folder


def measure(run: Run, work: Path, data: Path) -> dict:
    """Pre-train, probe and test one run: its line of the results."""
    folder = work / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    log, last = folder / "output.log", f"{(DEFAULTS | dict(run.settings))['epochs'] - 1:04}.pth.tar"
    checkpoint, head = folder / f"checkpoint_{last}", folder / f"checkpoint_robust_{last}"
    to, seconds = ("--ckpt_path", folder), {}
    if not checkpoint.exists():
        options = (*PRETRAIN, *run.pretraining_options(), "--resume", "auto")
        seconds["pretrain"] = script(log, "moco-non-sem-neg.py", *options, *to, data)
    seconds["probe"] = script(
        log, "main_lincls.py", *PROBE, f"--seed={run.seed}", "--pretrained", checkpoint, *to, data
    )
    # The head of the last epoch: none is chosen by val.
    figures, seconds["test"] = evaluate(head, folder / "table.json", data, log)
    line = {
        "name": run.name,
        "data": run.data,
        "alpha": run.alpha,
        "seed": run.seed,
        "settings": dict(run.settings),
        "figures": figures,
        "last_epoch": json.loads((folder / "log.jsonl").read_text().splitlines()[-1]),
        "seconds": seconds,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    for path in folder.glob("*.pth.tar"):
        if path != head:
            path.unlink()
    return line


def evaluate(head: Path, report: Path, data: Path, log: Path) -> tuple[dict[str, float], float]:
    """({column: percent} of a linear checkpoint on those test sets that the data has, seconds)"""
    places = {"val": data} | {suite: data / suite for suite in ("corruption", "sketch", "stylized", "rendition")}
    suites = [part for suite, place in places.items() if place.is_dir() for part in (f"--{suite}", place)]
    seconds = script(log, "eval_robustness.py", "-j", 1, "--pretrained", f"row={head}", *suites, "--json", report)
    return {column: value for column, (value,) in json.loads(report.read_text())["table"]["row"].items()}, seconds


# --- what the features tell apart


def measure_mechanism(work: Path) -> None:
    """For each finished run on generated data, a line of work/mechanism.jsonl: cosines, readouts, other tests."""
    import torch

    from docs.studies import effect_mechanism

    torch.set_num_threads(1)
    path = work / "mechanism.jsonl"
    done = read_results(path)
    for name, line in read_results(work / "results.jsonl").items():
        if name in done or not line["data"].startswith("shapes-"):
            continue
        (head,) = (work / "runs" / name).glob("checkpoint_robust_*.pth.tar")
        encode = effect_mechanism.encoder(effect_mechanism.load_backbone(head))
        data, seed = work / line["data"], int(line["data"].removeprefix("shapes-"))
        found = {
            "name": name,
            "cosines": effect_mechanism.cosines(encode, sorted((data / "val").glob("*/*.png"))[::3]),
            "readouts": effect_mechanism.readouts(encode, data, seed),
            "second probe": effect_mechanism.second_probe(encode, data),
            "sketch tones": effect_mechanism.sketch_tones(head, data),
        }
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(found, flush=True)


# --- tables and picture

Figures = dict[int, dict[str, float]]  # seed → column → percent


class Arm(NamedTuple):
    """Runs that differ in the seed only: a row of a table."""

    title: str
    alpha: float | None
    settings: tuple = ()
    data: str | None = None  # None: DATA_OF each seed

    def figures(self, results: dict[str, dict], seeds: tuple = SEEDS) -> Figures:
        """Those seeds' figures that are there."""
        names = {seed: Run(self.data or DATA_OF[seed], self.alpha, seed, self.settings).name for seed in seeds}
        return {seed: results[name]["figures"] for seed, name in names.items() if name in results}


PLAIN, PATCH = Arm("plain", None), Arm("alpha 2", 2)


def arm_rows(results: dict[str, dict], arms: list[Arm], seeds: tuple, columns: list[str]) -> list[list[str]]:
    """A row of mean±sd for each arm that has runs."""
    rows = []
    for arm in arms:
        figures = arm.figures(results, seeds)
        if figures:
            rows.append(
                [
                    arm.title,
                    str(len(figures)),
                    *(mean_sd([run[column] for run in figures.values()]) for column in columns),
                ]
            )
    return rows


def difference_row(
    results: dict[str, dict], title: str, arm: Arm, base: Arm, seeds: tuple, columns: list[str]
) -> list[list[str]]:
    """[the row of arm - base over the seeds that both have, with five its p-values], or []"""
    ours, theirs = arm.figures(results, seeds), base.figures(results, seeds)
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return []
    pairs = [[ours[seed][column] - theirs[seed][column] for seed in both] for column in columns]
    row = [title, str(len(both)), *map(difference, pairs)]
    return [row, ["p (Holm)", "", *p_row(pairs)]] if len(both) >= 5 else [row]


def comparison(
    results: dict[str, dict],
    arms: list[Arm],
    differences: list[tuple[str, Arm, Arm]],
    seeds: tuple = SEEDS,
    columns: tuple = COLUMNS,
) -> str:
    """Arms, then differences (title, arm, base), as a table."""
    rows = arm_rows(results, arms, seeds, columns)
    for title, arm, base in differences:
        rows += difference_row(results, title, arm, base, seeds, columns)
    return markdown(["", "seeds", *columns], rows)


def single_runs(results: dict[str, dict], arms: list[Arm]) -> str:
    """Every run of some arms, seed by seed."""
    return markdown(
        ["", *COLUMNS],
        [
            [f"{arm.title}, seed {seed}", *(f"{figures[column]:.1f}" for column in COLUMNS)]
            for seed in SEEDS
            for arm in arms
            for figures in arm.figures(results, (seed,)).values()
        ],
    )


def setting_title(settings: tuple) -> str:
    values = DEFAULTS | dict(settings)
    return f"lr {values['lr']:g}, K {values['moco-k']}, T {values['moco-t']:g}"


def mechanism_table(results: dict[str, dict], measured: dict[str, dict]) -> str:
    """Mean±sd over the seeds of cosines and readouts, and paired differences of alpha 2 against plain."""
    flat = {name: {"figures": line["cosines"] | line["readouts"]} for name, line in measured.items()}
    columns = {
        "key": "cos q·k",
        "negative": "cos q·t",
        "other": "cos q·other",
        "closer": "t closer than k, %",
        "colour": "colour R²",
        "period": "period R²",
        "texture": "texture family, %",
        "shape": "shape, %",
    }
    rows = []
    for arm in (PLAIN, *(Arm(f"alpha {alpha:g}", alpha) for alpha in (1, 1.5, 2, 2.5, 3))):
        figures = arm.figures(flat)
        if figures:
            means = [[run[column] for run in figures.values()] for column in columns]
            rows.append(
                [
                    arm.title,
                    str(len(figures)),
                    *(f"{statistics.fmean(one):.2f}" if place < 3 else mean_sd(one) for place, one in enumerate(means)),
                ]
            )
    rows += difference_row(flat, "alpha 2 − plain", PATCH, PLAIN, SEEDS, list(columns))
    return markdown(["", "seeds", *columns.values()], rows)


def second_probe_table(measured: dict[str, dict]) -> str:
    """The five pairs under the other probe; corruption was not measured with it."""
    flat = {name: {"figures": line["second probe"]} for name, line in measured.items()}
    columns = ("val", "Sketch", "Stylized", "Rendition")
    return comparison(flat, [PLAIN, PATCH], [("alpha 2 − plain", PATCH, PLAIN)], columns=columns)


def sketch_table(measured: dict[str, dict]) -> str:
    """The five pairs on the same sketches in other tones."""
    flat = {name: {"figures": line["sketch tones"]} for name, line in measured.items()}
    columns = tuple(next(iter(flat.values()))["figures"]) if flat else ()
    return comparison(flat, [PLAIN, PATCH], [("alpha 2 − plain", PATCH, PLAIN)], columns=columns)


def quickstart_table(path: Path) -> str:
    """The quick start's rows, and each one's paired differences from the first."""
    (baseline, base), *others = json.loads(path.read_text())["table"].items()
    rows = [[title, *(mean_sd(own[column]) for column in COLUMNS)] for title, own in ((baseline, base), *others)]
    for title, own in others:
        pairs = [[here - there for here, there in zip(own[column], base[column])] for column in COLUMNS]
        rows += [[f"{title} − {baseline}", *map(difference, pairs)], ["p (Holm)", *p_row(pairs)]]
    return markdown(["", *COLUMNS], rows)


def tables(results: dict[str, dict], measured: dict[str, dict]) -> dict[str, str]:
    """{mark in one of PAGES: the table that stands there}"""
    pair = [PLAIN, PATCH], [("alpha 2 − plain", PATCH, PLAIN)]
    sweep = [PLAIN, *(Arm(f"alpha {alpha:g}", alpha) for alpha in (0, 1, 1.5, 2, 2.5, 3))]
    longer = Arm("plain, 24 epochs", None, changed(epochs=24))
    grid = [Arm(setting_title(settings), None, settings) for settings in GRID]
    fashion = [arm._replace(data="fashion") for arm in (PLAIN, PATCH)]
    best = best_settings(results)
    found = {
        "pooled": comparison(results, *pair, SEEDS + SECOND_SEEDS),
        "paired": comparison(results, *pair),
        "runs": single_runs(results, [PLAIN, PATCH]),
        "sweep": comparison(results, sweep, [(f"{arm.title} − plain", arm, PLAIN) for arm in sweep[1:]], SEEDS[:3]),
        "grid": markdown(
            ["seed 101", *COLUMNS], [[row[0], *row[2:]] for row in arm_rows(results, grid, SEEDS[:1], COLUMNS)]
        ),
        "time": comparison(results, [longer, PATCH], [("alpha 2 − plain, 24 epochs", PATCH, longer)]),
        "second": comparison(results, *pair, SECOND_SEEDS),
        "fashion": comparison(
            results, fashion, [("alpha 2 − plain", fashion[1], fashion[0])], SEEDS[:3], ("val", "Corruption")
        ),
        "probe": second_probe_table(measured),
        "tones": sketch_table(measured),
        "mechanism": mechanism_table(results, measured),
        "quickstart": quickstart_table(QUICKSTART),
    }
    if best is None:
        found["best"] = "The grid is not complete."
    else:
        tuned, same = Arm(f"plain, {setting_title(best)}", None, best), Arm(f"alpha 2, {setting_title(best)}", 2, best)
        found["best"] = comparison(
            results,
            [tuned, same, PATCH],
            [
                ("alpha 2 − plain, both at plain's best", same, tuned),
                ("alpha 2 at the defaults − plain at its best", PATCH, tuned),
            ],
        )
    return found


def draw_sweep(results: dict[str, dict], path: Path) -> None:
    """The trade-off: val and shape bias against alpha, every run and the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained", dpi=110)
    alphas = (0, 1, 1.5, 2, 2.5, 3)  # at 0 plain MoCo
    for axes, column, colour in zip(figure.subplots(1, 2), ("val", "Shape bias"), ("#0b66b3", "#d9730d")):
        runs = {
            alpha: [run[column] for run in Arm("", alpha or None).figures(results, SEEDS[:3]).values()]
            for alpha in alphas
        }
        runs = {alpha: figures for alpha, figures in runs.items() if figures}
        axes.plot(list(runs), [statistics.fmean(figures) for figures in runs.values()], "-", color=colour)
        for alpha, figures in runs.items():
            axes.plot([alpha] * len(figures), figures, "o", color=colour, alpha=0.6, markersize=5)
        axes.set_xlabel("alpha (0: no negatives)")
        axes.set_title("val, top-1 %" if column == "val" else "shape bias, %", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4")
    figure.savefig(path)


def write_report(results_file: Path, mechanism_file: Path, docs: Path) -> None:
    """Rewrite what stands between the marks of PAGES, and the picture of the sweep. ValueError: a mark is missing."""
    results = read_results(results_file)
    rewrite(docs, PAGES, tables(results, read_results(mechanism_file)))
    draw_sweep(results, docs / "effect_alpha.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Repeat the study of docs/effect.md.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, probe and test what is not done yet")
    run.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of data, runs and results.jsonl")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, one thread each (default: 1)")
    run.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=list(stages({})),
        metavar="STAGE",
        help=f"these stages only: {', '.join(stages({}))}",
    )
    mechanism = commands.add_parser("mechanism", help="measure what the finished runs' features tell apart")
    mechanism.add_argument("--work", type=Path, required=True, metavar="DIR", help="as for run")
    report = commands.add_parser("report", help="tables of docs/effect.md and effect-tables.md, and the picture")
    report.add_argument("--results", type=Path, required=True, metavar="FILE.jsonl", help="what run wrote")
    report.add_argument("--mechanism", type=Path, required=True, metavar="FILE.jsonl", help="what mechanism wrote")
    report.add_argument("--docs", type=Path, default=REPOSITORY / "docs", metavar="DIR", help="folder of the pages")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.command == "run":
        work = args.work.resolve()
        measured, made = (lambda run: measure(run, work, work / run.data)), (lambda name: make_data(work, name))
        work_through(work, args.jobs, stages, measured, made, args.only)
    elif args.command == "mechanism":
        measure_mechanism(args.work.resolve())
    else:
        write_report(args.results, args.mechanism, args.docs)


if __name__ == "__main__":
    main()
