"""Settings of the quick start for a data set and this machine; quickstart.sh runs it first.

    python docs/quickstart_settings.py DIR --epochs 30

Prints, for the shell, `settings`, the options of the pre-training, and what the other steps need of them. Options of
moco-non-sem-neg.py after DIR are kept, and the others follow them. All comes from the size and number of the images:

crop     7/8 of the shorter side (the median of 100 images), as 224 of 256 px; at most 40 on a CPU, 224 on a GPU
epochs   44,000 images are seen on a CPU, 2.5 million on a GPU; 2 to 200 epochs
batch    64 on a CPU, 128 on a GPU, at most half of the images; the learning rate goes with it
K        an eighth of the images, and patches of 7 to 32 % of the crop: by --recipe paper
"""

import argparse
import re
import shlex
import statistics
import sys
from pathlib import Path

import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from moco.data import folders  # noqa: E402
from moco.data.rgb import FORMATS  # noqa: E402
from moco.errors import UsageError  # noqa: E402
from moco.processes.environment import usable_cores  # noqa: E402

# what quickstart.sh says itself
TAKEN = ("--robust", "--alpha", "--seed", "--ckpt-path", "--resume", "--preview", "--dry-run")
# network, learning rate, largest crop, batch; images that pre-training and probe see; learning rates of the probe
DEVICES = {
    "cpu": ("resnet10_x0_5", 0.06, 40, 64, 44_000, 24_000, "0.03 0.1 0.3 1"),
    "gpu": ("resnet50", 0.06, 224, 128, 2_500_000, 1_000_000, "0.1 0.3 1 3 10 30"),
}


def clamp(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))


def power_of_two(limit: int) -> int:
    """The largest that is not above the limit, at least 2."""
    return 2 ** (max(2, limit).bit_length() - 1)


def shorter_side(paths: folders.PathArray) -> float:
    """The median over 100 images, in pixels."""
    sides = []
    for path in paths[:: max(1, len(paths) // 100)]:
        with Image.open(path, formats=FORMATS) as image:
            sides.append(min(image.size))
    return statistics.median(sides)


def settings(data: str, own: list[str]) -> dict[str, object]:
    """{shell variable: value}. own: options of the pre-training that were given, which count."""
    parser = argparse.ArgumentParser("quickstart.sh", usage="bash quickstart.sh DIR [OPTIONS]", allow_abbrev=False)
    for name, kind in {"--image-size": int, "--epochs": int, "--precision": str}.items():
        parser.add_argument(name, type=kind)
    parser.add_argument("-b", "--batch-size", type=int)
    for name in TAKEN:
        parser.add_argument(name, nargs="?", const="given")
    given, _ = parser.parse_known_args(
        [re.sub("^--[a-z_]+", lambda name: name[0].replace("_", "-"), one) for one in own]
    )
    if taken := [name for name in TAKEN if getattr(given, name.strip("-").replace("-", "_"))]:
        raise UsageError(
            f"{taken[0]} is set by quickstart.sh; rows and seeds: QUICKSTART_ROWS='plain patch1.5', QUICKSTART_SEEDS=3"
        )
    train, val = (folders.list_images(folders.split_path(data, split)) for split in ("train", "val"))
    images, gpus = len(train.paths), torch.cuda.device_count()
    device, cores = ("gpu" if gpus else "cpu"), usable_cores()
    arch, lr, largest, full_batch, seen, seen_by_probe, rates = DEVICES[device]
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    size = given.image_size or clamp(shorter_side(train.paths) * 7 / 8 // 8 * 8, 32, largest)
    batch = given.batch_size or min(full_batch, power_of_two(images // 2))
    epochs = given.epochs or clamp(seen / images, 2, 200)
    probe_epochs = clamp(seen_by_probe / images, 4, 100)
    precision = given.precision or ("bf16" if half else "fp32")
    both = f"--precision {precision} -j {clamp(cores / gpus - 1, 1, 16) if gpus else 1}"
    pretraining = (
        f"--recipe paper -a {arch} --image-size {size} --epochs {epochs} --batch-size {batch}"
        f" --lr {lr * batch / full_batch:g} --moco-m {0.999 if epochs * images // batch > 10_000 else 0.99}"
    )
    probe_batch = min(128, power_of_two(images // 2))
    schedule = " ".join(str(clamp(probe_epochs * part, 1, 100)) for part in (1 / 2, 3 / 4, 7 / 8))
    probe = f"--lr {rates} --batch-size {probe_batch} --epochs {probe_epochs} --schedule {schedule}"
    return {
        "images": f"{images} training images in {len(train.classes)} classes, {len(val.paths)} to test on",
        "settings": shlex.join([*f"{pretraining} {both}".split(), *own]),
        "probe": f"{probe} {both}",
        "image_size": size,
        "corrupted": clamp(300 / len(val.classes), 1, 50),  # images of each class
        "epochs": epochs,
        "probe_epochs": probe_epochs,
        "last": f"{epochs - 1:04d}",
        "gpus": gpus,
        "parallel": gpus or cores + 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the settings of the quick start as shell variables.")
    parser.add_argument("data", metavar="DIR", help="data set with train/ and val/, one folder per class")
    args, own = parser.parse_known_args()
    try:
        found = settings(args.data, own)
    except (UsageError, OSError) as error:
        parser.exit(2, f"quickstart.sh: error: {error}\n")
    for name, value in found.items():
        print(f"{name}={shlex.quote(str(value))}")


if __name__ == "__main__":
    main()
