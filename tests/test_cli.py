"""The scripts as people type them."""

import contextlib
import io
import json
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import ENVIRONMENT, REPOSITORY, TORCHRUN, run_script, write_folder
from PIL import Image

PRETRAIN, PROBE, EVALUATE = "moco-non-sem-neg.py", "main_lincls.py", "eval_robustness.py"
SMALL = shlex.split("-a resnet10 --image-size 32 --patch-ratio 4 12 --batch-size 8 --moco-k 64 -j 1 --seed 1")
TIMINGS = {"images_per_s", "data_share"}


def log(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def as_typed(command, data, ckpt):
    """A command of the README of the published code, with the changes that make it small."""
    words = shlex.split(command.replace("\\\n", " "))[1:]
    replaced = {"--epochs": "2", "--batch-size": "8", "--ckpt_path": str(ckpt)}
    if "--moco-k" in words:
        replaced["--moco-k"] = "64"
    for option, value in replaced.items():
        words[words.index(option) + 1] = value
    words = [str(ckpt / "checkpoint_0001.pth.tar") if word.endswith("0199.pth.tar") else word for word in words]
    words[words.index("-a") + 1] = "resnet18"
    return [words[0], "-j", "2", *words[1:-1], str(data)]


PATCH_COMMAND = r"""
python moco-non-sem-neg.py -a resnet50 --lr 0.03 --batch-size 128 --dist-url 'tcp://localhost:10001' \
  --multiprocessing-distributed --world-size 1 --rank 0 --mlp --moco-t 0.2 --aug-plus --cos --moco-k 16384 \
  --robust nonsem --num-nonsem 1 --alpha 2 --epochs 200 --patch-ratio 16 72 --ckpt_path ./ckpts/RUN  /path/to/imagenet-100/
"""
TEXTURE_COMMAND = r"""
python moco-non-sem-neg.py -a resnet50 --lr 0.03 --batch-size 128 --dist-url 'tcp://localhost:10002' \
  --multiprocessing-distributed --world-size 1 --rank 0 --mlp --moco-t 0.2 --aug-plus --cos --moco-k 16384 \
  --robust texture_syn --num-nonsem 1 --alpha 2 --epochs 200 --ckpt_path ./ckpts/RUN  /path/to/imagenet-100-texture/
"""
PROBE_COMMAND = r"""
python main_lincls.py -a resnet50 --lr 10.0 --batch-size 128 --epochs 60 --pretrained ./ckpts/RUN/checkpoint_0199.pth.tar \
  --dist-url 'tcp://localhost:10003' --multiprocessing-distributed --world-size 1 --rank 0 --ckpt_path ./ckpts/RUN  /path/to/imagenet-100/
"""


def test_the_three_published_commands_and_the_robustness_table(tmp_path):
    data, ckpt = write_folder(tmp_path / "imagenet-100"), tmp_path / "ckpts" / "RUN"
    run = run_script(*as_typed(PATCH_COMMAND, data, ckpt))
    assert "no GPU found" in run.stdout and "epoch 2/2 [2/2]" in run.stdout
    saved = torch.load(ckpt / "checkpoint_0001.pth.tar", weights_only=True)
    assert saved["epoch"] == 2 and saved["arch"] == "resnet18" and "state" in saved["optimizer"]
    assert all(name.startswith("module.") for name in saved["state_dict"])
    assert saved["state_dict"]["module.queue"].shape == (128, 64)
    first, second = log(ckpt)
    assert first.keys() == {"epoch", "lr", "loss", "contrast_acc", "q_k", "q_t", "q_queue", "spread", "bad_images"}
    assert (first["lr"], second["lr"]) == (0.03, 0.015)

    texture = write_folder(tmp_path / "imagenet-100-texture", val=1, suffix=".png")
    run_script(*as_typed(TEXTURE_COMMAND, texture, tmp_path / "texture"))
    assert len(log(tmp_path / "texture")) == 2

    run_script(*as_typed(PROBE_COMMAND, data, ckpt))
    linear = torch.load(ckpt / "model_best_0001.pth.tar", weights_only=True)
    assert linear.keys() >= {"epoch", "arch", "state_dict", "best_acc1", "optimizer"}
    assert linear["wnids"] == ["n01", "n02"] and linear["state_dict"]["module.fc.weight"].shape == (2, 512)
    assert (ckpt / "checkpoint_robust_0001.pth.tar").exists()
    backbone = {name.replace("encoder_q.", ""): value for name, value in saved["state_dict"].items() if "encoder_q" in name}
    assert all(torch.equal(linear["state_dict"][name], value) for name, value in backbone.items() if "fc." not in name)

    evaluated = run_script(PROBE, "-a", "resnet18", "--evaluate", "--resume", ckpt / "model_best_0001.pth.tar",
                           "--batch-size", 4, "-j", 1, data)
    assert f"top-1 {linear['best_acc1']:.2f} %" in evaluated.stdout and "of 6 images" in evaluated.stdout
    report = tmp_path / "table.json"
    table = run_script(EVALUATE, "--pretrained", f"patch={ckpt / 'model_best_0001.pth.tar'}", "--val", data,
                       "--sketch", data / "train", "-j", 1, "--json", report)
    assert "| model | K | alpha | val | Sketch |" in table.stdout and "| patch | 64 | 2 |" in table.stdout
    cells = json.loads(report.read_text())["cells"]
    assert cells["val"]["results"][0]["top1"] == pytest.approx(linear["best_acc1"]) and cells["val"]["n"] == 6
    assert cells["sketch"]["n"] == 16 and cells["sketch"]["results"][0]["classes"]["n02"]["n"] == 8


def test_interrupted_and_resumed_equals_uninterrupted(data, tmp_path):
    settings = [*SMALL, "--mlp", "--aug-plus", "--cos", "--epochs", 3, "--save-freq", 1, data]
    run_script(PRETRAIN, *settings, "--ckpt_path", tmp_path / "whole")
    assert len(log(tmp_path / "whole")) == 3
    (tmp_path / "cut").mkdir()
    for name in ("checkpoint_0000.pth.tar", "log.jsonl"):             # as if stopped during the second epoch
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    # Without --seed, too: the checkpoint knows it.
    settings = [word for i, word in enumerate(settings) if word != "--seed" and settings[i - 1] != "--seed"]
    run = run_script(PRETRAIN, *settings, "--resume", "auto", "--ckpt_path", tmp_path / "cut")
    assert "from epoch 1, resumed from" in run.stdout
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    one, other = (torch.load(tmp_path / run / "checkpoint_0002.pth.tar", weights_only=True) for run in ("whole", "cut"))
    assert same(one["state_dict"], other["state_dict"]) and one["seed"] == other["seed"]
    momenta = [[state["momentum_buffer"] for state in saved["optimizer"]["state"].values()] for saved in (one, other)]
    assert all(map(torch.equal, *momenta))


def test_a_resumed_probe_equals_an_uninterrupted_one(data, tmp_path):
    settings = ["-a", "resnet10", "--image-size", 32, "--batch-size", 8, "-j", 1, "--seed", 1, "--lr", 0.1, data]
    run_script(PROBE, *settings, "--epochs", 3, "--ckpt_path", tmp_path / "whole")
    run_script(PROBE, *settings, "--epochs", 2, "--ckpt_path", tmp_path / "cut")
    run_script(PROBE, *settings, "--epochs", 3, "--resume", "auto", "--ckpt_path", tmp_path / "cut")
    name = "checkpoint_robust_random.pth.tar"
    assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name))


def test_heads_side_by_side_learn_what_each_learns_alone(data, tmp_path):
    settings = ["-a", "resnet10", "--image-size", 32, "--batch-size", 8, "-j", 1, "--seed", 1]
    run_script(PROBE, *settings, "--epochs", 2, "--ckpt_path", tmp_path / "alone", "--lr", 0.1, data)
    run = run_script(PROBE, *settings, "--epochs", 1, "--ckpt_path", tmp_path / "three", "--lr", 0.01, 0.1, 1, data)
    assert "lr 0.01: " in run.stdout.splitlines()[-1] and "lr 1: " in run.stdout.splitlines()[-1]
    resumed = [PROBE, *settings, "--epochs", 2, "--ckpt_path", tmp_path / "three", "--resume", "auto"]
    run_script(*resumed, "--lr", 0.01, 0.1, 1, data)
    name = "checkpoint_robust_random.pth.tar"
    alone, three = (torch.load(tmp_path / run / name, weights_only=True) for run in ("alone", "three"))
    assert torch.equal(three["heads"]["1.weight"], alone["heads"]["0.weight"])
    winners = [three["state_dict"]["module.fc.weight"].equal(three["heads"][f"{i}.weight"]) for i in range(3)]
    assert sum(winners) == 1 and three["best_acc1s"][1] == alone["best_acc1"]
    assert "it has heads for 3 learning rates, --lr has 1" in refused(*resumed, "--epochs", 3, "--lr", 0.1, data)
    best = torch.load(tmp_path / "three" / "model_best_random.pth.tar", weights_only=True)
    for lrs in ([], ["--lr", 3, 10]):                                 # whichever are given: one head is tested
        tested = run_script(PROBE, *settings, *lrs, "--evaluate", "--resume", tmp_path / "three" / "model_best_random.pth.tar", data)
        assert f"top-1 {best['best_acc1']:.2f} %" in tested.stdout.splitlines()[-1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_byte_encoders_train_and_resume(data, tmp_path, precision):
    settings = [PRETRAIN, *SMALL, "--precision", precision, "--save-freq", 1, "--ckpt_path", tmp_path, data]
    run_script(*settings, "--epochs", 2)
    whole = torch.load(tmp_path / "checkpoint_0001.pth.tar", weights_only=True)
    assert bool(whole["scaler"]) == (precision == "fp16")
    assert all(value.dtype in (torch.float32, torch.int64) for value in whole["state_dict"].values())
    for name in ("0001", "latest"):
        (tmp_path / f"checkpoint_{name}.pth.tar").unlink()
    run_script(*settings, "--epochs", 2, "--resume", "auto")
    assert same(whole["state_dict"], weights(tmp_path / "checkpoint_0001.pth.tar"))


def test_same_seed_is_the_same_run_with_any_number_of_workers_and_another_seed_is_not(data, tmp_path):
    for name, workers, seed in (("none", 0, 1), ("one", 1, 1), ("four", 4, 1), ("other", 1, 2)):
        settings = [*SMALL[:-2], "--seed", seed, "-j", workers, "--epochs", 1]
        run = run_script(PRETRAIN, *settings, "--ckpt_path", tmp_path / name, data, launcher=["tests/faults.py", "workers as asked"])
        assert f"loading processes  {workers} each" in run.stdout     # of two cores, too
    assert log(tmp_path / "none") == log(tmp_path / "one") == log(tmp_path / "four") != log(tmp_path / "other")
    none, one, four = (weights(tmp_path / name / "checkpoint_0000.pth.tar") for name in ("none", "one", "four"))
    assert same(none, one) and same(none, four)


def test_torchrun_and_two_nodes_are_the_same_training(data, tmp_path):
    settings = [*SMALL, "--epochs", 1, data]
    torchrun = run_script(PRETRAIN, *settings, "--ckpt_path", tmp_path / "torchrun",
                          launcher=[*TORCHRUN, "--nproc-per-node=2"])
    assert "processes  2" in torchrun.stdout and "images per step  8" in torchrun.stdout
    assert torchrun.stdout.count("epoch 1/1 [2/2]") == 1              # one process speaks

    from moco.launch import free_port
    node = [sys.executable, PRETRAIN, *map(str, settings), "--batch-size", "4", "--multiprocessing-distributed",
            "--world-size", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    nodes = [subprocess.Popen([*node, "--rank", str(rank), "--ckpt_path", str(tmp_path / f"node{rank}")], cwd=REPOSITORY,
                              env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    outputs = [process.communicate(timeout=300)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0]
    assert "images per step  8" in outputs[0] and not (tmp_path / "node1").exists()
    assert log(tmp_path / "torchrun") == log(tmp_path / "node0")
    assert same(weights(tmp_path / "torchrun" / "checkpoint_0000.pth.tar"),
                weights(tmp_path / "node0" / "checkpoint_0000.pth.tar"))


def test_probe_accuracy_under_torchrun_counts_every_image_once(data, tmp_path):
    settings = ["-a", "resnet10", "--image-size", 32, "--batch-size", 4, "-j", 1, "--seed", 1]
    run_script(PROBE, *settings, "--epochs", 1, "--ckpt_path", tmp_path, data)
    (data / "val" / "n01" / "n01_0.JPEG").unlink()                    # 5 images over 2 processes
    command = [PROBE, *settings, "--evaluate", "--resume", tmp_path / "model_best_random.pth.tar", data]
    alone = run_script(*command).stdout.splitlines()[-1]
    both = run_script(*command, launcher=[*TORCHRUN, "--nproc-per-node=2"]).stdout.splitlines()[-1]
    assert "of 5 images" in alone and alone == both
    shutil.rmtree(data / "train")                                     # which --evaluate does not need
    assert run_script(*command).stdout.splitlines()[-1] == alone


@pytest.mark.parametrize("options", [["--robust", "none"], ["--num-nonsem", "0"]])
def test_plain_moco_has_no_negatives(data, tmp_path, options):
    run = run_script(PRETRAIN, *SMALL, "--epochs", 1, *options, "--ckpt_path", tmp_path, data)
    assert "q_t" not in log(tmp_path)[0] and "chance loss  4.174" in run.stdout        # ln(1 + 64)


def test_preview_draws_labelled_columns_and_trains_nothing(data, tmp_path):
    run_script(PRETRAIN, *SMALL, "--num-nonsem", 2, "--preview", tmp_path / "grid.png", "--ckpt_path", tmp_path / "c", data)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width == 4 * 76 and grid.height == 14 + 8 * 36
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("script", [PRETRAIN, PROBE, EVALUATE])
def test_help_has_one_line_an_option_and_shows_defaults(script):
    lines = run_script(script, "--help", env={"COLUMNS": "200"}).stdout.splitlines()
    options = [line for line in lines if line.lstrip().startswith("-")]
    assert len(options) >= 10 and all(len(line) <= 120 for line in lines)
    assert sum("(default: " in line for line in options) >= 3
    assert not [line for line in lines[lines.index("options:"):] if line.startswith(" " * 28)], "a help text takes two lines"


def refused(script, *arguments):
    """The one line on stderr of a script that refuses its arguments. In this process: it must build nothing anyway."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr),
          pytest.raises(SystemExit) as stop):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    told = stderr.getvalue()
    assert stop.value.code == 2 and told.count("\n") == 1 and told.startswith(script + ": error: "), told
    assert stdout.getvalue() == ""
    return told


def test_a_refusal_is_one_line_and_exit_code_2_in_the_shell(tmp_path):
    run = run_script(PRETRAIN, tmp_path / "nowhere", check=False)
    assert (run.returncode, run.stdout) == (2, "") and run.stderr.count("\n") == 1, run.stderr


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("shared") / "data")


@pytest.mark.parametrize("options, told", [
    ("--patch-ratio 0 16", "'0' is not a whole number of 1 or more"),
    ("--patch-ratio 72 16", "--patch-ratio 72 16"),
    ("--patch-ratio 16 500", "224 px"),
    ("--alpha -1", "'-1' is not a number of 0 or more"),
    ("--alpha nan", "'nan'"),
    ("--num-nonsem -1", "--num-nonsem"),
    ("--moco-k 0", "--moco-k"),
    ("--batch-size 0", "--batch-size"),
    ("--lr 0", "'0' is not a number above 0"),
    ("--robust shapes", "invalid choice"),
    ("--arch resnet51", "resnet51"),
    ("--resume nowhere.pth.tar", "no such file"),
    (f"--resume {REPOSITORY}/README.md", "not a checkpoint"),
    ("--robust texture", "ends in -texture"),
    ("--gpu 99", "--gpu 99"),
    ("--world-size 2 --rank 0 --multiprocessing-distributed --batch-size 4", "--dist-url"),
    ("--batch-size 64", "16 training images do not fill one batch of 64"),
    ("--unknown 3", "unrecognized arguments: --unknown"),
])
def test_bad_options_end_in_one_line_before_anything_is_built(shared_data, tmp_path, options, told):
    told_line = refused(PRETRAIN, *shlex.split(options), "--ckpt_path", tmp_path / "ckpt",
                        *(() if "--batch-size" in options else ("-b", 8)), shared_data)
    assert told in told_line
    assert not (tmp_path / "ckpt").exists()


def test_bad_data_ends_in_one_line(shared_data, data, tmp_path):
    assert "no such directory" in refused(PRETRAIN, tmp_path / "nowhere")
    assert "no train/ folder" in refused(PRETRAIN, shared_data / "train")
    (data / "train" / "n03").mkdir()
    assert "n03" in refused(PRETRAIN, "-b", 8, data) and "n03" in refused(PROBE, "-b", 8, data)
    (data / "train" / "n03").rmdir()
    (data / "val" / "n02").rename(data / "val" / "n04")
    assert "different classes" in refused(PROBE, "-b", 8, data)


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(shared_data, tmp_path):
    run = run_script(PRETRAIN, *SMALL, "-b", 7, "--ckpt_path", tmp_path / "c", shared_data, check=False,
                     launcher=[*TORCHRUN, "--nproc-per-node=2"])
    assert run.returncode != 0 and run.stderr.count("--batch-size 7 does not divide among 2 processes") == 1
    assert "use 6 or 8" in run.stderr and not (tmp_path / "c").exists()


def test_bad_checkpoints_end_in_one_line(shared_data, tmp_path):
    common = ["-a", "resnet10", "-b", 8, "--image-size", 32, "-j", 1]
    run_script(PRETRAIN, *SMALL, "--epochs", 1, "--ckpt_path", tmp_path, shared_data)
    pretrained = tmp_path / "checkpoint_0000.pth.tar"
    run_script(PROBE, *common, "--epochs", 1, "--pretrained", pretrained, "--ckpt_path", tmp_path, shared_data)
    linear = tmp_path / "model_best_0000.pth.tar"
    other = write_folder(tmp_path / "other", classes=("n01", "n07", "n08"))

    assert "no such file" in refused(PROBE, *common, "--pretrained", tmp_path / "x.pth.tar", shared_data)
    assert "not a checkpoint" in refused(PROBE, *common, "--pretrained", REPOSITORY / "README.md", shared_data)
    assert "resnet10, not --arch resnet50" in refused(PROBE, "-b", 8, "--pretrained", pretrained, shared_data)
    assert "no linear head" in refused(PROBE, *common, "-e", "--resume", pretrained, shared_data)
    assert "--evaluate needs" in refused(PROBE, *common, "-e", shared_data)
    assert "2 other classes than the 3" in refused(PROBE, *common, "-e", "--resume", linear, other)
    assert "it has no queue" in refused(PRETRAIN, *SMALL, "--resume", linear, shared_data)
    assert "--moco-k 64, this run has 32" in refused(
        PRETRAIN, *SMALL, "--moco-k", 32, "--epochs", 5, "--resume", pretrained, shared_data)
    assert "1 epochs are done" in refused(PRETRAIN, *SMALL, "--epochs", 1, "--resume", pretrained, shared_data)

    assert "nothing to test on" in refused(EVALUATE, "--pretrained", linear)
    assert "nothing to test" in refused(EVALUATE, "--val", shared_data)
    assert "no row of the paper's table" in refused(EVALUATE, "--pretrained", linear, "--val", shared_data, "--compare", "paper")
    assert "no folder" in refused(EVALUATE, "--pretrained", linear, "--val", shared_data, "--json", tmp_path / "no" / "r.json")
    assert "no linear head" in refused(EVALUATE, "--pretrained", pretrained, "--val", shared_data)
    assert "no such directory" in refused(EVALUATE, "--pretrained", linear, "--val", tmp_path / "nowhere")
    published = torch.load(linear, weights_only=True)
    del published["wnids"], published["image_size"]
    torch.save(published, tmp_path / "published.pth.tar")
    assert "--classes" in refused(EVALUATE, "--pretrained", tmp_path / "published.pth.tar", "--sketch", shared_data / "val")
    (tmp_path / "classes.txt").write_text("n02\nn01\n")
    run_script(EVALUATE, "--pretrained", tmp_path / "published.pth.tar", "--classes", tmp_path / "classes.txt",
               "--val", shared_data, "-j", 1, "--json", tmp_path / "r.json")


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A linear checkpoint on random features of three classes, and its data with four test sets."""
    root = tmp_path_factory.mktemp("linear")
    data = write_folder(root / "data", classes=("n01", "n02", "n03"), train=4, val=5)
    run_script(PROBE, "-a", "resnet10", "--image-size", 32, "-b", 4, "-j", 0, "--epochs", 1, "--seed", 1, "--ckpt_path", root, data)
    for name, severity in (("fog", 1), ("fog", 2), ("spatter", 5)):
        shutil.copytree(data / "val", root / "c" / name / str(severity))
    (root / "c" / "fog" / "2" / "n02" / "n02_1.JPEG").unlink()
    return root


def evaluation(linear, *options, **settings):
    return run_script(EVALUATE, "--pretrained", f"mine={linear / 'model_best_random.pth.tar'}", "--val", linear / "data",
                      "--corruption", linear / "c", "--sketch", linear / "data" / "train", "-j", 1, *options, **settings)


def test_two_evaluating_processes_give_exactly_the_figures_of_one(linear, tmp_path):
    one = evaluation(linear, "--allow-partial", "--json", tmp_path / "one.json", "-b", 4)
    two = evaluation(linear, "--allow-partial", "--json", tmp_path / "two.json", "-b", 4, launcher=[*TORCHRUN, "--nproc-per-node=2"])
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    assert "| mine |" in two.stdout and one.stdout.replace("one.json", "two.json") == two.stdout
    assert "Corruption: 44 images, CenterCrop(32), 3 cells; partial, 73 of 75" in one.stdout


def test_an_incomplete_corruption_set_is_partial_and_exits_non_zero(linear, tmp_path):
    run = evaluation(linear, "--json", tmp_path / "r.json", check=False)
    assert run.returncode == 1 and "Corruption (partial)" in run.stdout and "Traceback" not in run.stderr
    quick = evaluation(linear, "--json", tmp_path / "q.json", "--limit", 1, "--allow-partial")
    assert "a quick look: only the first 1 images of each class" in quick.stdout and "val: 3 images" in quick.stdout


def test_an_evaluation_that_was_killed_goes_on_to_the_same_file(linear, tmp_path):
    evaluation(linear, "--allow-partial", "--json", tmp_path / "whole.json")
    whole = json.loads((tmp_path / "whole.json").read_text())
    half = whole | {"cells": {key: cell for key, cell in whole["cells"].items() if key in ("val", "corruption/fog/2")}}
    del half["table"]                                                 # as the file is after two cells
    marked = json.loads(json.dumps(half))
    marked["cells"]["val"]["results"][0]["top1"] = 12.5               # taken over, not evaluated again
    for name, content in (("half", half), ("marked", marked)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        run = evaluation(linear, "--allow-partial", "--json", tmp_path / f"{name}.json")
        assert "2 of 5 cells are done already" in run.stderr
    assert (tmp_path / "half.json").read_text() == (tmp_path / "whole.json").read_text()
    assert "| mine | – | – | 12.50 |" in run.stdout


def test_evaluation_by_the_published_files_of_1000_outputs(linear, tmp_path):
    """A linear checkpoint as the published code writes it: no class list, a head of 1000, best_acc1 a tensor."""
    saved = torch.load(linear / "model_best_random.pth.tar", weights_only=True)
    state = saved["state_dict"]
    for name in ("module.fc.weight", "module.fc.bias"):
        wide = torch.full((1000, *state[name].shape[1:]), -100.0 if name.endswith("bias") else 0.0)
        wide[:3] = state[name]
        state[name] = wide
    torch.save({"epoch": 1, "arch": "resnet10", "state_dict": state, "best_acc1": torch.tensor(33.0),
                "optimizer": saved["optimizer"]}, tmp_path / "published.pth.tar")
    # Crops of 224 px there: the published code has no other. So the same images, at the checkpoint's own size, of ours.
    torch.save({**saved, "image_size": 224}, tmp_path / "ours.pth.tar")
    classes = tmp_path / "classes.txt"
    classes.write_text("n01\nn02\nn03\n")
    run_script(EVALUATE, "--pretrained", tmp_path / "published.pth.tar", "--classes", classes, "--val", linear / "data",
               "-j", 1, "--json", tmp_path / "r.json")
    run_script(EVALUATE, "--pretrained", tmp_path / "ours.pth.tar", "--val", linear / "data", "-j", 1, "--json", tmp_path / "o.json")
    published, ours = (json.loads((tmp_path / name).read_text())["cells"]["val"]["results"] for name in ("r.json", "o.json"))
    assert published == ours and published[0]["n"] == 15
    told = refused(EVALUATE, "--pretrained", tmp_path / "published.pth.tar", "--val", linear / "data")
    assert "--classes" in told and "give as --val the data" in told and "train the head with main_lincls.py" in told
    probed = run_script(PROBE, "-a", "resnet10", "--evaluate", "--resume", tmp_path / "published.pth.tar", "-b", 4, "-j", 1,
                        linear / "data")
    assert f"top-1 {ours[0]['top1']:.2f} %" in probed.stdout


def test_exported_backbones_load_into_torchvision_and_the_published_probe(shared_data, tmp_path):
    settings = ["-a", "resnet18", *SMALL[2:], "--epochs", 1, "--ckpt_path", tmp_path, shared_data]
    run_script(PRETRAIN, *settings)
    pretrained = tmp_path / "checkpoint_0000.pth.tar"
    run_script(PROBE, "-a", "resnet18", "--pretrained", pretrained, "--export-backbone", tmp_path / "resnet18.pth")
    network = torchvision.models.resnet18()
    result = network.load_state_dict(torch.load(tmp_path / "resnet18.pth", weights_only=True), strict=False)
    assert (sorted(result.missing_keys), result.unexpected_keys) == (["fc.bias", "fc.weight"], [])
    query = weights(pretrained)
    assert torch.equal(network.layer4[1].bn2.running_var, query["module.encoder_q.layer4.1.bn2.running_var"])

    # What the published probe does with a file: keep module.encoder_q.* but for its head, and demand that no more is missing.
    kept = {name.removeprefix("module.encoder_q."): value for name, value in query.items()
            if name.startswith("module.encoder_q.") and not name.startswith("module.encoder_q.fc")}
    result = torchvision.models.resnet18().load_state_dict(kept, strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and result.unexpected_keys == []

    # And back in: the exported file, a supervised network with its head, and an official MoCo file, all probe alike.
    torch.save({**network.state_dict()}, tmp_path / "supervised.pth")
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": query, "optimizer": {}}, tmp_path / "moco_v2.pth.tar")
    heads = []
    for name in ("resnet18.pth", "supervised.pth", "moco_v2.pth.tar"):
        run_script(PROBE, "-a", "resnet18", "--image-size", 32, "-b", 8, "-j", 0, "--seed", 1, "--epochs", 1,
                   "--pretrained", tmp_path / name, "--ckpt_path", tmp_path / name.split(".")[0], shared_data)
        heads.append(weights(next((tmp_path / name.split(".")[0]).glob("model_best_*"))))
    assert same(heads[0], heads[1]) and same(heads[0], heads[2])
    assert "--export-backbone needs --pretrained" in refused(PROBE, "--export-backbone", tmp_path / "x.pth")
    assert "DIR" in refused(PROBE, "--pretrained", pretrained)
    assert "not --arch resnet50" in refused(PROBE, "--pretrained", pretrained, "--export-backbone", tmp_path / "x.pth")


def test_knn_is_logged_and_skipped_without_val(data, tmp_path):
    settings = [*SMALL, "--epochs", 3, "--knn", "--knn-freq", 2, data]
    run = run_script(PRETRAIN, *settings, "--ckpt_path", tmp_path / "a")
    assert [("knn_top1" in record) for record in log(tmp_path / "a")] == [False, True, True]
    assert 0 <= log(tmp_path / "a")[2]["knn_top1"] <= 100 and run.stdout.count("200-nearest-neighbour top-1") == 2
    two = run_script(PRETRAIN, *settings[:-1], "--lr", 1e-9, "--aug-plus", data, "--ckpt_path", tmp_path / "two",
                     launcher=[*TORCHRUN, "--nproc-per-node=2"])
    assert two.stdout.count("200-nearest-neighbour top-1") == 2
    shutil.rmtree(data / "val")
    run = run_script(PRETRAIN, *SMALL, "--epochs", 1, "--knn", "--ckpt_path", tmp_path / "b", data)
    assert "--knn is skipped" in run.stdout and "knn_top1" not in log(tmp_path / "b")[0]


def test_patch_size_is_accepted_and_said_to_do_nothing(shared_data, tmp_path):
    run = run_script(PRETRAIN, *SMALL, "--epochs", 1, "--patch-size", 16, "--ckpt_path", tmp_path, shared_data)
    assert "--patch-size has no effect" in run.stdout
