"""preprocess/torchvision_folders.py, run as people run it."""

import gzip

from helpers import run_script
from PIL import Image
from preprocessing import FOLDERS, refusal, tree


def write_fashion_mnist(folder):
    """Files as FashionMNIST's archive holds them: 4 training and 2 test images, image i all of gray 10 i, label i."""
    folder.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 2)):
        images = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        images += b"".join(bytes([10 * i] * 784) for i in range(count))
        labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))


def test_fashion_mnist_from_the_files_of_its_archive(tmp_path):
    write_fashion_mnist(tmp_path / "raw")
    raw = tree(tmp_path / "raw")
    for _ in range(2):  # the second run finds all there
        run_script(FOLDERS, "--dataset", "fashionmnist", "--root", tmp_path / "raw", "--out", tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == [
        "torchvision.json",
        "train/Dress/000003.png",
        "train/Pullover/000002.png",
        "train/T-shirt_top/000000.png",
        "train/Trouser/000001.png",
        "val/T-shirt_top/000000.png",
        "val/Trouser/000001.png",
    ]
    image = Image.open(tmp_path / "out" / "train" / "Dress" / "000003.png")
    assert image.mode == "RGB" and image.size == (28, 28) and image.getpixel((3, 4)) == (30, 30, 30)
    assert tree(tmp_path / "raw") == raw


def test_raw_files_that_are_not_there_end_in_one_line(tmp_path):
    command = [FOLDERS, "--dataset", "cifar10", "--root", tmp_path / "raw", "--out", tmp_path / "out"]
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    assert "downloading them failed" in refusal(run_script(*command, check=False, env=proxy))
    assert not (tmp_path / "out").exists()
