"""The published commands, and files that go both ways between this code, its earlier versions and the published one."""

import json
import shlex

import pytest
import torch
import torchvision
from helpers import (
    EVALUATE,
    FAULTS,
    PRETRAIN,
    PROBE,
    SMALL,
    SMALL_PROBE,
    log,
    refused,
    run_script,
    same,
    weights,
    write_folder,
)

PATCH_COMMAND = r"""
python moco-non-sem-neg.py -a resnet50 --lr 0.03 --batch-size 128 --dist-url 'tcp://localhost:10001' \
  --multiprocessing-distributed --world-size 1 --rank 0 --mlp --moco-t 0.2 --aug-plus --cos --moco-k 16384 \
  --robust nonsem --num-nonsem 1 --alpha 2 --epochs 200 --patch-ratio 16 72 --ckpt_path ./ckpts/RUN \
  /path/to/imagenet-100/
"""
TEXTURE_COMMAND = r"""
python moco-non-sem-neg.py -a resnet50 --lr 0.03 --batch-size 128 --dist-url 'tcp://localhost:10002' \
  --multiprocessing-distributed --world-size 1 --rank 0 --mlp --moco-t 0.2 --aug-plus --cos --moco-k 16384 \
  --robust texture_syn --num-nonsem 1 --alpha 2 --epochs 200 --ckpt_path ./ckpts/RUN \
  /path/to/imagenet-100-texture/
"""
PROBE_COMMAND = r"""
python main_lincls.py -a resnet50 --lr 10.0 --batch-size 128 --epochs 60 \
  --pretrained ./ckpts/RUN/checkpoint_0199.pth.tar --dist-url 'tcp://localhost:10003' \
  --multiprocessing-distributed --world-size 1 --rank 0 --ckpt_path ./ckpts/RUN  /path/to/imagenet-100/
"""


def as_typed(command, data, ckpt, *options):
    """A command of the README of the published code, with the changes that make it small."""
    words = shlex.split(command.replace("\\\n", " "))[1:]
    replaced = {"--epochs": "2", "--batch-size": "8", "--ckpt_path": str(ckpt), "-a": "resnet10"}
    if "--moco-k" in words:
        replaced["--moco-k"] = "64"
    for option, value in replaced.items():
        words[words.index(option) + 1] = value
    words = [str(ckpt / "checkpoint_0001.pth.tar") if word.endswith("0199.pth.tar") else word for word in words]
    return [words[0], "-j", "1", *words[1:-1], *options, str(data)]


def test_the_three_published_commands_and_the_table(tmp_path):
    data, ckpt = write_folder(tmp_path / "imagenet-100"), tmp_path / "ckpts" / "RUN"
    run = run_script(*as_typed(PATCH_COMMAND, data, ckpt))  # at 224 px, as published
    assert "no GPU found" in run.stdout and "epoch 1 [2/2]" in run.stdout
    saved = torch.load(ckpt / "checkpoint_0001.pth.tar", weights_only=True)
    assert saved["epoch"] == 2 and saved["arch"] == "resnet10" and "state" in saved["optimizer"]
    assert all(name.startswith("module.") for name in saved["state_dict"])
    assert saved["state_dict"]["module.queue"].shape == (128, 64)
    first, second = log(ckpt)
    assert first.keys() == {"epoch", "lr", "loss", "contrast_acc", "q_k", "q_t", "q_queue", "spread", "bad_images"}
    assert (first["epoch"], second["epoch"]) == (0, 1) and (first["lr"], second["lr"]) == (0.03, 0.015)

    texture = write_folder(tmp_path / "imagenet-100-texture", val=1, suffix=".png")
    run_script(*as_typed(TEXTURE_COMMAND, texture, tmp_path / "texture", "--image-size", "64"))
    assert len(log(tmp_path / "texture")) == 2

    run_script(*as_typed(PROBE_COMMAND, data, ckpt))
    linear = torch.load(ckpt / "model_best_0001.pth.tar", weights_only=True)
    assert linear.keys() >= {"epoch", "arch", "state_dict", "best_acc1", "optimizer"}
    assert linear["wnids"] == ["n01", "n02"] and linear["state_dict"]["module.fc.weight"].shape == (2, 256)
    assert linear["image_size"] == 224 and (ckpt / "checkpoint_robust_0001.pth.tar").exists()
    query = {
        name.replace("encoder_q.", ""): value for name, value in saved["state_dict"].items() if "encoder_q" in name
    }
    backbone = {name: value for name, value in query.items() if "fc." not in name}
    assert backbone and all(torch.equal(linear["state_dict"][name], value) for name, value in backbone.items())

    test = [PROBE, "-a", "resnet10", "--evaluate", "--resume", ckpt / "model_best_0001.pth.tar", "-j", 0, data]
    evaluated = run_script(*test, "--batch-size", 4)
    assert f"top-1 {linear['best_acc1']:.2f} %" in evaluated.stdout and "of 6 images" in evaluated.stdout
    report = tmp_path / "table.json"
    rows = ["--pretrained", f"patch={ckpt / 'model_best_0001.pth.tar'}"]
    table = run_script(EVALUATE, *rows, "--val", data, "--sketch", data / "train", "-j", 0, "--json", report)
    assert "| model | K | alpha | val | Sketch |" in table.stdout and "| patch | 64 | 2 |" in table.stdout
    cells = json.loads(report.read_text())["cells"]
    assert cells["val"]["results"][0]["top1"] == pytest.approx(float(linear["best_acc1"])) and cells["val"]["n"] == 6
    assert cells["sketch"]["n"] == 16 and cells["sketch"]["results"][0]["classes"]["n02"]["n"] == 8


# Files of this code before runs were resumed within an epoch of the probe (at commit 0b83d07)

OLD_PRETRAINING = {
    "epoch", "step", "means", "arch", "state_dict", "optimizer", "scaler", "seed", "bad_images", "bad_in_epoch",
    "image_size", "classes", "images", "images_per_step", "options",
}  # fmt: skip
OLD_LINEAR = {
    "epoch", "arch", "state_dict", "best_acc1", "optimizer", "wnids", "image_size", "seed", "lrs", "best_acc1s",
    "heads", "pretraining",
}  # fmt: skip


def make_old(path, names):
    saved = torch.load(path, weights_only=True)
    if "means" in names and saved["means"]:
        del saved["means"]["sizes"]
    saved["optimizer"] = saved.get("optimizers", saved["optimizer"])  # of all heads
    torch.save({name: saved[name] for name in names}, path)


@pytest.mark.parametrize("within", [False, True], ids=["after an epoch", "within an epoch"])
def test_an_earlier_pretraining_file_resumes_as_undisturbed(tmp_path, within):
    data = write_folder(tmp_path / "data", train=20)
    settings = [PRETRAIN, *SMALL, "--moco-dim", 8, data, "--ckpt_path"]
    run_script(*settings, tmp_path / "whole", "--epochs", 3)
    if within:
        run_script(FAULTS, "SIGTERM in step 8", *settings, tmp_path / "cut", "--epochs", 3, check=False)
    else:
        run_script(*settings, tmp_path / "cut", "--epochs", 1)
        (tmp_path / "cut" / "checkpoint_0000.pth.tar").unlink()
    make_old(tmp_path / "cut" / "checkpoint_latest.pth.tar", OLD_PRETRAINING)
    run = run_script(*settings, tmp_path / "cut", "--epochs", 3, "--resume", "auto")
    assert f"starting at epoch 1{' step 3' * within} " in run.stdout
    assert log(tmp_path / "cut") == log(tmp_path / "whole") and len(log(tmp_path / "cut")) == 3
    assert same(*(weights(tmp_path / name / "checkpoint_0002.pth.tar") for name in ("cut", "whole")))


def test_an_earlier_linear_file_resumes_as_undisturbed(tmp_path):
    data, name = write_folder(tmp_path / "data", train=20), "checkpoint_robust_random.pth.tar"
    settings = [PROBE, *SMALL_PROBE, "--lr", 0.1, 1, data, "--ckpt_path"]
    run_script(*settings, tmp_path / "whole", "--epochs", 3)
    run_script(*settings, tmp_path / "cut", "--epochs", 2)
    make_old(tmp_path / "cut" / name, OLD_LINEAR)
    (tmp_path / "cut" / "log.jsonl").unlink()  # the probe had none
    run_script(*settings, tmp_path / "cut", "--epochs", 3, "--resume", "auto")
    assert log(tmp_path / "cut") == log(tmp_path / "whole")[2:]
    whole, cut = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "cut"))
    assert same(whole["heads"], cut["heads"]) and same(whole["state_dict"], cut["state_dict"])
    assert whole["best_acc1s"] == cut["best_acc1s"]


# Files of the published code, of torchvision, and for them


def test_published_linear_files_of_1000_outputs_are_tested(tmp_path):
    """A linear checkpoint as the published code writes it: no class list, a head of 1000, best_acc1 a tensor."""
    data = write_folder(tmp_path / "data", classes=("n01", "n02", "n03"), train=4, val=5)
    run_script(PROBE, *SMALL_PROBE, "-b", 4, "--epochs", 1, "--ckpt_path", tmp_path, data)
    saved = torch.load(tmp_path / "model_best_random.pth.tar", weights_only=True)
    # Crops of 224 px there: the published code has no other. So the same images, at the checkpoint's own size, of ours.
    torch.save({**saved, "image_size": 224}, tmp_path / "ours.pth.tar")
    state = saved["state_dict"]
    for name in ("module.fc.weight", "module.fc.bias"):
        wide = torch.full((1000, *state[name].shape[1:]), -100.0 if name.endswith("bias") else 0.0)
        wide[:3] = state[name]
        state[name] = wide
    published = {"epoch": 1, "arch": "resnet10", "state_dict": state, "best_acc1": torch.tensor(33.0)}
    torch.save(published | {"optimizer": saved["optimizer"]}, tmp_path / "published.pth.tar")
    classes = tmp_path / "classes.txt"
    classes.write_text("n01\nn02\nn03\n")

    results = []
    for name, options in (("published", ["--classes", classes]), ("ours", [])):
        report = tmp_path / f"{name}.json"
        rows = ["--pretrained", tmp_path / f"{name}.pth.tar", *options]
        run_script(EVALUATE, *rows, "--val", data, "-j", 0, "--json", report)
        results.append(json.loads(report.read_text())["cells"]["val"]["results"])
    assert results[0] == results[1] and results[0][0]["n"] == 15
    line = refused(EVALUATE, "--pretrained", tmp_path / "published.pth.tar", "--val", data)
    assert "--classes" in line and "give as --val the data" in line and "train the head with main_lincls.py" in line
    resume = ["--evaluate", "--resume", tmp_path / "published.pth.tar"]
    probed = run_script(PROBE, "-a", "resnet10", *resume, "-b", 4, "-j", 0, data)
    assert f"top-1 {results[1][0]['top1']:.2f} %" in probed.stdout


def test_exported_backbones_load_elsewhere_and_back(shared_data, tmp_path):
    run_script(PRETRAIN, *SMALL, "-a", "resnet18", "--epochs", 1, "--ckpt_path", tmp_path, shared_data)
    pretrained = tmp_path / "checkpoint_0000.pth.tar"
    run_script(PROBE, "-a", "resnet18", "--pretrained", pretrained, "--export-backbone", tmp_path / "resnet18.pth")
    network = torchvision.models.resnet18()
    result = network.load_state_dict(torch.load(tmp_path / "resnet18.pth", weights_only=True), strict=False)
    assert (sorted(result.missing_keys), result.unexpected_keys) == (["fc.bias", "fc.weight"], [])
    query = weights(pretrained)
    assert torch.equal(network.layer4[1].bn2.running_var, query["module.encoder_q.layer4.1.bn2.running_var"])

    # What the published probe does with a file: it keeps module.encoder_q.* but for its head; no more may be missing.
    kept = {
        name.removeprefix("module.encoder_q."): value
        for name, value in query.items()
        if name.startswith("module.encoder_q.") and not name.startswith("module.encoder_q.fc")
    }
    result = torchvision.models.resnet18().load_state_dict(kept, strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and result.unexpected_keys == []

    # And back in: the exported file, a supervised network with its head, and an official MoCo file, all probe alike.
    torch.save({**network.state_dict()}, tmp_path / "supervised.pth")
    official = {"epoch": 200, "arch": "resnet18", "state_dict": query, "optimizer": {}}
    torch.save(official, tmp_path / "moco_v2.pth.tar")
    heads = []
    for name in ("resnet18.pth", "supervised.pth", "moco_v2.pth.tar"):
        folder = tmp_path / name.split(".")[0]
        settings = [*SMALL_PROBE, "-a", "resnet18", "-j", 0, "--epochs", 1, "--pretrained", tmp_path / name]
        run_script(PROBE, *settings, "--ckpt_path", folder, shared_data)
        heads.append(weights(next(folder.glob("model_best_*"))))
    assert same(heads[0], heads[1]) and same(heads[0], heads[2])
