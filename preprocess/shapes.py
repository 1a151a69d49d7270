"""Generate a small data set on which the method's effect can be seen, with four robustness test sets.

    python preprocess/shapes.py --out data/shapes --preview shapes.png

On photographs, colour and texture are mostly properties of the single photo: contrastive learning can tell images
apart by them, a shortcut, while classes are made by shape and only partly go with a texture. These images copy that.
The class is one of ten shapes. Colours, light, texture period and angle are drawn for each image. The texture family is
the class's own in half of the images (RHO), any of the ten in the others. A quarter of the images are hollow: a contour
over one texture. Folders are those of ImageNet and its test sets, sizes a quarter of theirs: 64 px for 256, crops of
56 px for 224.

    train/<shape>/  val/<shape>/                        photo-like
    corruption/<corruption>/<severity 1-5>/<shape>/     val images, cropped to 56 px, then corrupted (ImageNet-C)
    sketch/<shape>/                                     black outlines on white, shaded inside (ImageNet-Sketch)
    stylized/val/<shape>/<owner of the texture>-*.png   with another class's texture (Stylized-ImageNet)
    rendition/<shape>/                                  flat, cartoon and painterly, no texture (ImageNet-R)

Each image is a function of (seed, set, class, number), so neither workers nor restarts change the result.
"""

import argparse
import functools
from collections.abc import Sequence
from math import cos, exp, log, pi, sin
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import pool
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from small_corruptions import CORRUPTIONS, CROP, corrupt, to_uint8

SIZE = 64  # px of a stored image
SCALE = 2  # shapes and textures are drawn this much larger, then averaged
CANVAS = SCALE * SIZE
RHO = 0.5  # share of photo-like images with their class's own texture; the others have any of the ten
HOLLOW = 0.25  # share of photo-like images that are a contour over one texture
RIMMED = 0.3  # share of the others with a dark rim
VERSION = 2  # of the images: to be raised when the same seed gives others


def arc(start: float, stop: float, radius: float | np.ndarray = 1, centre: float = 0, points: int = 48) -> np.ndarray:
    """Points×2 from angle `start` to `stop` (radians) around (centre, 0); y points down, as in images."""
    angle = np.linspace(start, stop, points)
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def part(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


# fmt: off
SHAPES = {                  # closed contours around the unit circle; a second one cuts a hole
    "disc": [arc(0, 2 * pi)],
    "square": [np.array([(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)])],
    "triangle": [arc(-pi / 2, 1.5 * pi, 1.1, points=4) + (0, .2)],
    "star": [arc(-pi / 2, 1.5 * pi, np.resize([1.1, .45], 11), points=11)],
    "plus": [np.array([(-.33, -1), (.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33),
                       (.33, 1), (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33)])],
    "ring": [arc(0, 2 * pi), arc(0, 2 * pi, radius=.5)],
    "crescent": [np.concatenate([arc(.98, 2 * pi - .98), arc(2 * pi - 1.5, 1.5, .83, .5)]) + (.2, 0)],
    "heart": [np.concatenate([arc(pi, 2 * pi, .5, -.5), arc(pi, 2 * pi, .5, .5), [(0, 1.3)]]) - (0, .35)],
    "arrow": [np.array([(0, -1), (.8, -.1), (.33, -.1), (.33, 1), (-.33, 1), (-.33, -.1), (-.8, -.1)])],
    "hourglass": [np.array([(-.75, -.95), (.75, -.95), (.14, 0), (.75, .95), (-.75, .95), (-.14, 0)])],
}


TEXTURES = {                # random generator, coordinates in periods → bool
    "stripes": lambda rng, u, v: part(u) < .5,
    "checker": lambda rng, u, v: (part(u) < .5) ^ (part(v) < .5),
    "dots": lambda rng, u, v: np.hypot(part(u) - .5, part(v) - .5) < .3,
    "grid": lambda rng, u, v: (part(u) < .24) | (part(v) < .24),
    "bricks": lambda rng, u, v: (part(1.6 * v) < .24) | (part(.8 * u + .5 * (part(.8 * v) < .5)) < .13),
    "zigzag": lambda rng, u, v: part(1.2 * v + 1.2 * np.abs(part(u) - .5)) < .5,
    "rings": lambda rng, u, v: np.abs(np.abs(np.hypot(part(u) - .5, part(v) - .5) - .18) - .17) < .09,
    "blobs": lambda rng, u, v: sum(np.cos(4.5 * (cos(way) * u + sin(way) * v) + phase)
                                   for way, phase in rng.uniform((0, 0), (pi, 2 * pi), (7, 2)).tolist()) > 0,
    "speckle": lambda rng, u, v: rng.random((128, 128))[np.floor(6 * u).astype(int), np.floor(6 * v).astype(int)] < .45,
    "dashes": lambda rng, u, v: (part(2 * v) < .5) & (part(u + .5 * (part(v) < .5)) < .6),
}
# fmt: on
OWN = dict(zip(SHAPES, TEXTURES))  # shape, which names the class → its texture
OWNER = {texture: shape for shape, texture in OWN.items()}
STYLES = "flat", "cartoon", "painterly"  # of renditions


class Scene(NamedTuple):
    """Content of a photo-like image. Colours and strengths are (3,) for R, G and B, from 0, black, to 1, white."""

    shape: str
    texture: str
    contours: list[np.ndarray]  # points in canvas pixels
    fill: np.ndarray  # colour of the object
    ground: np.ndarray  # colour around it; everywhere if hollow
    period: float  # px; the texture's, in object and ground alike
    angle: float  # radians
    strength: np.ndarray  # light minus dark places of the texture
    faintness: float  # the ground's share of that strength
    hollow: bool
    line: float  # px, width of the contour; 0 for none
    ink: float  # grey level of the contour
    opacity: float  # of the contour
    slope: np.ndarray  # light: change from the centre to the right and to the lower edge
    noise: float  # standard deviation


def draw_scene(rng: np.random.Generator, shape: str, texture: str | None = None, weakest: float = 0.2) -> Scene:
    """Draw a photo-like image's parameters. A texture is the class's own or any (RHO) unless given."""
    if texture is None:
        texture = OWN[shape] if rng.random() < RHO else str(rng.choice(list(TEXTURES)))
    fill, ground = draw_colours(rng)
    hollow = rng.random() < HOLLOW
    line, opacity = 0.0, 0.0
    if hollow:
        line, opacity = rng.uniform(1.5, 3), rng.uniform(0.6, 1)
    elif rng.random() < RIMMED:
        line, opacity = rng.uniform(1, 2.2), rng.uniform(0.4, 1)
    return Scene(
        shape,
        texture,
        pose(rng, SHAPES[shape]),
        fill,
        ground,
        period=exp(rng.uniform(log(6), log(12))),
        angle=rng.uniform(-pi / 2, pi / 2),
        strength=rng.choice([-1, 1]) * rng.uniform(weakest, 0.8) * rng.uniform(0.7, 1.3, 3),
        faintness=1.0 if hollow else rng.uniform(0.4, 0.7),
        hollow=hollow,
        line=line,
        ink=float(hollow and ground.mean() < 0.3),
        opacity=opacity,
        slope=rng.uniform(-0.15, 0.15, 2),
        noise=rng.uniform(0.01, 0.04),
    )


def draw_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The colours of object and ground, (3,) each: grey levels at least 0.15 apart, then tinted."""
    levels = rng.uniform(0.1, 0.9, 2)
    while abs(levels[0] - levels[1]) < 0.15:
        levels = rng.uniform(0.1, 0.9, 2)
    fill, ground = levels[:, None] + rng.uniform(-0.2, 0.2, (2, 3))
    return fill, ground


def pose(rng: np.random.Generator, contours: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The contours at a random place, size, angle and proportion, in canvas pixels."""
    radius, angle = rng.uniform(21, 29), rng.uniform(-0.5, 0.5)
    stretch, flip = exp(rng.uniform(-0.15, 0.15)), rng.choice([-1, 1])
    turn = np.array([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]])
    linear = radius * turn @ np.diag([flip * stretch, 1 / stretch])
    centre = SIZE / 2 + rng.uniform(-1, 1, 2) * (30 - radius)
    return [SCALE * (centre + contour @ linear.T) for contour in contours]


def draw(contours: Sequence[np.ndarray], line: float = 0) -> np.ndarray:
    """Contours in canvas pixels → CANVAS×CANVAS of bool: their inside, or outlines `line` image pixels wide."""
    mask = np.zeros((CANVAS, CANVAS), bool)
    for contour in contours:
        layer, points = Image.new("1", (CANVAS, CANVAS)), [tuple(point) for point in contour]
        ImageDraw.Draw(layer).polygon(points, fill=line == 0, outline=1, width=max(1, round(line * SCALE)))
        mask ^= np.asarray(layer)
    return mask


def pattern(rng: np.random.Generator, texture: str, period: float, angle: float) -> np.ndarray:
    """A texture at a random phase, CANVAS×CANVAS of bool; period in image pixels, angle in radians."""
    at = np.arange(CANVAS, dtype=np.float32) / (SCALE * period)
    along, across = cos(angle) * at, sin(angle) * at
    u, v = along + (across + rng.uniform())[:, None], (along + rng.uniform())[:, None] - across
    return TEXTURES[texture](rng, u, v)


def shrink(mask: np.ndarray) -> np.ndarray:
    """CANVAS×CANVAS of bool → the share of each pixel that is covered, SIZE×SIZE×1."""
    return np.asarray(Image.fromarray(mask * np.uint8(255)).reduce(SCALE))[..., None] / 255


def paint_photo(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """The scene's image, SIZE×SIZE×3, about 0 to 1; textures' phases and noise are drawn here."""
    mask = draw(scene.contours) & (not scene.hollow)
    image = scene.ground + (scene.fill - scene.ground) * shrink(mask)
    for part_mask, share in (mask, 1), (~mask, scene.faintness):
        texture = pattern(rng, scene.texture, scene.period, scene.angle)
        image += share * scene.strength * (shrink(part_mask & texture) - shrink(part_mask) / 2)
    if scene.line:
        image += scene.opacity * shrink(draw(scene.contours, scene.line)) * (scene.ink - image)
    ramp = np.linspace(-1, 1, SIZE)
    image += (scene.slope[0] * ramp + scene.slope[1] * ramp[:, None])[..., None]
    return image + rng.normal(0, scene.noise, image.shape)


def paint_sketch(rng: np.random.Generator, shape: str) -> np.ndarray:
    """Black outlines on white, the inside shaded, SIZE×SIZE×3."""
    contours = pose(rng, SHAPES[shape])
    image = 1 - rng.uniform(0, 0.5) * shrink(draw(contours))
    return np.repeat(image * (1 - shrink(draw(contours, rng.uniform(1.5, 3)))), 3, axis=2)


def paint_rendition(rng: np.random.Generator, shape: str, style: str) -> np.ndarray:
    """Object and ground in one colour each, SIZE×SIZE×3: `flat`, `cartoon` with an outline, `painterly` in dabs."""
    contours, (fill, ground) = pose(rng, SHAPES[shape]), draw_colours(rng)
    image = ground + (fill - ground) * shrink(draw(contours))
    if style == "cartoon":
        image *= 1 - shrink(draw(contours, rng.uniform(1.5, 2.5)))
    elif style == "painterly":
        dabs = Image.fromarray(to_uint8(image + rng.normal(0, 0.12, (SIZE, SIZE, 1))))
        image = np.asarray(dabs.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.ModeFilter(5))) / 255
    return image


SETS = {"train": "train", "val": "val", "stylized": "stylized/val", "sketch": "sketch", "rendition": "rendition"}
PHOTOS = "train", "val", "stylized"


def generator(seed: int, split: str, label: int, number: int) -> np.random.Generator:
    """The randomness of one image. split: one of SETS, or of CORRUPTIONS."""
    return np.random.default_rng((seed, [*SETS, *CORRUPTIONS].index(split), label, number))


def scene_of(seed: int, split: str, label: int, number: int) -> tuple[Scene, np.random.Generator]:
    """The scene of image `number` of class `label` in one of PHOTOS, and the generator that paints it."""
    shapes, rng = list(SHAPES), generator(seed, split, label, number)
    if split != "stylized":
        return draw_scene(rng, shapes[label]), rng
    owner = shapes[(label + 1 + number % 9) % 10]  # the nine others in turn
    return draw_scene(rng, shapes[label], OWN[owner], weakest=0.4), rng


def images(seed: int, split: str, label: int, number: int) -> dict[str, np.ndarray]:
    """{path: image, uint8} of one image in one of SETS, or of one image at all severities of one of CORRUPTIONS."""
    shape, name, prefix = list(SHAPES)[label], f"{number:04}.png", ""
    if split in CORRUPTIONS:
        (photo,), edge = images(seed, "val", label, number).values(), (SIZE - CROP) // 2
        # The severities share their random numbers: the same snow, only more of it.
        return {
            f"corruption/{split}/{severity}/{shape}/{name}": corrupt(
                generator(seed, split, label, number), photo[edge:-edge, edge:-edge], split, severity
            )
            for severity in range(1, 6)
        }
    if split in PHOTOS:
        scene, rng = scene_of(seed, split, label, number)
        image = paint_photo(rng, scene)
        prefix = f"{OWNER[scene.texture]}-" if split == "stylized" else ""
    elif split == "sketch":
        image = paint_sketch(generator(seed, split, label, number), shape)
    else:
        image = paint_rendition(generator(seed, split, label, number), shape, STYLES[number % len(STYLES)])
    return {f"{SETS[split]}/{shape}/{prefix}{name}": to_uint8(image)}


def write(job: tuple[Path, int, str, int, int]) -> None:
    """Write what images() gives for (out, seed, split, label, number) below `out`."""
    out, *which = job
    for path, image in images(*which).items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(out / path, compress_level=1)


def generate(out: Path, seed: int, train: int, test: int, cell: int, workers: int) -> None:
    """Write the whole tree: `train` images, `test` in each test set, `cell` for each corruption and severity."""
    numbers = {split: range((train if split == "train" else test) // 10) for split in SETS}
    for place, name in enumerate(CORRUPTIONS):  # each has val images of its own
        numbers[name] = range(place * cell // 10, (place + 1) * cell // 10)
    jobs = [(out, seed, split, label, number) for split in numbers for label in range(10) for number in numbers[split]]
    for _ in pool.in_processes(write, jobs, workers, "job"):
        pass


def preview(seed: int, file: Path) -> None:
    """Save a labelled sheet: a column per class, a row per set, the last with another corruption in each column."""
    tile, rows = 2 * SIZE, ["train", "stylized", "sketch", "rendition", "corruption"]
    sheet = Image.new("RGB", (11 * tile, 20 + len(rows) * tile), "white")
    text, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for y, split in zip(range(20, sheet.height, tile), rows):
        text.text((8, y + SIZE), split, "black", font, anchor="lm")
        for label, (x, shape) in enumerate(zip(range(tile, sheet.width, tile), SHAPES)):
            text.text((x + SIZE, 10), shape, "black", font, anchor="mm")
            which = list(CORRUPTIONS)[label * 3 // 2] if split == "corruption" else split
            drawn = list(images(seed, which, label, label).values())
            sheet.paste(Image.fromarray(drawn[len(drawn) // 2]).resize((tile, tile), Image.NEAREST), (x, y))
    common.write_atomically(file, common.encode(sheet, "PNG"))


def parse_args() -> argparse.Namespace:
    """The options. Ends the script with exit code 2 where they cannot be right."""
    begin = "--out shapes --preview shapes.png"
    parser = common.Parser("Generate a small data set of textured shapes with four robustness test sets.", begin)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--seed", type=common.seed_int, default=0, metavar="N", help="same seed, same images")
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="training images")
    parser.add_argument("--test", type=int, default=1500, metavar="N", help="images in each test set")
    parser.add_argument("--cell", type=int, default=40, metavar="N", help="images for each corruption and severity")
    parser.add_workers()
    parser.add_argument("--preview", type=common.png_path, metavar="FILE.png", help="also save a sheet of examples")
    args = parser.parse_args()
    for name, count in ("train", args.train), ("test", args.test), ("cell", args.cell):
        if count < 10 or count % 10:
            parser.error(f"--{name} {count} is not a positive multiple of 10; try {max(10, count // 10 * 10)}")
    return args


def main() -> None:
    args = parse_args()
    counts = {name: getattr(args, name) for name in ("seed", "train", "test", "cell")}
    make = functools.partial(generate, args.out, **counts, workers=args.workers)
    common.make_once(args.out, "shapes.json", {"version": VERSION, **counts}, make)
    if args.preview:
        preview(args.seed, args.preview)


if __name__ == "__main__":
    common.run(main)
