"""Draw docs/negatives.png: query, key, patch negative and texture negative of three generated images.

python docs/negatives.py
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from moco import augment, distributed, plot, views  # noqa: E402
from moco.data import datasets, folders  # noqa: E402
from moco.negatives import patch_negatives  # noqa: E402

SIZE, PATCHES = 56, (8, 18)  # px: larger than the quick start's, to be seen
RECIPE = augment.V2._replace(gray_p=0, blur_p=0)  # a reader is to recognise the images
IMAGES = {"heart": 0, "plus": 1, "ring": 0}  # class: number


def preprocess(script: str, *arguments: object) -> None:
    command = [sys.executable, REPOSITORY / "preprocess" / script, *map(str, arguments)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def main() -> None:
    argparse.ArgumentParser(description="Draw docs/negatives.png.").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos, textures = Path(folder, "shapes"), Path(folder, "shapes-texture")
        preprocess("shapes.py", "--out", photos, "--train", 80, "--test", 10, "--cell", 10)
        preprocess(
            "imagenet_texture_syn.py",
            "--imagenet_path",
            photos,
            "--imagenet_t_path",
            textures,
            "--patch",
            24,
            "--size",
            64,
        )
        data = folders.list_training_images(str(textures), with_textures=True)
        crops = datasets.TwoCrops(data.photos, SIZE, data.textures)
        torch.manual_seed(0)
        firsts = {name: data.labels.tolist().index(label) for label, name in enumerate(data.classes)}
        batch = torch.stack([crops[firsts[name] + number] for name, number in IMAGES.items()])
    rng = distributed.derive_rng("picture")
    query, key, texture = views.training_views(
        batch, rng, recipe=RECIPE, robust="texture", num_nonsem=1, patch_ratio=PATCHES
    )
    path = REPOSITORY / "docs" / "negatives.png"
    negatives = torch.cat([patch_negatives(query, *PATCHES, rng), texture], dim=1)
    plot.save_views(str(path), query, key, negatives, ["patch negative", "texture negative"])
    Image.open(path).quantize(256).save(path, optimize=True)  # a third of the size
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
