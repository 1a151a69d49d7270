"""Pre-train MoCo with non-semantic negatives (Ge et al., NeurIPS 2021).

On a GPU or CPU, and on all GPUs of this machine:
    python moco-non-sem-neg.py --recipe paper --ckpt_path ckpts/RUN DIR
    torchrun --nproc-per-node=8 moco-non-sem-neg.py --recipe paper --ckpt_path ckpts/RUN DIR
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

from moco import augment, distributed, options, plot, views
from moco.builder import MoCo
from moco.data import datasets, folders, loader
from moco.distributed import DistContext
from moco.encoders import DTYPES, arch_name, build_encoder, check_input, configure_device
from moco.errors import UsageError
from moco.evaluation import knn
from moco.negatives import NEGATIVES, PUBLISHED_NAMES
from moco.processes import launch
from moco.processes.exits import cli_main
from moco.training import checkpoint
from moco.training.run import Run, check_resumable, open_folder

SAVED_OPTIONS = (
    "moco_dim", "moco_k", "moco_m", "moco_t", "mlp", "aug_plus", "robust", "num_nonsem", "alpha",
    "patch_ratio", "image_size", "batch_size", "lr", "epochs", "start_epoch", "cos", "schedule", "momentum",
    "weight_decay", "precision", "strict_fp32",
)  # fmt: skip


class Inputs(NamedTuple):
    """The data and the checkpoint of --resume, as validation found them."""

    train: folders.TrainingImages
    knn: tuple[folders.ImageFolder, ...]  # train/ and val/ with --knn; empty if there is no val/ with the same classes
    saved: dict  # {} for a fresh start
    lock: object  # on --ckpt_path: held while an input of a process


def parse_args() -> argparse.Namespace:
    use = "%(prog)s [options] DIR\nto begin: python %(prog)s --recipe paper --preview views.png DIR"
    parser = options.OptionParser("Pre-train MoCo with non-semantic negatives (NS).", use)
    options.add_data_options(parser)
    # fmt: off
    parser.add_argument("--recipe", choices=["paper"],
                        help="defaults of the paper's + Patch row, K and patches fitted to the data and the crop")
    model = parser.add_argument_group("model")
    model.add_argument("-a", "--arch", type=arch_name, metavar="ARCH",
                       help="encoder: resnet10 or a torchvision model with a final fc; default: that of --resume, else"
                       " resnet50")
    model.add_argument("--moco-dim", default=128, type=options.positive_int, metavar="C", help="feature dimension")
    model.add_argument("--moco-k", default=65536, type=options.positive_int, metavar="K",
                       help="queue length, about an eighth of the images")
    model.add_argument("--moco-m", default=0.999, type=options.unit_float, metavar="M",
                       help="momentum of the key encoder")
    model.add_argument("--moco-t", default=0.07, type=options.positive_float, metavar="T", help="softmax temperature")
    model.add_argument("--mlp", action=argparse.BooleanOptionalAction, default=False, help="two-layer head (MoCo v2)")
    negative = parser.add_argument_group("non-semantic negatives")
    negative.add_argument("--robust", default="patch", choices=[*NEGATIVES, "none", *PUBLISHED_NAMES], metavar="NS",
                          help=f"{', '.join(NEGATIVES)} or none; published names: {', '.join(PUBLISHED_NAMES)}")
    negative.add_argument("--num-nonsem", default=1, type=options.nonnegative_int, metavar="N",
                          help="NS per query; 0: plain MoCo")
    negative.add_argument("--alpha", default=1.0, type=options.nonnegative_float, metavar="A",
                          help="multiplies the similarity to the NS")
    negative.add_argument("--patch-ratio", nargs=2, type=options.positive_int, metavar=("LO", "HI"),
                          help="patch sizes, pixels of the crop; default: 16 56 at 224, and in proportion")
    negative.add_argument("--patch-size", default=32, type=int, metavar="N", help="ignored, as in the published code")
    crops = parser.add_argument_group("views")
    crops.add_argument("--aug-plus", action=argparse.BooleanOptionalAction, default=False,
                       help="MoCo v2's augmentation instead of v1's")
    crops.add_argument("--image-size", default=224, type=options.positive_int, metavar="S", help="crop size in pixels")
    crops.add_argument("--preview", metavar="FILE.png", help="draw queries, keys and their NS, then exit")
    training = options.add_training_options(parser, epochs=200, batch_size=256, lr=0.03, schedule=[120, 160],
                                            weight_decay=1e-4)
    training.add_argument("--cos", action=argparse.BooleanOptionalAction, default=False,
                          help="half-cosine learning rate instead of --schedule")
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
    args = parser.parse_args(recipes={"paper": options.PAPER | {"moco_k": None}})
    args.defaults["patch_ratio"] = options.PATCHES
    recipe, args.scaled = vars(args).pop("recipe"), not args.patch_ratio and args.image_size != 224
    args.patch_ratio = args.patch_ratio or options.patch_sizes(recipe, args.image_size)
    args.robust = PUBLISHED_NAMES.get(args.robust, args.robust) if args.num_nonsem else "none"
    args.num_nonsem *= args.robust != "none"
    return args


# ---------------------------------------------------------------- checks, before anything is built


def validate_args(args: argparse.Namespace) -> tuple[Inputs, dict]:
    """Refuse what could only fail later. Returns the inputs, and the derived values to print."""
    if refusal := args.robust in NEGATIVES and NEGATIVES[args.robust].refusal(vars(args)):
        raise UsageError(refusal)
    local_world_size, world_size = launch.resolve_world_size(args)
    launch.check_devices(launch.devices_of(local_world_size, args.gpu), args.precision)
    options.check_folder("--ckpt_path", args.ckpt_path)
    if args.preview:
        options.check_file("--preview", args.preview, endings=(".png", ".jpg", ".jpeg"))
    data = folders.list_training_images(args.data, with_textures=needs_texture(args))
    args.moco_k = args.moco_k or options.queue_length(len(data.photos))
    if args.preview and not args.dry_run:  # however few images there are: nothing of what follows is used
        return Inputs(data, (), {}, None), {}
    knn_folders = list_knn_folders(args, data) if args.knn else ()
    batch_size = options.per_rank(args.batch_size, local_world_size)
    sampler = loader.GlobalBatchSampler(len(data.photos), batch_size, seed=0, ctx=DistContext(world_size=world_size))
    lock, saved = open_folder(args, checkpoint.PRETRAINING, writes=not args.preview)
    args.arch = args.arch or checkpoint.arch_of(saved, f"--resume {args.resume}") or "resnet50"
    with torch.device("meta"):
        model = build_model(args, torch.float32)
    check_input(model.encoder_q, args.arch, batch_size, args.image_size)
    if saved:
        check_resume(args, saved, model, data, sampler)
    workers = options.workers_per_rank(args.workers, local_world_size)
    flat = data.classes == [folders.FLAT] and not os.path.isdir(os.path.join(args.data, "train", folders.FLAT))
    inputs = Inputs(data, knn_folders, saved, lock)
    return inputs, {
        "processes": f"{world_size}, with {workers} loader workers each",
        "images": f"{len(data.photos)} in "
        + ("1 class, as there are no class folders" if flat else f"{len(data.classes)} classes"),
        "images per step": sampler.global_batch_size,
        "steps per epoch": len(sampler),
        "chance loss": f"{math.log(1 + args.moco_k + args.num_nonsem):.3f}",  # of features that tell nothing apart
        **notes(args, inputs),
    }


def notes(args: argparse.Namespace, inputs: Inputs) -> dict[str, str]:
    """Settings that were derived, are left out, or will hardly work: {name: text}."""
    found, images = {}, len(inputs.train.photos)
    if args.robust == "patch" and args.scaled:
        found["patches"] = "{} to {} px, in proportion to the crop".format(*args.patch_ratio)
    elif args.robust == "patch" and args.patch_ratio[1] > args.image_size / 2:
        sizes = "{} {}".format(*options.patch_sizes("paper", args.image_size))
        found["patches"] = f"above half the crop they show whole objects: try --patch-ratio {sizes}"
    if args.moco_k > images:
        fitting = options.queue_length(images)
        found["queue"] = f"{args.moco_k} keys of {images} images, their own negatives: try --moco-k {fitting}"
    if all(getattr(args, name) == args.defaults[name] for name in ("mlp", "aug_plus", "cos", "moco_t", "alpha")):
        found["recipe"] = "published defaults (alpha 1, T 0.07, no MLP, v1 views, steps); the paper's: --recipe paper"
    if inputs.train.left_out:
        found["formats left out"] = inputs.train.left_out
    if inputs.train.unmatched:
        found["photos without a texture"] = f"left out, {inputs.train.unmatched}"
    if args.knn and not inputs.knn:
        found["knn"] = f"skipped: {args.data} has no val/ with the same classes"
    if inputs.saved and not inputs.saved.get("optimizer"):
        found["optimizer"] = f"--resume {args.resume} has none: the momenta start at zero"
    if args.patch_size != 32:
        found["patch size"] = "ignored; --patch-ratio sets the sizes"
    return found


def check_resume(
    args: argparse.Namespace, saved: dict, model: MoCo, data: folders.TrainingImages, sampler: loader.GlobalBatchSampler
) -> None:
    """Refuse the checkpoint of --resume if this run cannot continue it. model: on the meta device."""
    source = f"--resume {args.resume}"
    checkpoint.check_pretraining(saved, source, vars(args))
    checkpoint.check_exactly(model, checkpoint.strip_prefix(saved["state_dict"]), source)
    settings = {name: getattr(args, name) for name in SAVED_OPTIONS} | {"classes": data.classes}
    check_resumable(args, saved, sampler, list(model.parameters()), "options", settings)


def list_knn_folders(args: argparse.Namespace, data: folders.TrainingImages) -> tuple[folders.ImageFolder, ...]:
    """The photos of train/ and val/; () if there is no val/ with the same classes. UsageError for a single class."""
    if len(data.classes) < 2:
        raise UsageError(f"--knn needs labels: {args.data}/train is one class; leave out --knn, or make folders")
    root = str(folders.photo_root(args.data) if needs_texture(args) else args.data)
    val = folders.list_images(folders.split_path(root, "val")) if os.path.isdir(f"{root}/val") else None
    if val is None or val.classes != data.classes:
        return ()
    return folders.ImageFolder(data.photos, data.labels, data.classes), val


def needs_texture(args: argparse.Namespace) -> bool:
    return args.robust in NEGATIVES and NEGATIVES[args.robust].needs_texture


# ---------------------------------------------------------------- training


def main_worker(ctx: DistContext, args: argparse.Namespace, inputs: Inputs) -> None:
    """Pre-train in one process, on ctx.device; every way of launching ends here."""
    seed = distributed.resolve_seed(args.seed, inputs.saved)
    configure_device(ctx.device, args.strict_fp32, deterministic=args.seed is not None)

    # --- data: the workers decode and crop; augmentation runs on the training device
    data, saved = inputs.train, inputs.saved
    batch_size = options.per_rank(args.batch_size, ctx.local_world_size)  # this process's; the option is the node's
    workers = options.workers_per_rank(args.workers, ctx.local_world_size)
    dataset = datasets.RetryDataset(datasets.TwoCrops(data.photos, args.image_size, data.textures), data.labels)
    sampler = loader.GlobalBatchSampler(len(dataset), batch_size, seed, ctx)
    train_loader = loader.train_loader(dataset, sampler, workers, ctx.device)
    prepare = functools.partial(make_views, args=args, device=ctx.device)  # crops → query, key, negatives
    knn_loaders = knn.loaders(inputs.knn, args.image_size, batch_size, workers, ctx)

    # --- model and optimizer
    distributed.seed_everything(seed)  # the same on every rank: weights and queue start equal
    model = build_model(args, DTYPES[args.precision]).to(ctx.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(ctx.device.type, enabled=args.precision == "fp16")
    if saved:
        checkpoint.load_exactly(model, checkpoint.strip_prefix(saved["state_dict"]), f"--resume {args.resume}")
    run = Run(
        ctx, args, seed, latest="checkpoint_latest.pth.tar", sampler=sampler, optimizer=optimizer, scaler=scaler,
        state=functools.partial(checkpoint_state, args, model, data.classes),
    )  # fmt: skip
    run.resume(saved)  # optimizer, scaler, epoch and step; the model was loaded above
    saved.clear()  # as much memory as weights, queue and momenta
    if args.compile:
        model.encoder_q.compile()
        model.encoder_k.compile()
    ddp_model = distributed.wrap_ddp(model, ctx.device)

    # --- epochs
    for epoch in range(run.epoch, args.epochs):
        adjust_learning_rate(optimizer, epoch, args)
        train_one_epoch(ddp_model, run.steps(train_loader, prepare, epoch), optimizer, scaler, run)
        stats = run.epoch_stats()
        if knn_loaders and is_due(epoch, args.knn_freq, args.epochs) and not run.signum:
            with run.evaluation():
                top1 = knn.accuracy(model.encoder_q, *knn_loaders, len(data.classes), ctx.device, dtype=model.dtype)
            stats["knn_top1"] = top1
            run.print(f"epoch {epoch}  val: 200-nearest-neighbour top-1 {top1:.2f} %")
        numbered = is_due(epoch, args.save_freq, args.epochs)
        run.end_epoch(stats, [f"checkpoint_{epoch:04d}.pth.tar"] if numbered else [])
        if args.keep and distributed.is_main():
            for name in checkpoint.matching(args.ckpt_path, r"checkpoint_\d{4,}\.pth\.tar")[: -args.keep]:
                os.remove(os.path.join(args.ckpt_path, name))
    distributed.barrier()  # wait for rank 0 to finish saving


def train_one_epoch(
    ddp_model: nn.Module, batches: Iterable, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, run: Run
) -> None:
    model = getattr(ddp_model, "module", ddp_model)  # a single process has no DistributedDataParallel
    ddp_model.train()
    for query, key, negatives in batches:
        logits, labels = ddp_model(query, key, negatives)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        accuracy = (logits.argmax(dim=1) == labels).sum() * (100 / len(labels))
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


def make_views(
    crops: torch.Tensor, rng: np.random.Generator, args: argparse.Namespace, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """The loader's uint8 crops → query, key and negatives on the device."""
    crops = crops.to(device, non_blocking=True)
    return views.training_views(crops, rng, recipe=augment.V2 if args.aug_plus else augment.V1, **vars(args))


def is_due(epoch: int, freq: int, epochs: int) -> bool:
    """Every `freq` epochs and after the last."""
    return (epoch + 1) % freq == 0 or epoch + 1 == epochs


# ---------------------------------------------------------------- checkpoints, terminal


def checkpoint_state(args: argparse.Namespace, model: MoCo, classes: list[str]) -> dict:
    """The part of a checkpoint besides the state of the run."""
    return {
        "arch": args.arch,
        "state_dict": checkpoint.add_prefix(model.state_dict()),
        "image_size": args.image_size,
        "classes": classes,
        "options": {name: getattr(args, name) for name in SAVED_OPTIONS},
    }


def save_preview(args: argparse.Namespace, data: folders.TrainingImages) -> None:
    """Draw the views of up to eight training images."""
    cpu = torch.device("cpu")
    seed = distributed.resolve_seed(args.seed, {})
    dataset = datasets.RetryDataset(datasets.TwoCrops(data.photos, args.image_size, data.textures), data.labels)
    sampler = loader.GlobalBatchSampler(len(dataset), min(8, args.batch_size, len(dataset)), seed, DistContext())
    crops, _ = next(iter(loader.train_loader(dataset, sampler, 0, cpu)))
    drawn = make_views(crops, distributed.derive_rng(seed, 0, 0, 0), args, cpu)
    plot.save_views(args.preview, *drawn, [f"{args.robust} negative {i + 1}" for i in range(args.num_nonsem)])
    print(f"wrote {args.preview}")


def main() -> None:
    args = parse_args()
    inputs, derived = validate_args(args)
    if args.preview and not args.dry_run:
        return save_preview(args, inputs.train) if launch.is_main(args) else None
    options.print_config(args, derived)
    if args.dry_run:
        return
    # A node's --batch-size may differ, the images per step may not.
    agree = options.shared_options(args, [name for name in (*SAVED_OPTIONS, "knn_freq") if name != "batch_size"]) | {
        "the training images": len(inputs.train.photos),
        "the kNN images": [len(folder.paths) for folder in inputs.knn],
        "the class list": inputs.train.classes,
        "the images per step": derived["images per step"],
        "the checkpoint of --resume": [inputs.saved.get(name) for name in ("epoch", "step")],
    }
    launch.launch(main_worker, args, inputs, agree)


if __name__ == "__main__":
    cli_main(main)
