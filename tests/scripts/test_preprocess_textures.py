"""preprocess/imagenet_texture_syn.py, run as people run it."""

import shutil
import sys

import numpy as np
import pytest
from helpers import PRETRAIN, SMALL, run_script
from PIL import Image
from preprocessing import TEXTURE, refusal, subset_command, texture_command, tree, write_imagenet


def test_from_imagenet_to_training_with_textures(imagenet):
    """With the kinds of files that real ImageNet holds under the name of JPEGs, and three broken ones."""
    odd = imagenet / "train" / "n01"
    photo = Image.open(odd / "part0" / "n01_0.JPEG").resize((120, 110))
    photo.save(odd / "png.JPEG", "PNG")
    photo.convert("CMYK").save(odd / "cmyk.JPEG", "JPEG")
    photo.convert("L").save(odd / "grey.JPEG", "JPEG")
    (odd / "truncated.JPEG").write_bytes((odd / "cmyk.JPEG").read_bytes()[:900])
    (odd / "empty.JPEG").write_bytes(b"")
    Image.new("L", (1, 60000)).save(odd / "narrow.JPEG", "PNG")
    run_script(*subset_command(imagenet))
    data, textures = imagenet.parent / "i100", imagenet.parent / "i100-texture"
    run = run_script(TEXTURE, "--imagenet_path", data, "--imagenet_t_path", textures, "--workers", 2, check=False)
    assert run.returncode == 1 and "wrote 9 textures; 6 photos below 96 px were enlarged first" in run.stdout
    assert "3 broken images were left out:" in run.stderr and "1x60000 px: too narrow" in run.stderr
    assert all(f"train/n01/{name}.JPEG: " in run.stderr for name in ("truncated", "empty", "narrow"))
    made = list(textures.rglob("*.png"))
    assert len(made) == 9 and all(Image.open(path).size == (224, 224) for path in made)
    training = run_script(
        PRETRAIN, *SMALL, "--epochs", 1, "--robust", "texture_syn", "--ckpt_path", imagenet.parent / "ckpt", textures
    )
    assert "photos without a texture  left out, 3: " in training.stdout
    assert (imagenet.parent / "ckpt" / "checkpoint_0000.pth.tar").exists()


def test_textures_depend_on_the_seed_and_the_path_alone(imagenet):
    def made(*runs):
        for options in runs:
            run_script(*texture_command(imagenet, "--splits", "train", "val", *options))
        textures = tree(imagenet.parent / "t")
        shutil.rmtree(imagenet.parent / "t")
        return textures

    one = made(("--workers", 1))
    photos = sorted(name.replace(".JPEG", ".png") for name in tree(imagenet) if "part" in name)
    assert sorted(one) == ["textures.json", *photos]
    assert one == made(()) == made(*(("--shard", part) for part in ("1/3", "3/3", "2/3")))
    other = made(("--seed", 1))
    assert one.keys() == other.keys() and all(one[name] != other[name] for name in one)


def test_a_folder_holds_textures_of_one_recipe(imagenet, tmp_path):
    other, made = write_imagenet(tmp_path / "elsewhere" / "imagenet"), tmp_path / "t"
    program = external_program(tmp_path / "program", "")
    run_script(*texture_command(imagenet, "--shard", "1/2"))
    half = tree(made)
    for options in (
        ("--patch", 16), ("--size", 48), ("--seed", 1), ("--texture-synthesis", program),
        ("--imagenet_path", other),
    ):  # fmt: skip
        line = refusal(run_script(*texture_command(imagenet, *options), check=False))
        assert "t holds images made with {" in line and line.endswith("; name a new folder, or remove this one\n")
    assert tree(made) == half
    imagenet.with_name("link").symlink_to(imagenet)
    (made / "train" / "n01" / "part0" / "n01_0.png").write_bytes(b"")  # what a power cut may leave
    command = texture_command(imagenet.with_name("link"))
    assert "6 photos, 2 of them done" in run_script(*command).stdout
    assert len(tree(made)) == 6 + 1 and tree(made).items() > half.items()


def external_program(path, body):
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom PIL import Image\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_authors_program_gets_the_patches(imagenet, tmp_path):
    # As texture-synthesis is called; it pastes the patches instead.
    paste = external_program(
        tmp_path / "my program",
        """
assert sys.argv[1:4] == ["--out-size", "32", "--out"] and sys.argv[5] == "generate" and len(sys.argv) == 8
canvas = Image.new("RGB", (32, 32))
canvas.paste(Image.open(sys.argv[6]), (0, 0))
canvas.save(sys.argv[4])""",
    )
    run_script(*texture_command(imagenet, "--splits", "val", "--texture-synthesis", paste))
    texture = np.asarray(Image.open(tmp_path / "t" / "val" / "n01" / "part0" / "n01_0.png"))
    photo = np.asarray(Image.open(imagenet / "val" / "n01" / "part0" / "n01_0.JPEG"))
    assert np.array_equal(texture[:24, :24], photo[20:44, 28:52])  # the centre of 80×64 px
    shutil.rmtree(tmp_path / "t")
    program = external_program(tmp_path / "program", "sys.exit('out of ideas')")
    run = run_script(*texture_command(imagenet, "--texture-synthesis", program, "--limit", 1), check=False)
    assert run.returncode == 1 and run.stderr.count("out of ideas") == 2 and not (tmp_path / "t" / "train").exists()


@pytest.mark.parametrize(
    "options, told",
    [
        (["--splits", "test"], "no test/ folder and holds train/, val/; DIR is the folder above test/"),
        (["--shard", "0/4"], "'0/4' is not a part I/N"),
        (["--patch", "4"], "--patch 4: too small"),
        (["--texture-synthesis", "no-such-program"], "no such program"),
    ],
)
def test_bad_options_end_in_one_line(imagenet, tmp_path, options, told):
    assert told in refusal(run_script(*texture_command(imagenet, *options), check=False))
    assert not (tmp_path / "t").exists()


def test_folders_that_are_not_utf8_can_be_printed(imagenet, tmp_path):
    imagenet.rename(tmp_path / "odd\udcff")
    run_script(*texture_command(tmp_path / "odd\udcff"), env={"LC_ALL": "C.UTF-8"})
    run = run_script(*subset_command(tmp_path / "odd\udcff", "--imagenet100_path", tmp_path / "i\udcff"))
    assert "i\\udcff/train: 2 classes, 6 photos" in run.stdout
