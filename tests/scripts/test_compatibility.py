"""The published commands, and files that go both ways between this code, its earlier versions and the published one."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
import torchvision
from helpers import (
    EVALUATE,
    PRETRAIN,
    PROBE,
    REPOSITORY,
    SMALL,
    SMALL_PROBE,
    fill_encoder,
    log,
    refused,
    run_script,
    same,
    weights,
    write_folder,
)

from moco.encoders import build_encoder

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
    query = {name: value for name, value in saved["state_dict"].items() if "encoder_q" in name and ".fc." not in name}
    assert query and all(torch.equal(linear["state_dict"][n.replace("encoder_q.", "")], query[n]) for n in query)

    test = [PROBE, "-a", "resnet10", "--evaluate", "--resume", ckpt / "model_best_0001.pth.tar", "-j", 0, data]
    evaluated = run_script(*test, "--batch-size", 4)
    assert f"top-1 {linear['best_acc1']:.2f} %" in evaluated.stdout and "of 6 images" in evaluated.stdout
    report = tmp_path / "table.json"
    rows = ["--pretrained", f"patch={ckpt / 'model_best_0001.pth.tar'}"]
    table = run_script(EVALUATE, *rows, "--val", data, "--sketch", data / "train", "-j", 0, "--json", report)
    assert "| model | K | alpha | val | Sketch |" in table.stdout and "| patch | 64 | 2 |" in table.stdout
    cell = json.loads(report.read_text())["cells"]["val"]
    assert cell["results"][0]["top1"] == pytest.approx(float(linear["best_acc1"])) and cell["n"] == 6


# Files of this code before it had its rooms (at commit 8cae9c8): tests/data/earlier holds a pre-training and a probe of
# two heads, both stopped by SIGTERM in step 8, whose weights and momenta are left out; `filled` gives them. The log and
# the report that the scripts of that commit then made of them are in expected.json.

EARLIER = REPOSITORY / "tests" / "data" / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())


def filled(path):
    """An earlier checkpoint, with weights that are a function of their names and momenta of zero."""
    saved = torch.load(path, weights_only=True)
    momenta = [part for name in ("optimizer", "optimizers") for part in saved.get(name, {}).get("state", {}).values()]
    for part in (saved["state_dict"], saved.get("heads", {}), *momenta):
        part.update({name: torch.zeros(value.shape) for name, value in part.items() if value.is_floating_point()})
    state = {name: value for name, value in saved["state_dict"].items() if value.is_floating_point()}
    fill_encoder(SimpleNamespace(state_dict=lambda: state))
    return saved


@pytest.mark.parametrize("kind", ["pretraining", "linear"])
def test_a_run_of_an_earlier_version_continues_as_it_would_have(tmp_path, kind):
    data = write_folder(tmp_path / "data", train=20, suffix=".png")
    name, command = {
        "pretraining": ("checkpoint_latest.pth.tar", [PRETRAIN, *SMALL, "--moco-dim", 8]),
        "linear": ("checkpoint_robust_random.pth.tar", [PROBE, *SMALL_PROBE, "--lr", 0.1, 1]),
    }[kind]
    torch.save(filled(EARLIER / f"{kind}.pth.tar"), tmp_path / name)
    (tmp_path / "log.jsonl").write_text(json.dumps(EXPECTED[kind][0]) + "\n")
    run = run_script(*command, "--epochs", 3, "--resume", "auto", "--ckpt_path", tmp_path, data)
    assert "starting at epoch 1 step 3 (" in run.stdout
    made = log(tmp_path)
    assert [line.keys() for line in made] == [line.keys() for line in EXPECTED[kind]]
    for line, expected in zip(made, EXPECTED[kind]):
        for key, value in expected.items():
            assert line[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-3)), key


def test_a_report_of_an_earlier_version_had_the_same_figures_and_is_kept(tmp_path):
    """It does not tell which files it is of, so nothing of it is taken."""
    data, report = write_folder(tmp_path / "data", train=20, suffix=".png"), tmp_path / "report.json"
    torch.save(filled(EARLIER / "linear.pth.tar"), tmp_path / "linear.pth.tar")
    command = [EVALUATE, "--pretrained", f"row={tmp_path / 'linear.pth.tar'}", "--val", data, "-j", 0, "--json", report]
    run = run_script(*command, "--sketch", data / "train")
    assert "| row | – | – | 83.33 | 47.50 |" in run.stdout
    ours, earlier = json.loads(report.read_text()), EXPECTED["report"]
    for key, cell in earlier["cells"].items():
        (mine,), (theirs,) = ours["cells"][key]["results"], cell["results"]
        assert {name: mine[name] for name in ("top1", "n", "classes")} == {
            name: theirs[name] for name in ("top1", "n", "classes")
        }
    report.write_text(json.dumps(earlier))
    assert "it is of version 2" in refused(*command) and json.loads(report.read_text()) == earlier


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
    assert "--classes" in line and "or the head's data with --val" in line
    resume = ["--evaluate", "--resume", tmp_path / "published.pth.tar"]
    probed = run_script(PROBE, "-a", "resnet10", *resume, "-b", 4, "-j", 0, data)
    assert f"top-1 {results[1][0]['top1']:.2f} %" in probed.stdout


def test_the_published_script_resumes_a_linear_file_and_this_one_the_published_scripts(shared_data, tmp_path):
    """The outcome of its resuming from a file, for a head as wide as the file's."""
    run_script(PROBE, *SMALL_PROBE, "--lr", 0.1, 1, "--epochs", 1, "--ckpt_path", tmp_path, shared_data)
    saved = torch.load(tmp_path / "checkpoint_robust_random.pth.tar", weights_only=True)
    start_epoch, best_acc1 = saved["epoch"], saved["best_acc1"].to("cpu")
    assert (start_epoch, best_acc1.shape) == (1, ())
    model = torch.nn.DataParallel(build_encoder("resnet10", 2))  # names as in DistributedDataParallel
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in ("module.fc.weight", "module.fc.bias")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 30.0, momentum=0.9, weight_decay=0.0)
    model.load_state_dict(saved["state_dict"])
    optimizer.load_state_dict(saved["optimizer"])
    winner = saved["winner"]
    assert torch.equal(model.module.fc.weight, saved["heads"][f"{winner}.weight"])
    momentum = saved["optimizers"]["state"][2 * winner]["momentum_buffer"]
    assert torch.equal(optimizer.state[trained[0]]["momentum_buffer"], momentum)
    assert float(best_acc1) == max(saved["best_acc1s"])
    published = {name: saved[name] for name in ("epoch", "arch", "state_dict", "best_acc1", "optimizer")}
    torch.save(published, tmp_path / "published.pth.tar")
    resume = ["--epochs", 2, "--resume", tmp_path / "published.pth.tar", "--ckpt_path", tmp_path / "more"]
    assert "starting at epoch 1 (" in run_script(PROBE, *SMALL_PROBE, "--lr", 0.1, *resume, shared_data).stdout
    assert [line["epoch"] for line in log(tmp_path / "more")] == [1]


def test_exported_backbones_load_elsewhere_and_back(shared_data, tmp_path):
    run_script(PRETRAIN, *SMALL, "-a", "resnet18", "--epochs", 1, "--ckpt_path", tmp_path, shared_data)
    pretrained = tmp_path / "checkpoint_0000.pth.tar"
    run_script(PROBE, "-a", "resnet18", "--pretrained", pretrained, "--export-backbone", tmp_path / "resnet18.pth")
    network = torchvision.models.resnet18()
    result = network.load_state_dict(torch.load(tmp_path / "resnet18.pth", weights_only=True), strict=False)
    assert (sorted(result.missing_keys), result.unexpected_keys) == (["fc.bias", "fc.weight"], [])
    # The published probe keeps module.encoder_q.* of a file but for its head, and no more may be missing.
    query, prefix = weights(pretrained), "module.encoder_q."
    kept = {n.removeprefix(prefix): query[n] for n in query if n.startswith(prefix) and prefix + "fc" not in n}
    exported = network.state_dict()
    assert kept.keys() == exported.keys() - {"fc.weight", "fc.bias"}
    assert same(kept, {name: exported[name] for name in kept})

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
