"""Pre-train MoCo with non-semantic negatives (Ge et al., NeurIPS 2021).

Single process, on a GPU or CPU:
    python moco-non-sem-neg.py --batch-size 128 --mlp --moco-t 0.2 --aug-plus --cos --moco-k 16384 --alpha 2 \\
      --patch-ratio 16 72 --ckpt_path ckpts/RUN DIR
All GPUs of this machine:
    python moco-non-sem-neg.py --multiprocessing-distributed --world-size 1 --rank 0 … DIR
    torchrun --nproc-per-node=8 moco-non-sem-neg.py … DIR
Two machines (use --rank 1 on the second):
    python moco-non-sem-neg.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://FIRST:10001 … DIR
"""

import argparse
import functools
import math
import os
import signal
from collections.abc import Iterable
from typing import NamedTuple

if __name__ in ("__main__", "__mp_main__") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends silently; cli_main restores it

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from moco import augment, distributed, memory, options, views
from moco.builder import MoCo
from moco.data import folders, images, loader
from moco.data.datasets import RetryDataset, TwoCrops
from moco.data.folders import TrainingImages
from moco.data.loader import GlobalBatchSampler
from moco.distributed import DistContext
from moco.encoders import ARCHS, DTYPES, build_encoder, configure_cudnn
from moco.errors import Finished, UsageError
from moco.evaluation import knn
from moco.processes import environment, launch
from moco.processes.environment import is_main
from moco.processes.exits import cli_main
from moco.processes.signals import StopSignal
from moco.training import checkpoint, files, metrics
from moco.training.files import Claim
from moco.training.run import Run, check_unused

ROBUST_ALIASES = {"patch": "patch", "nonsem": "patch", "texture": "texture", "texture_syn": "texture", "none": "none"}
SAVED_OPTIONS = (
    "moco_dim", "moco_k", "moco_m", "moco_t", "mlp", "aug_plus", "robust", "num_nonsem", "alpha",
    "patch_ratio", "image_size", "batch_size", "lr", "epochs", "cos", "schedule", "precision",
)  # fmt: skip


CHECKPOINTS = r"checkpoint_(\d{4,}|latest)\.pth\.tar"


class Inputs(NamedTuple):
    """What validation found: the data, and the checkpoint of --resume."""

    train: TrainingImages
    knn: tuple[folders.ImageFolder, ...] | None  # train/ and val/ with --knn, if there is a val/ with the same classes
    saved: dict  # {} for a fresh start
    claim: Claim  # of --ckpt_path
    memory: dict[str, int]  # bytes that a process needs, by part
    derived: dict  # values to print


def parse_args() -> argparse.Namespace:
    parser = options.OptionParser("Pre-train MoCo with non-semantic negatives (NS).")
    options.add_data_options(parser)
    # fmt: off
    model = parser.add_argument_group("model")
    model.add_argument("-a", "--arch", choices=ARCHS, metavar="ARCH",
                       help="encoder: resnet10 or a torchvision model with a final fc; default: that of --resume, else"
                       " resnet50")
    model.add_argument("--moco-dim", default=128, type=options.positive_int, metavar="C", help="feature dimension")
    model.add_argument("--moco-k", default=65536, type=options.positive_int, metavar="K", help="queue length")
    model.add_argument("--moco-m", default=0.999, type=options.unit_float, metavar="M",
                       help="momentum of the key encoder")
    model.add_argument("--moco-t", default=0.07, type=options.positive_float, metavar="T", help="softmax temperature")
    model.add_argument("--mlp", action="store_true", help="two-layer head (MoCo v2)")
    negative = parser.add_argument_group("non-semantic negatives")
    negative.add_argument("--robust", default="patch", choices=ROBUST_ALIASES, metavar="NS",
                          help="patch (nonsem), texture (texture_syn) or none")
    negative.add_argument("--num-nonsem", default=1, type=options.nonnegative_int, metavar="N",
                          help="NS per query; 0: plain MoCo")
    negative.add_argument("--alpha", default=1.0, type=options.nonnegative_float, metavar="A",
                          help="multiplies the similarity to the NS")
    negative.add_argument("--patch-ratio", default=(16, 56), nargs=2, type=options.positive_int, metavar=("LO", "HI"),
                          help="patch sizes, pixels of the crop")
    negative.add_argument("--patch-size", default=32, type=int, metavar="N", help="ignored, as in the published code")
    crops = parser.add_argument_group("views")
    crops.add_argument("--aug-plus", action="store_true", help="MoCo v2's augmentation instead of v1's")
    crops.add_argument("--image-size", default=224, type=options.positive_int, metavar="S", help="crop size in pixels")
    crops.add_argument("--preview", metavar="FILE.png", help="draw queries, keys and their NS, then exit")
    training = options.add_training_options(parser, epochs=200, batch_size=256, lr=0.03, schedule=[120, 160],
                                            weight_decay=1e-4)
    training.add_argument("--cos", action="store_true", help="half-cosine learning rate instead of --schedule")
    speed = options.add_precision_options(parser)
    speed.add_argument("--compile", action="store_true", help="compile the encoders; a CPU needs a C++ compiler")
    output = options.add_output_options(parser, "./ckpts/moco")
    output.add_argument("--save-freq", default=10, type=options.positive_int, metavar="N",
                        help="epochs between numbered checkpoints")
    output.add_argument("--keep", type=options.positive_int, metavar="N",
                        help="numbered checkpoints to keep; default: all")
    output.add_argument("--knn", action="store_true", help="log the 200-nearest-neighbour top-1 on val/")
    output.add_argument("--knn-freq", default=10, type=options.positive_int, metavar="E",
                        help="epochs between kNN evaluations")
    # fmt: on
    options.add_launch_options(parser)
    args = parser.parse_args()
    args.robust = ROBUST_ALIASES[args.robust] if args.num_nonsem else "none"
    if args.robust == "none":
        args.num_nonsem = 0
    args.auto_resume = args.resume == "auto" or environment.restarted()
    if environment.restarted():
        args.resume = checkpoint.resume_path("auto", args.ckpt_path, CHECKPOINTS) or args.resume
    args.resume = checkpoint.resume_path(args.resume, args.ckpt_path, CHECKPOINTS)
    return args


# ---------------------------------------------------------------- checks, before anything is built


def validate_args(args: argparse.Namespace) -> Inputs:
    """Refuse what could only fail later."""
    low, high = args.patch_ratio
    if args.robust == "patch" and not low <= high <= args.image_size:
        raise UsageError(
            f"--patch-ratio {low} {high}: needs LO <= HI <= {args.image_size}, the crop size; for example 16 72 at"
            " 224 px"
        )
    if args.robust == "texture" and args.num_nonsem != 1:
        raise UsageError(f"--num-nonsem {args.num_nonsem}: there is one texture per photo; with --robust texture use 1")
    options.check_epochs(args)
    output = files.of_folder("--ckpt_path", args.ckpt_path)  # before anything in it is read
    saved = checkpoint.load(args.resume) if args.resume else {}
    args.arch = args.arch or checkpoint.arch_of(saved, f"--resume {args.resume}") or "resnet50"
    local_world_size, world_size = launch.resolve_world_size(args)
    if args.preview:
        options.check_file("--preview", args.preview, endings=(".png", ".jpg", ".jpeg"))
    options.check_folder("--ckpt_path", args.ckpt_path)
    if not args.preview:
        check_unused(args.ckpt_path, args.resume, CHECKPOINTS, probe=None)
    data = folders.list_training_images(args.data, with_textures=args.robust == "texture")
    batch_size = options.per_rank(args.batch_size, local_world_size)
    sampler = GlobalBatchSampler(len(data.photos), batch_size, seed=0, ctx=DistContext(world_size=world_size))
    devices = launch.devices_of(local_world_size, args.gpu)
    launch.check_options(devices, args.precision, args.compile)
    needed = memory.required(
        functools.partial(build_model, args, torch.float32),
        args.arch,
        batch_size,
        args.image_size,
        crops=2 + args.num_nonsem,
        itemsize=DTYPES[args.precision].itemsize,
    )
    if saved:
        check_resume(args, saved, data, sampler)
    workers = options.workers_per_rank(args.workers, local_world_size)
    derived = {
        "processes": f"{world_size}, with {workers} loader workers each",
        "images": f"{len(data.photos)} in {folders.count_classes(args.data, data.classes)}",
        "images per step": sampler.global_batch_size,
        "steps per epoch": len(sampler),
        "chance loss": f"{math.log(1 + args.moco_k + args.num_nonsem):.3f}",
        "memory": memory.check_memory(needed, devices[0], processes=local_world_size),
    }
    return Inputs(data, list_knn_folders(args, data) if args.knn else None, saved, output, needed, derived)


def check_resume(args: argparse.Namespace, saved: dict, data: TrainingImages, sampler: GlobalBatchSampler) -> None:
    """Refuse the checkpoint of --resume if this run cannot continue it."""
    source = f"--resume {args.resume}"
    checkpoint.check_pretraining(saved, source, vars(args), data.classes)
    checkpoint.check_data_order(saved, source, args.seed, sampler.num_images, sampler.global_batch_size)
    state = checkpoint.strip_prefix(saved["state_dict"])
    with torch.device("meta"):
        model = build_model(args, torch.float32)
    checkpoint.check_exactly(model, state, source)
    checkpoint.check_finite(state, source)
    if saved.get("optimizer", {}) != {}:  # published files may come without one
        checkpoint.check_optimizer(saved["optimizer"], source, list(model.parameters()))
    if saved["epoch"] >= args.epochs:
        message = f"{source}: already finished ({saved['epoch']} epochs); use a larger --epochs to continue"
        raise Finished(message) if args.auto_resume else UsageError(message)


# ---------------------------------------------------------------- training


def main_worker(ctx: DistContext, args: argparse.Namespace, inputs: Inputs) -> None:
    """Pre-train in one process, on ctx.device; every way of launching ends here."""
    stop = StopSignal()
    inputs.claim.take()
    if distributed.is_main():
        print_start(args, inputs)
    memory.keep_freed_memory(ctx.device)
    memory.check_free(inputs.memory, ctx.device)
    data, saved = inputs.train, inputs.saved
    seed = distributed.resolve_seed(args.seed, saved, ctx.device)
    configure_cudnn(args.strict_fp32, deterministic=args.seed is not None)

    # --- data: the workers decode and crop; augmentation runs on the training device
    batch_size = options.per_rank(args.batch_size, ctx.local_world_size)  # this process's; the option is the node's
    workers = options.workers_per_rank(args.workers, ctx.local_world_size)
    dataset = RetryDataset(TwoCrops(data.photos, args.image_size, data.textures), data.labels)
    sampler = GlobalBatchSampler(len(dataset), batch_size, seed, ctx)
    train_loader = loader.train_loader(dataset, sampler, workers, ctx.device)
    prepare = functools.partial(make_views, args=args, device=ctx.device)  # crops → query, key, negatives
    knn_loaders = knn.loaders(inputs.knn or (), args.image_size, batch_size, workers, ctx)

    # --- model and optimizer
    distributed.seed_everything(seed)  # the same on every rank: weights and queue start equal
    model = build_model(args, DTYPES[args.precision]).to(ctx.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(ctx.device.type, enabled=args.precision == "fp16")
    if saved:
        checkpoint.load_exactly(model, checkpoint.strip_prefix(saved["state_dict"]), f"--resume {args.resume}")
    state = functools.partial(checkpoint_state, args, model, data.classes)
    run = Run(
        ctx, args.ckpt_path, latest="checkpoint_latest.pth.tar", state=state, stop=stop, sampler=sampler,
        optimizer=optimizer, scaler=scaler, modules=[model], paths=data.photos, seed=seed, epochs=args.epochs,
        precision=args.precision, print_freq=args.print_freq, save_steps=args.save_steps,
        max_bad_images=args.max_bad_images,
    )  # fmt: skip
    run.resume(saved, args.start_epoch)  # optimizer, scaler, epoch and step; the model was loaded above
    saved.clear()  # as much memory as weights, queue and momenta
    if args.compile:
        model.encoder_q.compile()
        model.encoder_k.compile()
    ddp_model = distributed.wrap_ddp(model, ctx.device)

    # --- epochs
    for epoch in range(run.epoch, args.epochs):
        adjust_learning_rate(optimizer, epoch, args)
        train_one_epoch(ddp_model, model, run.steps(train_loader, prepare, epoch), optimizer, scaler, run)
        stats = run.epoch_stats()
        if knn_loaders and is_due(epoch, args.knn_freq, args.epochs) and not run.stopping:
            with run.evaluation():
                stats["knn_top1"] = knn.accuracy(model.encoder_q, *knn_loaders, len(data.classes), ctx.device)
            run.print(f"epoch {epoch}  val: 200-nearest-neighbour top-1 {stats['knn_top1']:.2f} %")
        numbered = is_due(epoch, args.save_freq, args.epochs)
        run.end_epoch(stats, [f"checkpoint_{epoch:04d}.pth.tar"] if numbered else [])
        if args.keep and distributed.is_main():
            checkpoint.prune(args.ckpt_path, args.keep, r"checkpoint_\d{4,}\.pth\.tar")
    distributed.barrier()  # wait for rank 0 to finish saving


def shared_values(args: argparse.Namespace, inputs: Inputs) -> dict:
    """The values that must be equal in all processes of the run."""
    values = {f"--{name.replace('_', '-')}": getattr(args, name) for name in ("arch", "seed", *SAVED_OPTIONS)}
    return values | {
        "images per process": options.per_rank(args.batch_size, launch.resolve_world_size(args)[0]),
        "training images": len(inputs.train.photos),
        "kNN images": [len(folder.paths) for folder in inputs.knn or ()],
        "the class list": inputs.train.classes,
        "the checkpoint of --resume": (inputs.saved.get("epoch"), inputs.saved.get("step")),
    }


def train_one_epoch(
    ddp_model: nn.Module,
    model: MoCo,
    batches: Iterable,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    run: Run,
) -> None:
    ddp_model.train()
    for query, key, negatives in batches:
        logits, labels = ddp_model(query, key, negatives)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        accuracy = metrics.correct_counts(logits, labels, ks=(1,))[0] * (100 / len(labels))
        run.after_step(loss=loss, contrast_acc=accuracy, **model.similarities)


def build_model(args: argparse.Namespace, dtype: torch.dtype) -> MoCo:
    encoder = functools.partial(build_encoder, args.arch)
    return MoCo(encoder, args.moco_dim, args.moco_k, args.moco_m, args.moco_t, args.mlp, args.alpha, dtype)


def build_optimizer(model: MoCo, args: argparse.Namespace) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    for weight in model.encoder_q.parameters():
        # Fused SGD leaves them uninitialised if the scaler skips the first step.
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def adjust_learning_rate(optimizer: torch.optim.Optimizer, epoch: int, args: argparse.Namespace) -> None:
    """Half a cosine over all epochs, or a tenth from each epoch of --schedule on."""
    lr = args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
    if args.cos:
        lr = args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    for group in optimizer.param_groups:
        group["lr"] = lr


def is_due(epoch: int, freq: int, epochs: int) -> bool:
    """Every `freq` epochs and after the last."""
    return (epoch + 1) % freq == 0 or epoch + 1 == epochs


# ---------------------------------------------------------------- data, checkpoints, terminal


def make_views(
    crops: torch.Tensor, rng: np.random.Generator, args: argparse.Namespace, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """The loader's uint8 crops → query, key and negatives on the device."""
    crops = crops.to(device, non_blocking=True)
    recipe = augment.V2 if args.aug_plus else augment.V1
    return views.training_views(
        crops, rng, recipe=recipe, robust=args.robust, num_nonsem=args.num_nonsem, patch_ratio=args.patch_ratio
    )


def list_knn_folders(args: argparse.Namespace, data: TrainingImages) -> tuple[folders.ImageFolder, ...] | None:
    """The photos of train/ and val/; None if there is no val/ with the same classes. UsageError for a single class."""
    if len(data.classes) < 2:
        raise UsageError(
            f"--knn needs labels: the images of {args.data}/train are one class, and any guess is right; leave out"
            " --knn, or make one folder of images per class"
        )
    root = folders.photo_root(args.data) if args.robust == "texture" else args.data
    if not os.path.isdir(os.path.join(root, "val")):
        return None
    val = folders.list_images(os.path.join(root, "val"))
    return (folders.ImageFolder(data.photos, data.labels, data.classes), val) if val.classes == data.classes else None


def checkpoint_state(args: argparse.Namespace, model: MoCo, classes: list[str]) -> dict:
    """What a checkpoint holds besides the state of the run."""
    return {
        "arch": args.arch,
        "state_dict": checkpoint.add_prefix(model.state_dict()),
        "image_size": args.image_size,
        "classes": classes,
        "options": {name: getattr(args, name) for name in SAVED_OPTIONS},
    }


def print_start(args: argparse.Namespace, inputs: Inputs) -> None:
    options.print_config(args, inputs.derived, args.verbose)
    if inputs.train.unmatched:
        print(f"photos skipped because they have no texture: {inputs.train.unmatched}")
    if args.knn and not inputs.knn:
        print(f"--knn is skipped: {args.data} has no val/ with the same classes")
    if inputs.saved and not inputs.saved.get("optimizer"):
        print(f"--resume {args.resume} has no optimizer: the momenta start at zero")
    if args.patch_size != 32:
        print("--patch-size is ignored; --patch-ratio sets the patch sizes")
    if not images.has_fast_jpeg():
        print(images.NO_FAST_JPEG)


def save_preview(args: argparse.Namespace, data: TrainingImages) -> None:
    """Draw the views of up to eight training images."""
    seed = distributed.resolve_seed(args.seed, {}, torch.device("cpu"))
    dataset = RetryDataset(TwoCrops(data.photos, args.image_size, data.textures), data.labels)
    sampler = GlobalBatchSampler(len(dataset), min(8, args.batch_size, len(dataset)), seed, DistContext())
    crops, _ = next(iter(loader.train_loader(dataset, sampler, 0, torch.device("cpu"))))
    rng = distributed.derive_rng(seed, 0, 0, 0)
    views.save_views(args.preview, *make_views(crops, rng, args, torch.device("cpu")), title=f"{args.robust} negative")
    print(f"wrote {args.preview}")


def main() -> None:
    args = parse_args()
    inputs = validate_args(args)
    if args.dry_run:
        return options.print_dry_run(args, inputs.derived)
    if args.preview:
        return save_preview(args, inputs.train) if is_main() else None
    launch.launch(main_worker, args, inputs, shared_values(args, inputs))


if __name__ == "__main__":
    cli_main(main)
