"""Folders that are not what they seem, given to the scripts: without class folders, or with links that mislead."""

import json

import pytest
import torch
from helpers import (
    EVALUATE,
    PRETRAIN,
    PROBE,
    SMALL,
    SMALL_PROBE,
    fill_encoder,
    refused,
    run_script,
    same,
    weights,
    write_folder,
    write_photo,
)

from moco.encoders import build_encoder


def write_images(folder):
    for number in range(8):
        write_photo(folder / f"{number}.JPEG", seed=number)


def test_a_flat_folder_trains_as_one_class_folder_does(tmp_path):
    write_images(tmp_path / "flat" / "train")
    write_images(tmp_path / "one" / "train" / "all")
    command = [PRETRAIN, *SMALL, "--moco-k", 8, "--epochs", 1, "--ckpt_path"]
    flat = run_script(*command, tmp_path / "a", tmp_path / "flat")
    one = run_script(*command, tmp_path / "b", tmp_path / "one")
    assert "8 in 1 class, as there are no class folders\n" in flat.stdout and "class folders" not in one.stdout
    assert same(*(weights(tmp_path / name / "checkpoint_0000.pth.tar") for name in "ab"))
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in "ab"]
    assert losses[0] == losses[1]


def test_what_needs_labels_refuses_a_flat_folder(tmp_path):
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "val")
    line = refused(PRETRAIN, *SMALL, "--knn", "--ckpt_path", tmp_path / "ckpt", tmp_path / "data")
    assert "--knn needs labels" in line and "leave out --knn" in line
    line = refused(PROBE, *SMALL_PROBE, "--ckpt_path", tmp_path / "ckpt", tmp_path / "data")
    assert "no class folders, only 8 images" in line and "one folder of images per class" in line


@pytest.mark.parametrize("script", [PRETRAIN, PROBE, EVALUATE])
def test_every_script_refuses_a_link_that_makes_images_count_twice(tmp_path, script):
    data = write_folder(tmp_path / "data", train=8)
    for split in ("train", "val"):
        (data / split / "n03").symlink_to("n01")
    if script == EVALUATE:
        model = build_encoder("resnet10", 2)
        fill_encoder(model)
        state = {f"module.{name}": value for name, value in model.state_dict().items()}
        head = {"state_dict": state, "arch": "resnet10", "image_size": 32, "wnids": ["n01", "n02"]}
        torch.save(head, tmp_path / "model_best_0000.pth.tar")
        message = refused(script, "--val", data, "--pretrained", tmp_path / "model_best_0000.pth.tar")
    else:
        options = SMALL if script == PRETRAIN else SMALL_PROBE
        message = refused(script, *options, "--epochs", 1, "--ckpt_path", tmp_path / "out", data)
    assert f"n03: a link makes images count twice: {data}" in message
