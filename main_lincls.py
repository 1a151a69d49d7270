"""Linear evaluation: train linear heads on a frozen, pre-trained backbone, and test them on val/.

On a GPU or CPU, and on all GPUs of this machine; with --lr 3 10 30, one head for each on the same features:
    python main_lincls.py --lr 10 --pretrained ckpts/RUN/checkpoint_0199.pth.tar --ckpt_path ckpts/RUN DIR
    torchrun --nproc-per-node=8 main_lincls.py …
Only test a linear checkpoint:
    python main_lincls.py --evaluate --resume ckpts/RUN/model_best_0199.pth.tar DIR
Write the features of val/ for an analysis of one's own, or the backbone for torchvision:
    python main_lincls.py --pretrained ckpts/RUN/checkpoint_0199.pth.tar --features features.npz DIR
    python main_lincls.py --pretrained ckpts/RUN/checkpoint_0199.pth.tar --export-backbone resnet50.pth
"""

import argparse
import copy
import functools
import os
import re
import signal
from collections.abc import Iterable, Mapping
from typing import NamedTuple

if __name__ in ("__main__", "__mp_main__") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends silently; cli_main restores it

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from moco import distributed, options
from moco.data import datasets, folders, loader
from moco.distributed import DistContext
from moco.encoders import DTYPES, arch_name, build_encoder, check_input, configure_device
from moco.errors import UsageError
from moco.evaluation import classifier, released
from moco.evaluation.classifier import LinearHeads
from moco.processes import launch
from moco.processes.exits import cli_main
from moco.training import checkpoint
from moco.training.run import Run, check_resumable, open_folder

PROBE_OPTIONS = (
    "lr", "image_size", "batch_size", "epochs", "start_epoch", "schedule", "momentum", "weight_decay", "precision",
    "strict_fp32",
)  # fmt: skip


class Inputs(NamedTuple):
    """The data, the checkpoints, and what follows from them, as validation found them."""

    train: folders.ImageFolder | None  # None with --evaluate and --features
    val: folders.ImageFolder
    backbone: dict  # of --pretrained; {}: random weights, or those of --resume
    pretraining: dict | None  # the options of the pre-training, where known
    saved: dict  # of --resume; {} for a fresh start
    lock: object  # on --ckpt_path: held while an input of a process


def parse_args() -> argparse.Namespace:
    use = "%(prog)s [options] DIR\nto begin: python %(prog)s --lr 1 10 --pretrained ckpts/RUN DIR"
    parser = options.OptionParser("Train linear heads on a frozen, pre-trained backbone, and test them.", use)
    options.add_data_options(parser, nargs="?")
    # fmt: off
    model = parser.add_argument_group("model")
    model.add_argument("-a", "--arch", type=arch_name, metavar="ARCH",
                       help="as in pre-training; default: that of the checkpoint, else resnet50")
    model.add_argument("--pretrained", default="", metavar="FILE",
                       help="a run's folder, checkpoint, torchvision state_dict or released:NAME; none: random weights")
    model.add_argument("--export-backbone", metavar="FILE",
                       help="write the backbone of --pretrained as a torchvision state_dict, then exit (no DIR needed)")
    model.add_argument("--features", metavar="FILE.npz",
                       help="write features, labels, paths and classes of val/, then exit: no head is trained")
    model.add_argument("--image-size", type=options.positive_int, metavar="S",
                       help="crop size in pixels; default: the checkpoint's, else 224")
    model.add_argument("-e", "--evaluate", action="store_true", help="only test the linear checkpoint of --resume")
    # fmt: on
    options.add_training_options(parser, epochs=100, batch_size=256, lr=[30.0], schedule=[30, 40, 50], weight_decay=0.0)
    options.add_precision_options(parser)
    options.add_output_options(parser, "./ckpts/moco")
    options.add_launch_options(parser)
    args = parser.parse_args()
    if args.data is None and isinstance(args.lr[-1], str):  # --lr 10 DIR, in the published script's order
        args.data = args.lr.pop()
    if not args.lr or any(isinstance(lr, str) for lr in args.lr):
        parser.error(f"argument --lr: {' '.join(map(str, args.lr))!r} is not one or more numbers above 0")
    if args.data is None and not args.export_backbone:
        parser.error("the following arguments are required: DIR")
    if args.export_backbone and (args.features or args.evaluate):
        parser.error("--export-backbone writes the backbone and does nothing else: leave out --features and --evaluate")
    return args


def run_name(pretrained: str) -> str:
    """The E of the file names, by the published rule: the last part of the checkpoint's name, between _ and dot."""
    name = os.path.basename(pretrained).removeprefix(released.SCHEME)
    return name.split("_")[-1].split(".")[0] or "random"


# ---------------------------------------------------------------- checks, before anything is built


def validate_args(args: argparse.Namespace) -> tuple[Inputs, dict]:
    """Refuse what could only fail later. Returns the inputs, and the derived values to print."""
    if args.evaluate and not args.resume:
        raise UsageError("--evaluate needs a trained head: --resume ckpts/RUN/model_best_0199.pth.tar")
    if args.features:
        options.check_file("--features", args.features, endings=(".npz",))
    local_world_size, world_size = launch.resolve_world_size(args)
    launch.check_devices(launch.devices_of(local_world_size, args.gpu), args.precision)
    options.check_folder("--ckpt_path", args.ckpt_path)
    val = folders.list_images(folders.split_path(args.data, "val"))
    train = folders.list_images(folders.split_path(args.data, "train")) if trains(args) else None
    if train and (different := sorted(set(train.classes) ^ set(val.classes))):
        raise UsageError(f"{args.data}: train/ and val/ hold different classes, for example {different[0]}")
    batch_size = options.per_rank(args.batch_size, local_world_size)
    workers = options.workers_per_rank(args.workers, local_world_size)
    derived = {
        "processes": f"{world_size}, with {workers} loader workers each",
        "validation": f"{len(val.paths)} images in {len(val.classes)} classes",
    }
    if left_out := ", ".join(filter(None, (each and each.left_out for each in (train, val)))):
        derived["formats left out"] = left_out
    sampler = None
    if train:
        sampler = loader.GlobalBatchSampler(
            len(train.paths), batch_size, seed=0, ctx=DistContext(world_size=world_size)
        )
        derived |= {
            "training images": sampler.num_images,
            "images per step": sampler.global_batch_size,
            "steps per epoch": len(sampler),
        }
    name = run_name(args.pretrained)
    own = rf"(checkpoint_robust|model_best)_{re.escape(name)}\.pth\.tar"
    own = checkpoint.BEST if os.path.isdir(args.resume) and not trains(args) else own
    lock, saved = open_folder(args, own, probe=name, writes=trains(args))
    pretrained, backbone, origin = load_backbone(args, saved)
    args.image_size = args.image_size or (saved or pretrained).get("image_size", 224)
    if saved:
        check_resume(args, saved, val.classes, sampler, backbone)
        if "wnids" not in saved:
            derived["classes"] = f"the head names none: taken to be the {len(val.classes)} of val/, sorted"
    with torch.device("meta"):
        model = build_encoder(args.arch, len(val.classes)).eval()
    check_input(model, args.arch, batch_size, args.image_size)
    derived |= {"network": args.arch} | ({} if saved else {"backbone": origin})
    known = "options" in pretrained and checkpoint.settings(pretrained, "options", f"--pretrained {args.pretrained}")
    known = known or (pretrained or saved).get("pretraining")  # of a linear checkpoint
    return Inputs(train, val, backbone, known, saved, lock), derived


def trains(args: argparse.Namespace) -> bool:
    return not (args.evaluate or args.features)


def check_resume(
    args: argparse.Namespace, saved: dict, classes: list[str], sampler: loader.GlobalBatchSampler | None, backbone: dict
) -> None:
    """Refuse the linear checkpoint of --resume if it cannot be tested on these classes or its training continued."""
    source = f"--resume {args.resume}"
    classifier.check_linear(saved, source)
    if saved["arch"] != args.arch:
        raise UsageError(f"{source}: it holds a {saved['arch']}, not --arch {args.arch}")
    classifier.check_classes(saved, classes, source)
    own = checkpoint.strip_prefix(saved["state_dict"])
    if different := [name for name, value in backbone.items() if not torch.equal(own.get(name, value), value)]:
        raise UsageError(
            f"{source}: this probe was trained on a different backbone than --pretrained {args.pretrained}"
            f" ({different[0]} differs); it was made from {saved.get('pretrained') or 'an unknown file'}"
        )
    if sampler is None:
        return
    if not {"epoch", "best_acc1", "optimizer"} <= saved.keys():
        raise UsageError(f"{source}: not a linear checkpoint; --resume takes what this script saved")
    lrs = saved.get("lrs", args.lr[:1])
    if sorted(lrs) == sorted(args.lr):
        args.lr = lrs  # a head is known by its rate, in whatever order --lr names them
    elif len(lrs) > 1 or len(args.lr) > 1:
        there, here = (" ".join(f"{lr:g}" for lr in rates) for rates in (lrs, args.lr))
        raise UsageError(f"{source}: it has heads for --lr {there}, this run has {here}; repeat the saved ones")
    older = {"lr": saved.get("lrs"), "image_size": saved.get("image_size")}
    saved.setdefault("probe", {name: value for name, value in older.items() if value})
    parameters = [own[name] for name in checkpoint.FC_KEYS] * len(lrs)
    check_resumable(args, saved, sampler, parameters, "probe", {name: getattr(args, name) for name in PROBE_OPTIONS})


def load_backbone(args: argparse.Namespace, saved: Mapping) -> tuple[dict, dict, str]:
    """The file of --pretrained, its backbone weights, and where in it they were. Sets args.arch if it is not given.

    saved: the checkpoint of --resume, which may name the architecture; {} for none.
    """
    source = f"--pretrained {args.pretrained}"
    pretrained = checkpoint.load(args.pretrained, "--pretrained") if args.pretrained else {}
    known = checkpoint.arch_of(saved, f"--resume {args.resume}") or checkpoint.arch_of(pretrained, source)
    args.arch = args.arch or known or "resnet50"
    if not pretrained:
        return {}, {}, "random weights, a baseline: there is no --pretrained"
    checkpoint.check_values(pretrained, source)
    if pretrained.get("arch", args.arch) != args.arch:
        raise UsageError(f"{source}: it holds a {pretrained['arch']}, not --arch {args.arch}")
    with torch.device("meta"):
        network = build_encoder(args.arch, 1)
    return pretrained, *checkpoint.find_backbone(pretrained, source, network)


# ---------------------------------------------------------------- training


def main_worker(ctx: DistContext, args: argparse.Namespace, inputs: Inputs) -> None:
    """Train the heads in one process, on ctx.device; every way of launching ends here."""
    seed = distributed.resolve_seed(args.seed, inputs.saved)
    configure_device(ctx.device, args.strict_fp32, deterministic=args.seed is not None)

    # --- data: all transforms run in the workers
    batch_size = options.per_rank(args.batch_size, ctx.local_world_size)
    workers = options.workers_per_rank(args.workers, ctx.local_world_size)
    train, name = inputs.train, run_name(args.pretrained)
    transform = datasets.train_transform(args.image_size)
    dataset = datasets.RetryDataset(datasets.ImageList(train.paths, train.labels, transform), train.labels)
    sampler = loader.GlobalBatchSampler(len(dataset), batch_size, seed, ctx)
    train_loader = loader.train_loader(dataset, sampler, workers, ctx.device)
    val_loader = build_val_loader(ctx, args, inputs)

    def prepare(batch: tuple, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The loader's uint8 images and labels → normalised images and labels on the device."""
        return classifier.to_input(batch[0], ctx.device), batch[1].to(ctx.device, non_blocking=True)

    # --- model and optimizer: a frozen backbone and one head per learning rate
    distributed.seed_everything(seed)
    backbone, heads = build_heads(ctx, args, inputs)
    optimizer = build_optimizer(heads, args)
    ddp_heads = distributed.wrap_ddp(heads, ctx.device)
    best_acc1s = inputs.saved.get("best_acc1s", [float(inputs.saved.get("best_acc1", -1))] * len(heads))
    best = classifier.BestHead(best_acc1s, inputs.saved.get("winner", 0))
    run = Run(
        ctx, args, seed, latest=f"checkpoint_robust_{name}.pth.tar", sampler=sampler, optimizer=optimizer,
        state=functools.partial(checkpoint_state, args, inputs, backbone, heads, optimizer, best), probe=name,
    )  # fmt: skip
    run.resume(inputs.saved)
    inputs.saved.clear()  # as much memory as all heads and the backbone
    inputs.backbone.clear()

    def predict(images: torch.Tensor) -> torch.Tensor:  # logits (heads, N, classes)
        return heads(classifier.extract_features(backbone, images, DTYPES[args.precision]))

    # --- epochs
    hint = ""  # on heads that diverged, printed once
    for epoch in range(run.epoch, args.epochs):
        adjust_learning_rate(optimizer, epoch, args)
        train_one_epoch(backbone, ddp_heads, run.steps(train_loader, prepare, epoch), optimizer, run)
        stats = run.epoch_stats()
        if not hint and (hint := classifier.divergence_hint(args.lr, stats["loss"], len(train.classes))):
            run.print(hint)
        with run.evaluation():
            results = classifier.evaluate(predict, val_loader, ctx.device)
        is_best = best.update(results)
        by_lr = "".join(f"  {lr:g}: {result['acc1']:.2f}" for lr, result in zip(args.lr, results))
        several = f"  by lr{by_lr}" if len(args.lr) > 1 else ""
        run.print(f"epoch {epoch}  {accuracy_line(results[best.winner])}  best {max(best.acc1s):.2f} %{several}")
        stats |= {f"val_{name}": [result[name] for result in results] for name in ("acc1", "acc5")}
        run.end_epoch(stats, [f"model_best_{name}.pth.tar"] if is_best else [])
    distributed.barrier()  # wait for rank 0 to finish saving


def train_one_epoch(
    backbone: nn.Module, ddp_heads: nn.Module, batches: Iterable, optimizer: torch.optim.Optimizer, run: Run
) -> None:
    for inputs, labels in batches:
        logits = ddp_heads(classifier.extract_features(backbone, inputs, DTYPES[run.args.precision]))
        losses = [F.cross_entropy(own, labels) for own in logits]  # their sum: no head sees another's gradient
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        accuracies = [classifier.correct_counts(own, labels, ks=(1,))[0] * (100 / len(labels)) for own in logits]
        run.after_step(loss=torch.stack(losses), acc1=torch.stack(accuracies))


def evaluate_only(ctx: DistContext, args: argparse.Namespace, inputs: Inputs) -> None:
    """Test the best head of --resume on val/, and write the features there if --features asks for them."""
    configure_device(ctx.device, args.strict_fp32, deterministic=args.seed is not None)
    backbone, heads = build_heads(ctx, args, inputs)
    share = [torch.zeros(0, heads[0].in_features)]  # this rank's features; it may have no image

    def predict(images: torch.Tensor) -> torch.Tensor:
        found = classifier.extract_features(backbone, images, DTYPES[args.precision])
        if args.features:
            share.append(found.cpu())
        return heads(found)

    (result,) = classifier.evaluate(predict, build_val_loader(ctx, args, inputs), ctx.device)
    weights = args.resume or args.pretrained or "a random backbone"
    if broken := result["not_finite"]:
        raise UsageError(f"{weights}: its outputs are not finite for {broken} of {result['n']} images; use another")
    if distributed.is_main() and inputs.saved:
        print(accuracy_line(result), flush=True)
    if args.features:
        found = distributed.gather_in_order(torch.cat(share).to(ctx.device)).cpu()
        if distributed.is_main():
            classifier.save_features(args.features, found, inputs.val)
            print(f"wrote {args.features}: features {tuple(found.shape)} of {args.data}/val by {weights}", flush=True)


def build_heads(ctx: DistContext, args: argparse.Namespace, inputs: Inputs) -> tuple[nn.Module, LinearHeads]:
    """The backbone without `fc`, frozen and in eval mode, and one head per learning rate (one if none is trained).

    A resumed head keeps its number of outputs, 1000 in published files.
    """
    source, saved = f"--resume {args.resume}", inputs.saved
    outputs = checkpoint.num_outputs(saved, source) if saved else len(inputs.val.classes)
    model = classifier.build_probe(args.arch, outputs, inputs.backbone)
    if saved:
        checkpoint.load_exactly(model, checkpoint.strip_prefix(saved["state_dict"]), source)
    heads = LinearHeads(copy.deepcopy(model.fc) for _ in (args.lr if trains(args) else [None]))
    if "heads" in saved and trains(args):
        heads.load_state_dict(saved["heads"])
    model.fc = nn.Identity()
    model.eval()  # in train mode BatchNorm would adapt to the labelled data
    return model.to(ctx.device, memory_format=torch.channels_last), heads.to(ctx.device)


def build_optimizer(heads: LinearHeads, args: argparse.Namespace) -> torch.optim.SGD:
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, args.lr)]
    return torch.optim.SGD(groups, momentum=args.momentum, weight_decay=args.weight_decay)


def build_val_loader(ctx: DistContext, args: argparse.Namespace, inputs: Inputs) -> Iterable:
    batch_size = options.per_rank(args.batch_size, ctx.local_world_size)
    workers = options.workers_per_rank(args.workers, ctx.local_world_size)
    dataset = datasets.ImageList(inputs.val.paths, inputs.val.labels, datasets.eval_transform(args.image_size))
    return loader.eval_loader(dataset, batch_size, workers, ctx)


def adjust_learning_rate(optimizer: torch.optim.Optimizer, epoch: int, args: argparse.Namespace) -> None:
    """A tenth from each epoch of --schedule on."""
    for group, lr in zip(optimizer.param_groups, args.lr):
        group["lr"] = lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


# ---------------------------------------------------------------- results, checkpoints, terminal


def checkpoint_state(
    args: argparse.Namespace, inputs: Inputs, backbone: nn.Module, heads: LinearHeads,
    optimizer: torch.optim.Optimizer, best: classifier.BestHead,
) -> dict:  # fmt: skip
    """The script's part of a checkpoint: all heads, and the last epoch's winner as the published script saves it."""
    winner = dict(zip(checkpoint.FC_KEYS, heads[best.winner].state_dict().values()))
    return {
        "arch": args.arch,
        "state_dict": checkpoint.add_prefix({**backbone.state_dict(), **winner}),
        "best_acc1": torch.tensor(max(0.0, *best.acc1s)),
        "optimizer": checkpoint.optimizer_of_group(optimizer.state_dict(), best.winner),
        "wnids": inputs.val.classes,
        "image_size": args.image_size,
        "lrs": args.lr,
        "best_acc1s": best.acc1s,
        "winner": best.winner,
        "heads": heads.state_dict(),
        "optimizers": optimizer.state_dict(),
        "pretrained": args.pretrained,
        "pretraining": inputs.pretraining,
        "probe": {name: getattr(args, name) for name in PROBE_OPTIONS},
    }


def accuracy_line(result: Mapping) -> str:
    return f"val: top-1 {result['acc1']:.2f} %  top-5 {result['acc5']:.2f} %  of {result['n']} images"


def export_backbone(args: argparse.Namespace) -> None:
    """Write the backbone of --pretrained with torchvision's key names; load it with strict=False."""
    if not args.pretrained:
        raise UsageError("--export-backbone needs --pretrained, the checkpoint whose backbone to write")
    options.check_file("--export-backbone", args.export_backbone)
    _, weights, origin = load_backbone(args, {})
    if args.dry_run:
        return options.print_config(args, {"network": args.arch, "backbone": origin})
    if launch.is_main(args):
        checkpoint.save(args.export_backbone, weights)
        print(f"wrote {args.export_backbone}, a {args.arch}: {origin}")


def main() -> None:
    args = parse_args()
    args.pretrained = released.local_path(args.pretrained)
    if args.export_backbone:
        return export_backbone(args)
    inputs, derived = validate_args(args)
    worker = main_worker if trains(args) else evaluate_only
    if trains(args) or args.dry_run:
        options.print_config(args, derived)
    if args.dry_run:
        return
    agree = options.shared_options(args, ("evaluate", "features", "image_size")) | {
        "the training images": len(inputs.train.paths) if inputs.train else 0,
        "the validation images": len(inputs.val.paths),
        "the class list": inputs.val.classes,
        "the images per step": derived.get("images per step"),
        "the checkpoint of --resume": [inputs.saved.get(name) for name in ("epoch", "step")],
    }
    launch.launch(worker, args, inputs, agree)


if __name__ == "__main__":
    cli_main(main)
