import argparse
import os

import pytest
from helpers import TORCHRUN_RANK

from moco import options
from moco.errors import UsageError


def parser(usage=None):
    made = options.OptionParser("Train.", usage)
    options.add_data_options(made)
    options.add_training_options(made, epochs=5, batch_size=8, lr=0.03, schedule=[3, 4], weight_decay=0)
    options.add_precision_options(made)
    options.add_output_options(made, "ckpts")
    options.add_launch_options(made)
    return made


DERIVED = {"steps_per_epoch": 12, "images": "16"}


def printed(capsys, *arguments):
    options.print_config(parser().parse_args(list(arguments)), DERIVED)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.rindex(line.lstrip()) + len(line.lstrip().split("  ")[0]) for line in lines}) == 1  # aligned
    return dict(line.split("  ", 1) for line in map(str.lstrip, lines))


def test_only_what_differs_from_the_defaults_is_printed(capsys):
    settings = printed(capsys, "DIR", "--lr", "0.03", "--schedule", "1", "2", "--strict-fp32", "--save-steps", "7")
    given = {"data": "DIR", "save steps": "7", "schedule": "1 2", "strict fp32": "True"}
    assert settings == given | {"steps per epoch": "12", "images": "16"}


def test_a_recipe_changes_defaults_that_options_override_and_the_published_ones_stay():
    made = parser()
    made.add_argument("--recipe", choices=["paper"])
    args = made.parse_args(["DIR", "--recipe", "paper", "--lr", "0.1"], recipes={"paper": {"lr": 0.3, "epochs": 7}})
    assert (args.lr, args.epochs, args.defaults["lr"], args.defaults["epochs"]) == (0.1, 7, 0.03, 5)
    assert made.parse_args(["DIR"], recipes={"paper": {}}).recipe is None and "recipe" not in args.defaults


def test_patches_and_queue_fit_the_crop_and_the_data():
    assert options.patch_sizes(None, 224) == (16, 56) and options.patch_sizes("paper", 224) == (16, 72)
    assert options.patch_sizes("paper", 32) == (2, 10) and options.patch_sizes(None, 4) == (1, 1)
    lengths = {1: 1, 60_000: 8192, 126_689: 16384, 1_281_167: 65536}
    assert {images: options.queue_length(images) for images in lengths} == lengths


def test_an_option_error_is_one_line_of_the_first_process(capsys, monkeypatch):
    for local_rank, lines in (("0", 1), ("1", 0)):
        for name, value in {**TORCHRUN_RANK, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            parser().parse_args(["DIR", "--lr", "-1"])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == lines == message.count("'-1' is not a number above 0")


def test_a_hyphen_in_an_option_is_as_good_as_an_underscore():
    args = parser().parse_args(["DIR", "--ckpt-path", "a_b", "--batch_size=3", "--strict_fp32", "-j4", "--wd", "1e-4"])
    assert (args.ckpt_path, args.batch_size, args.strict_fp32, args.workers) == ("a_b", 3, True, 4)
    assert "--ckpt_path" in parser().format_help() and "--batch_size" not in parser().format_help()


@pytest.mark.parametrize("words", ["--epoch 3 DIR", "--ckpt-pth=x", "-lr 3 DIR", "--zzz"])
def test_an_unknown_option_is_named(capsys, words):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(words.split())
    told = f": error: {words.replace('=', ' ').split()[0]}: unknown; --help lists the options\n"
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize("words, lines", [([], 3), (["--lr", "1"], 1)])
def test_without_arguments_the_first_command_to_try_is_printed(capsys, words, lines):
    with pytest.raises(SystemExit) as stop:
        parser("%(prog)s [options] DIR\nto begin: %(prog)s --lr 1 DIR").parse_args(words)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == lines
    assert ("\nto begin: " in told) == (lines == 3) and ("arguments are required: DIR" in told) == (lines == 1)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (options.positive_int, {"1": 1, "2147483647": 2**31 - 1}, ["0", "-1", "1.5", "x", "", "2147483648"]),
        (options.nonnegative_int, {"0": 0}, ["-1", "nan"]),
        (options.seed_int, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63)]),
        (options.positive_float, {"1e-3": 0.001}, ["0", "nan", "inf", "1e39", "x"]),
        (options.nonnegative_float, {"0": 0.0}, ["-0.1", "nan"]),
        (options.unit_float, {"0": 0.0, "1": 1.0}, ["1.01", "-0.01", "nan"]),
    ],
)
def test_numbers_out_of_range_are_refused(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            kind(text)


def test_a_batch_is_divided_among_the_ranks_or_refused():
    assert options.per_rank(128, 8) == 16
    with pytest.raises(UsageError, match="--batch-size 12 cannot be divided among the 8 .* use 8 or 16"):
        options.per_rank(12, 8)
    with pytest.raises(UsageError, match="--batch-size 3 .* use 8$"):
        options.per_rank(3, 8)


@pytest.mark.parametrize(
    "cores, total, ranks, share",
    [(16, 32, 8, 2), (16, 10, 4, 3), (16, 0, 4, 0), (16, 4, 1, 4), (2, 32, 4, 1), (64, None, 8, 7), (16, None, 1, 15),
     (2, None, 1, 1), (1, None, 1, 1), (2, None, 8, 1)],
)  # fmt: skip
def test_workers_are_shared_and_limited_to_the_cores(monkeypatch, cores, total, ranks, share):
    monkeypatch.setattr(options, "usable_cores", lambda: cores)
    for files, most in (-1, share), (1024, share), (40, min(share, 2)), (15, 0):
        monkeypatch.setattr(options.os, "sysconf", lambda name, files=files: files)
        assert options.workers_per_rank(total, ranks) == most


@pytest.mark.parametrize("cores, total, share", [(8, None, 7), (8, 64, 8), (64, None, 7), (64, 32, 4)])
def test_a_task_of_slurm_sees_its_own_cores_or_where_it_is_not_bound_all(monkeypatch, cores, total, share):
    monkeypatch.setattr(options, "usable_cores", lambda: cores)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert options.workers_per_rank(total, 8) == share


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    options.check_folder("--ckpt_path", str(tmp_path / "new" / "deeper"))
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"--ckpt_path {path}: .*file is a file; name a folder"):
            options.check_folder("--ckpt_path", str(path))
    monkeypatch.setattr(options.os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="cannot be written to"):
        options.check_folder("--ckpt_path", str(tmp_path / "new"))


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    options.check_file("--plot", str(tmp_path / "a.PNG"), endings=(".png", ".pdf"))
    (tmp_path / "b.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    refused = {
        "a.txt": "must end in .png or .pdf", "b.png": "it is a folder or a device", "no/a.png": "there is no folder",
        f"{'x' * 300}.png": "File name too long", "loop.png": "symbolic links", "pipe.png": "or a device",
    }  # fmt: skip
    for name, why in refused.items():
        with pytest.raises(UsageError, match=f"--plot {tmp_path}/{name}: .*{why}"):
            options.check_file("--plot", str(tmp_path / name), endings=(".png", ".pdf"))
