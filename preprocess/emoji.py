"""Make a data set of pictures that several groups of artists drew of the same subjects: the emoji of Unicode.

    pip install resvg_py
    python preprocess/emoji.py --packages packages --out emoji --preview emoji.png

The commands that get the packages, their licences and the folders that are made: docs/emoji.md. The class of a picture
is its subject's subcategory in Unicode. A quarter of the subjects, by a hash of the code point, is for testing: none of
their pictures is trained on (but for relatives of two, named there). Pictures are cut to what is drawn, on white.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import common  # before numpy
import numpy as np
import pool
from PIL import Image, ImageOps
from small_corruptions import CORRUPTIONS, CROP, corrupt

warnings.simplefilter("error", Image.DecompressionBombWarning)  # in the workers, too: such a picture is left out

SIZE, FIT = 64, 58  # px of a stored image, and of the picture in it
VERSION = 1  # of the images: to be raised when the same packages give others
LEAST = 12  # subjects of a class
FOLDS = 4  # the subjects' parts; one is for testing
NOTO = "emoji-datasource-google"  # the package that also lists the subjects
ARTISTS = {  # set of the artist's pictures of test subjects; package, and where its pictures lie
    "noto": ("val", NOTO, "img/google/64/*.png"),
    "twemoji": ("val", "emoji-datasource-twitter", "img/twitter/64/*.png"),
    "emojione": ("val", "@iconify-json/emojione-v1", "icons.json"),
    "openmoji": ("rendition", "openmoji", "color/svg/*.svg"),
    "fluent-3d": ("rendition", "@lobehub/fluent-emoji-3d", "assets/*.webp"),
    "fluent-flat": ("rendition", "@iconify-json/fluent-emoji-flat", "icons.json"),
    "openmoji-black": ("sketch", "openmoji", "black/svg/*.svg"),
    "fluent-contrast": ("silhouette", "@iconify-json/fluent-emoji-high-contrast", "icons.json"),
}
CORRUPTED = re.compile("val/[^/]+/noto-")  # pictures that get corrupted copies
PERSON = re.compile("1f468|1f469|1f9d1|200d|2640|2642|1f3f[b-f]")  # man, woman, person, joiner, signs, skin tones
VARIED = re.compile("200d|1f3f[b-f]")  # a joined subject, or one with a skin tone
DRAWN = re.compile("/(cartoon|toys|plastic)/")  # among Tux Paint's photographs

Picture = tuple[Path | str, list[str]]  # its file, or an SVG's text; where it is written, below OUT


def normal(code: str) -> str:
    """A code point or sequence, such as 1F469-200D-1F373, as all artists' file names are compared."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def fold(code: str) -> int:
    """The part, 0 to FOLDS - 1, that a subject belongs to: the same for all skin tones, and for a man and a woman."""
    kept = [part for part in code.split("-") if not PERSON.fullmatch(part)] or [code]
    return hashlib.md5("-".join(kept).encode()).digest()[0] % FOLDS


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_pictures(modules: Path) -> dict[str, dict[str, Path | str]]:
    """{artist: {code point: source}} of all packages."""
    openmoji = json.loads((modules / "openmoji/data/openmoji.json").read_text())
    codes = {slug(each["annotation"]): normal(each["hexcode"]) for each in openmoji}
    pictures = {}
    for artist, (_, package, where) in ARTISTS.items():
        if where == "icons.json":
            pictures[artist] = read_icons(modules / package, codes)
        else:
            pictures[artist] = {normal(path.stem): path for path in sorted((modules / package).glob(where))}
        if not pictures[artist]:
            raise common.UsageError(f"--packages: {package} holds no {where}; docs/emoji.md has the versions that do")
    return pictures


def read_icons(package: Path, codes: dict[str, str]) -> dict[str, str]:
    """{code point: an SVG's text} of one of Iconify's packages. codes: of names, where it lists none itself."""
    icons = json.loads((package / "icons.json").read_text())
    listed = {name: normal(code) for code, name in json.loads((package / "chars.json").read_text()).items()}
    codes = listed or codes | {a["parent"]: codes[name] for name, a in icons["aliases"].items() if name in codes}
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {icons["width"]} {icons["height"]}">'
    named = sorted((name, icon["body"]) for name, icon in icons["icons"].items() if name in codes)
    return {codes[name]: f"{head}{body}</svg>" for name, body in named}


def read_subjects(modules: Path) -> dict[str, str]:
    """{code point: class, or "" for one without}. Flags and skin tones by themselves are left out."""
    subjects = {}
    for each in json.loads((modules / NOTO / "emoji.json").read_text()):
        if each["category"] not in ("Flags", "Component"):
            for one in each, *each.get("skin_variations", {}).values():
                code = normal(one["unified"])
                subjects[code] = "" if VARIED.search(code) else slug(each["subcategory"])
    counts = Counter(subjects.values())
    return {code: name if counts[name] >= LEAST else "" for code, name in subjects.items()}


def list_emoji(modules: Path, test: int, left_out: set[int]) -> list[Picture]:
    """Every artist's pictures with their places. test: the test subjects' fold; left_out: folds to skip."""
    subjects, found = read_subjects(modules), []
    for artist, pictures in read_pictures(modules).items():
        kind = ARTISTS[artist][0]
        for code, source in pictures.items():
            if code not in subjects or fold(code) in left_out:
                continue
            name, tested, places = subjects[code], fold(code) == test, []
            if tested and not VARIED.search(code):
                places.append(f"artists/{artist}/val/all/{code}.png")
            if not tested and kind == "val":
                places.append(f"unlabeled/train/all/{artist}-{code}.png")
            if name and (tested or kind == "val"):
                places.append(f"{kind if tested else 'train'}/{name}/{artist}-{code}.png")
            if places:
                found.append((source, places))
    return found


def list_others(share: Path, classes: set[str]) -> list[Picture]:
    """Photographs and drawings of other subjects, sorted by people into folders."""
    with Path(__file__).with_name("emoji_folders.csv").open() as file:
        kinds = {share / row["folder"]: (row["set"], row["class"]) for row in csv.DictReader(file)}
    images = common.folders.images_in  # raises an error for a folder that is missing
    found = {folder / name: kinds[folder] for folder in sorted(kinds) for name in images(folder)}  # deepest last
    return [
        (path, [f"{kind}/{name}/{'-'.join(path.relative_to(share).parts)}"])
        for path, (kind, name) in found.items()
        if name in classes and not DRAWN.search(path.relative_to(share).as_posix())
    ]


def render(source: Path | str) -> Image.Image:
    """The picture on white, SIZE×SIZE. Raises ValueError if nothing is drawn, and what PIL raises."""
    if isinstance(source, str) or source.suffix == ".svg":
        import resvg_py

        text = source if isinstance(source, str) else source.read_text()
        source = io.BytesIO(resvg_py.svg_to_bytes(text, skip_system_fonts=True, width=4 * SIZE))
    with Image.open(source, formats=common.FORMATS) as image:
        drawn = image.convert("RGBA")
    box = drawn.getchannel("A").getbbox()
    if not box:
        raise ValueError("nothing is drawn")
    ground = Image.new("RGBA", drawn.size, "white")
    ground.alpha_composite(drawn)
    cut = ImageOps.contain(ground.convert("RGB").crop(box), (FIT, FIT), Image.LANCZOS)
    whole = Image.new("RGB", (SIZE, SIZE), "white")
    whole.paste(cut, ((SIZE - cut.width) // 2, (SIZE - cut.height) // 2))
    return whole


def corruptions(image: Image.Image, path: str) -> dict[str, Image.Image]:
    """{path below OUT: image} of the 75 corruptions of one image. path: its own one below each of their folders."""
    edge, seed = (SIZE - CROP) // 2, list(hashlib.md5(path.encode()).digest())
    photo, found = np.asarray(image)[edge:-edge, edge:-edge], {}
    for place, name in enumerate(CORRUPTIONS):
        for severity in range(1, 6):  # which share their random numbers: the same snow, only more of it
            corrupted = corrupt(np.random.default_rng([place, *seed]), photo, name, severity)
            found[f"corruption/{name}/{severity}/{path}"] = Image.fromarray(corrupted)
    return found


def write(job: tuple[Path, Picture]) -> str:
    """Write a picture to all its places below a folder. Returns its source and why, if it cannot be read, else ""."""
    out, (source, places) = job
    try:
        image = render(source)
    except (OSError, ValueError, Image.DecompressionBombWarning) as error:
        return f"{source}: {error}"
    images = dict.fromkeys(places, image)
    for place in filter(CORRUPTED.match, places):
        images |= corruptions(image, place.removeprefix("val/"))
    for path, each in images.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        each.save(out / path, compress_level=1)
    return ""


def generate(out: Path, pictures: list[Picture], workers: int) -> None:
    counts, jobs = Counter(), [(out, each) for each in pictures]
    for (_, places), told in zip(pictures, pool.in_processes(write, jobs, workers, "picture")):
        if told:
            print(f"left out: {common.printable(told)}", file=sys.stderr)
        counts.update(place.split("/")[0] for place in places if not told)
    print("  ".join(f"{name} {count}" for name, count in counts.items()))


def preview(out: Path, file: Path) -> None:
    """Save a sheet: a row per artist, a column for each of 24 test subjects that all of them drew."""
    folders = [out / "artists" / artist / "val" / "all" for artist in ARTISTS]
    shared = sorted(set.intersection(*({path.name for path in folder.iterdir()} for folder in folders)))
    sheet = Image.new("RGB", (24 * SIZE, len(folders) * SIZE))
    for row, folder in enumerate(folders):
        for column, name in enumerate(shared[:: max(1, len(shared) // 24)][:24]):
            sheet.paste(Image.open(folder / name), (column * SIZE, row * SIZE))
    common.write_atomically(file, common.encode(sheet, "PNG"))


def parse_args() -> argparse.Namespace:
    parser = common.Parser("Make a data set of the emoji of several artists.", "--packages packages --out emoji")
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR", help="folder of node_modules/ and usr/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--tune", action="store_true", help="leave the test subjects out; test on others, for tuning")
    parser.add_workers()
    parser.add_argument("--preview", type=common.png_path, metavar="FILE.png", help="also save a sheet of examples")
    return parser.parse_args()


def versions(modules: Path) -> dict[str, str]:
    """{package: version} of npm's. Raises UsageError if one is missing, or what draws SVGs."""
    try:
        import resvg_py  # noqa: F401  (the workers need it)

        packages = sorted({package for _, package, _ in ARTISTS.values()})
        return {name: json.loads((modules / name / "package.json").read_text())["version"] for name in packages}
    except ImportError as error:
        raise common.UsageError(f"resvg_py, which draws SVGs, is missing ({error}): pip install resvg_py") from error
    except OSError as error:
        raise common.UsageError(f"--packages: {error.filename} cannot be read; the commands: docs/emoji.md") from error


def main() -> None:
    args = parse_args()
    modules = args.packages / "node_modules"
    made_of = {"version": VERSION, "tune": args.tune, "packages": versions(modules)}
    pictures = list_emoji(modules, 1, {0}) if args.tune else list_emoji(modules, 0, set())
    pictures += list_others(args.packages / "usr/share", {*read_subjects(modules).values()} - {""})
    make = functools.partial(generate, args.out, pictures, args.workers)
    common.make_once(args.out, "emoji.json", made_of | {"pictures": len(pictures)}, make)
    if args.preview:
        preview(args.out, args.preview)


if __name__ == "__main__":
    common.run(main)
