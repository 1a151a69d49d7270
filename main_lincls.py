"""Linear evaluation: train a linear head on a frozen, pre-trained backbone, and test it on val/.

A laptop, one process, with or without a GPU:
    python main_lincls.py --lr 10 --pretrained ckpts/RUN/checkpoint_0199.pth.tar --ckpt_path ckpts/RUN DIR
All GPUs of this machine:
    python main_lincls.py --multiprocessing-distributed --world-size 1 --rank 0 … DIR
    torchrun --nproc-per-node=8 main_lincls.py … DIR
A linear checkpoint tested, nothing trained:
    python main_lincls.py --evaluate --resume ckpts/RUN/model_best_0199.pth.tar DIR
Several learning rates at once, on the same features:
    python main_lincls.py --lr 3 10 30 --pretrained ckpts/RUN/checkpoint_0199.pth.tar --ckpt_path ckpts/RUN DIR
The backbone alone, for torchvision:
    python main_lincls.py --pretrained ckpts/RUN/checkpoint_0199.pth.tar --export-backbone resnet50.pth
"""

import copy
import os
import re

import torch
import torch.nn.functional as F

from moco import (checkpoint, classifier, diagnosis, distributed, failures, folders, images, launch, loader, metrics, options,
                  precision, released)
from moco.builder import ARCHS, build_encoder


def parse_args():
    parser = options.OptionParser("Train a linear head on a frozen, pre-trained backbone, and test it.")
    options.add_data_options(parser, nargs="?")
    model = parser.add_argument_group("model")
    model.add_argument("-a", "--arch", default="resnet50", choices=ARCHS, metavar="ARCH", help="as in pre-training")
    model.add_argument("--pretrained", default="", metavar="FILE",
                       help="pre-training checkpoint, torchvision state_dict, or released:NAME; none: random weights")
    model.add_argument("--export-backbone", metavar="FILE",
                       help="write --pretrained as a torchvision state_dict without head, then exit; needs no DIR")
    model.add_argument("--image-size", default=None, type=options.positive_int, metavar="S",
                       help="side of the crops, pixels; default: the checkpoint's, else 224")
    model.add_argument("-e", "--evaluate", action="store_true", help="test the linear checkpoint of --resume, then exit")
    options.add_training_options(parser, epochs=100, batch_size=256, lr=[30.0], schedule=[30, 40, 50], weight_decay=0.0)
    options.add_precision_options(parser)
    options.add_output_options(parser, "./ckpts/moco")
    options.add_launch_options(parser)
    args = parser.parse_args()
    if args.data is None and isinstance(args.lr[-1], str):            # --lr 10 DIR, as the published script takes it
        args.data = args.lr.pop()
    if not args.lr or any(isinstance(lr, str) for lr in args.lr):
        parser.error(f"argument --lr/--learning-rate: {' '.join(map(str, args.lr))!r} is not one or more numbers above 0")
    if args.data is None and not args.export_backbone:
        parser.error("the following arguments are required: DIR")
    args.resume = checkpoint.resume_path(
        args.resume, args.ckpt_path, rf"checkpoint_robust_{re.escape(run_name(args.pretrained))}\.pth\.tar")
    return args


def run_name(pretrained):
    """The E of the file names: the pre-training epoch as in the checkpoint's name, else that name, else 'random'."""
    name = os.path.basename(pretrained).removeprefix(released.SCHEME)
    epoch = re.search(r"_(\d{4,})\.", name)
    return epoch[1] if epoch else name.split(".")[0] or "random"


def check(args):
    """Refuse, before anything is built, what could only fail later. Returns what follows from the arguments, to be printed."""
    if args.evaluate and not args.resume:
        raise failures.BadInput("--evaluate needs a trained head: --resume ckpts/RUN/model_best_0199.pth.tar")
    if args.start_epoch >= args.epochs:
        raise failures.BadInput(f"--start-epoch {args.start_epoch}: there are only --epochs {args.epochs}")
    local_size, world_size = launch.process_counts(**options.launch_settings(args))
    batch_size = options.per_process(args.batch_size, local_size)
    options.check_folder("--ckpt_path", args.ckpt_path)
    train_split, (val_paths, _, classes) = list_data(args)
    plan = {"processes": world_size, "validation_images": len(val_paths), "classes": len(classes)}
    if train_split:
        batches = loader.ShuffledBatches(len(train_split[0]), batch_size, seed=0, place=distributed.Place(world_size=world_size))
        plan |= {"training_images": batches.images, "images_per_step": batches.global_batch, "steps_per_epoch": len(batches)}
    saved = checkpoint.load(args.resume) if args.resume else {}
    pretrained = checkpoint.load(args.pretrained, "--pretrained") if args.pretrained else {}
    if saved:
        classifier.check_classes(saved, classes, f"--resume {args.resume}")
        check_arch(args, saved, f"--resume {args.resume}")
        if not {"epoch", "best_acc1", "optimizer"} <= saved.keys():
            raise failures.BadInput(f"--resume {args.resume}: not a linear checkpoint; --resume takes what this script saved")
        with torch.device("meta"):
            own = build_encoder(args.arch, classifier.head_width(saved, args.resume))
        checkpoint.check_exactly(own, checkpoint.without_prefix(saved["state_dict"]), f"--resume {args.resume}")
        heads = len(saved.get("lrs", [None]))
        if not args.evaluate and heads != len(args.lr):
            raise failures.BadInput(f"--resume {args.resume}: it has heads for {heads} learning rates, --lr has {len(args.lr)}")
        if not args.evaluate and saved["epoch"] >= args.epochs:
            raise failures.BadInput(f"--resume {args.resume}: its {saved['epoch']} epochs are done; use a larger --epochs")
    with torch.device("meta"):
        model = build_encoder(args.arch, len(classes)).eval()
    if pretrained:
        check_arch(args, pretrained, f"--pretrained {args.pretrained}")
        backbone = pretrained_backbone(args, pretrained)
        checkpoint.check_exactly(model, backbone, f"--pretrained {args.pretrained}", classifier.HEAD)
    plan["size_of_crops"] = args.image_size or (saved or pretrained).get("image_size", 224)
    classifier.check_image_size(model, args.arch, plan["size_of_crops"])
    return plan


def export_backbone(args):
    """Write the backbone that --pretrained holds as torchvision's network of that name takes it, strict=False."""
    if not args.pretrained:
        raise failures.BadInput("--export-backbone needs --pretrained, the checkpoint whose backbone to write")
    options.check_file("--export-backbone", args.export_backbone)
    pretrained = checkpoint.load(args.pretrained, "--pretrained")
    check_arch(args, pretrained, f"--pretrained {args.pretrained}")
    backbone = pretrained_backbone(args, pretrained)
    checkpoint.check_exactly(build_encoder(args.arch, 1), backbone, f"--pretrained {args.pretrained}", classifier.HEAD)
    if args.dry_run:
        return options.echo(args, tensors=len(backbone), nothing_was_written="--dry-run")
    checkpoint.save(args.export_backbone, backbone)
    print(f"wrote {args.export_backbone}, {len(backbone)} tensors of {args.arch}")


def check_arch(args, saved, source):
    if saved.get("arch", args.arch) != args.arch:
        raise failures.BadInput(f"{source}: it holds a {saved['arch']}, not --arch {args.arch}")


def pretrained_backbone(args, pretrained):
    backbone = checkpoint.backbone(pretrained)
    if not backbone or not all(isinstance(value, torch.Tensor) for value in backbone.values()):
        raise failures.BadInput(f"--pretrained {args.pretrained}: it holds no backbone weights")
    if broken := diagnosis.nonfinite(backbone):
        raise failures.BadInput(f"--pretrained {args.pretrained}: {broken[0]} holds infinite values or NaN; take an earlier one")
    return backbone


def list_data(args):
    """The training split, None with --evaluate, and the validation split, each as (paths, labels, classes)."""
    val_split = folders.list_photos(folders.data_split(args.data, "val"))
    if args.evaluate:
        return None, val_split
    train_split = folders.list_photos(folders.data_split(args.data, "train"))
    different = sorted(set(train_split[2]) ^ set(val_split[2]))
    if different:
        raise failures.BadInput(f"{args.data}: train/ and val/ hold different classes, for example {different[0]}")
    return train_split, val_split


def train(place, args, plan):
    """The linear evaluation in one process, on `place.device`; every way of launching ends here."""
    device = place.device
    saved = checkpoint.load(args.resume) if args.resume else {}
    pretrained = checkpoint.load(args.pretrained, "--pretrained") if args.pretrained else {}
    seed = args.seed if args.seed is not None else saved.get("seed", options.draw_seed())
    seed = distributed.agree(seed, device)
    image_size = plan["size_of_crops"]

    # Data
    train_split, (val_paths, val_labels, classes) = list_data(args)
    batch_size = options.per_process(args.batch_size, place.local_size)
    workers = options.workers_per_process(args.workers, place.local_size)
    val_loader = loader.evaluation_loader(
        loader.Labelled(val_paths, val_labels, loader.test_view(image_size)), batch_size, workers, place)

    # Model: only heads learn, one for each learning rate. A resumed head keeps its own width, 1000 in published files.
    precision.configure_cudnn(args.strict_fp32, deterministic=args.seed is not None)
    distributed.seed_everything(seed)
    width = classifier.head_width(saved, args.resume) if saved else len(classes)
    backbone = classifier.build_probe(args.arch, width, pretrained_backbone(args, pretrained) if pretrained else {})
    start_epoch, best_acc1s = args.start_epoch, [0.0] * len(args.lr)
    if saved:
        checkpoint.load_exactly(backbone, checkpoint.without_prefix(saved["state_dict"]), f"--resume {args.resume}")
        start_epoch, best_acc1s = saved["epoch"], saved.get("best_acc1s", [float(saved["best_acc1"])])
    frozen = {name: value.clone() for name, value in backbone.state_dict().items() if name not in classifier.HEAD}
    # --evaluate tests one head, the checkpoint's best; training goes on with all of them.
    heads = classifier.Heads(copy.deepcopy(backbone.fc) for _ in ([None] if args.evaluate else args.lr))
    if "heads" in saved and not args.evaluate:
        heads.load_state_dict(saved["heads"])
    backbone.fc = torch.nn.Identity()
    backbone.to(device, memory_format=torch.channels_last).eval()    # batch statistics would adapt it to the labelled data
    heads.to(device)

    @torch.inference_mode()
    def features(images):
        with precision.autocast(device, precision.DTYPES[args.precision]):
            return backbone(images).float()

    if args.evaluate:
        (result,) = classifier.evaluate(lambda images: heads(features(images)), val_loader, device)
        return print(accuracy_line(result), flush=True) if distributed.is_main() else None

    train_paths, train_labels, _ = train_split
    batches = loader.ShuffledBatches(len(train_paths), batch_size, seed, place)
    views = loader.LabelledViews(train_paths, train_labels, loader.probe_view(image_size))
    train_loader = loader.training_loader(loader.RandomViews(train_labels, views), batches, workers, device)
    bad_images = images.BadImages(args.max_bad_images)
    optimizer = torch.optim.SGD([{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, args.lr)],
                                momentum=args.momentum, weight_decay=args.weight_decay)
    if saved:
        checkpoint.load_optimizer(optimizer, saved["optimizer"])
    stepped = distributed.parallel(heads, device)
    name = run_name(args.pretrained)
    if distributed.is_main():
        options.make_folder("--ckpt_path", args.ckpt_path)
        options.echo(args, device=device, loading_processes=f"{workers} each", seed_of_this_run=seed, **plan)
        if not args.pretrained and not saved:
            print("no --pretrained: the backbone is random, a baseline")

    for epoch in range(start_epoch, args.epochs):
        batches.epoch = epoch
        for group, lr in zip(optimizer.param_groups, args.lr):
            group["lr"] = lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
        train_epoch(features, stepped, optimizer, device, bad_images, metrics.Progress(
            train_loader, f"epoch {epoch + 1}/{args.epochs}", batches.global_batch, args.print_freq,
            args.epochs - epoch - 1))
        results = classifier.evaluate(lambda images: heads(features(images)), val_loader, device)
        changed = classifier.changed_entries(backbone, frozen)
        if changed:
            raise RuntimeError(f"the frozen backbone changed in training: {', '.join(changed[:5])}")
        if distributed.is_main():
            finite = [not diagnosis.nonfinite(head.state_dict()) for head in heads]
            if not any(finite):
                raise failures.RunFailed(f"the head's weights are not finite after epoch {epoch + 1}; what was saved before is whole;"
                                         f" use a smaller --lr, for example {min(args.lr) / 10:g}")
            acc1s = [result["acc1"] if good else 0.0 for result, good in zip(results, finite)]  # NaN is no decision
            winner = acc1s.index(max(acc1s))
            is_best = acc1s[winner] >= max(best_acc1s)
            best_acc1s = [max(pair) for pair in zip(acc1s, best_acc1s)]
            print(f"epoch {epoch + 1}/{args.epochs}  {accuracy_line(results[winner])}  best {max(best_acc1s):.2f} %"
                  + by_lr(args.lr, acc1s), flush=True)
            classifier_state = {**backbone.state_dict(), **dict(zip(classifier.HEAD, heads[winner].state_dict().values()))}
            state = {"epoch": epoch + 1, "arch": args.arch, "state_dict": checkpoint.with_prefix(classifier_state),
                     "best_acc1": max(best_acc1s), "optimizer": optimizer.state_dict(),
                     "wnids": classes, "image_size": image_size, "seed": seed,
                     "lrs": args.lr, "best_acc1s": best_acc1s, "heads": heads.state_dict(),
                     "pretraining": pretrained.get("options") or saved.get("pretraining")}
            for kind in ("checkpoint_robust", "model_best")[:1 + is_best]:
                checkpoint.save(os.path.join(args.ckpt_path, f"{kind}_{name}.pth.tar"), state)
    if distributed.is_main() and len(args.lr) > 1:
        print(f"best {max(best_acc1s):.2f} %{by_lr(args.lr, best_acc1s)}", flush=True)
    distributed.barrier()                                            # no process leaves while rank 0 is still saving


def train_epoch(features, heads, optimizer, device, bad_images, progress):
    """One pass over the data. The loss is the sum over the heads, none of which sees another's gradient."""
    means = metrics.Means()
    for (crops, labels), faults in progress:
        labels = labels.to(device, non_blocking=True)
        logits = heads(features(classifier.to_input(crops, device)).clone())  # a tensor that autograd may keep
        loss = sum(F.cross_entropy(own, labels) for own in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        top1 = torch.stack([metrics.correct_counts(own, labels, ks=(1,))[0] for own in logits]).max() * (100 / len(labels))
        means.add({"loss": loss / len(logits), "acc1": top1})
        if progress.due():
            progress.report("  ".join(f"{name} {value:.3f}" for name, value in means.read().items()))
        if any(distributed.maxima(len(faults))):
            bad_images.add(faults)
        if bad_images.too_many():
            bad_images.give_up()


def by_lr(lrs, accuracies):
    """Each learning rate with its top-1, where there are several."""
    if len(lrs) == 1:
        return ""
    return "  at " + "  ".join(f"lr {lr:g}: {accuracy:.2f}" for lr, accuracy in zip(lrs, accuracies))


def accuracy_line(result):
    return f"val: top-1 {result['acc1']:.2f} %  top-5 {result['acc5']:.2f} %  of {result['n']} images"


def main():
    args = parse_args()
    args.pretrained = released.local_path(args.pretrained)
    if args.export_backbone:
        return export_backbone(args)
    plan = check(args)
    if args.dry_run:
        return options.echo(args, **plan, nothing_was_started="--dry-run")
    launch.launch(train, (args, plan), **options.launch_settings(args))


if __name__ == "__main__":
    failures.run(main)
