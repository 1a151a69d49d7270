"""Pre-train MoCo with non-semantic negatives (Ge et al., NeurIPS 2021).

A laptop, one process, with or without a GPU:
    python moco-non-sem-neg.py --mlp --moco-t 0.2 --aug-plus --cos --alpha 2 --ckpt_path ckpts/RUN DIR
All GPUs of this machine:
    python moco-non-sem-neg.py --multiprocessing-distributed --world-size 1 --rank 0 … DIR
    torchrun --nproc-per-node=8 moco-non-sem-neg.py … DIR
Two machines; on the other one with --rank 1:
    python moco-non-sem-neg.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://FIRST:10001 … DIR
"""

import math
import os
import shutil

import numpy as np
import torch
import torch.nn.functional as F

from moco import (augment, checkpoint, diagnosis, distributed, failures, folders, images, knn, launch, loader, memory, metrics,
                  negatives, options, precision, preview, signals)
from moco.builder import ARCHS, MoCo, build_encoder

SPELLINGS = {"patch": "patch", "nonsem": "patch", "texture": "texture", "texture_syn": "texture", "none": "none"}
SAVED_OPTIONS = ("moco_dim", "moco_k", "moco_m", "moco_t", "mlp", "aug_plus", "robust", "num_nonsem", "alpha",
                 "patch_ratio", "image_size", "batch_size", "lr", "epochs", "cos", "schedule", "precision")


def parse_args():
    parser = options.OptionParser("Pre-train MoCo with non-semantic negatives (NS).")
    options.add_data_options(parser)
    model = parser.add_argument_group("model")
    model.add_argument("-a", "--arch", default="resnet50", choices=ARCHS, metavar="ARCH",
                       help="encoder: resnet10 or a torchvision model with a final fc")
    model.add_argument("--moco-dim", default=128, type=options.positive_int, metavar="C", help="feature dimension")
    model.add_argument("--moco-k", default=65536, type=options.positive_int, metavar="K", help="queue length")
    model.add_argument("--moco-m", default=0.999, type=options.fraction, metavar="M", help="momentum of the key encoder")
    model.add_argument("--moco-t", default=0.07, type=options.positive_float, metavar="T", help="softmax temperature")
    model.add_argument("--mlp", action="store_true", help="two-layer head (MoCo v2)")
    negative = parser.add_argument_group("non-semantic negatives")
    negative.add_argument("--robust", default="patch", choices=SPELLINGS, metavar="NS",
                          help="patch (or nonsem), texture (or texture_syn), none: plain MoCo")
    negative.add_argument("--num-nonsem", default=1, type=options.natural_int, metavar="N", help="NS a query; 0: plain MoCo")
    negative.add_argument("--alpha", default=1.0, type=options.natural_float, metavar="A", help="strength of the NS")
    negative.add_argument("--patch-ratio", default=(16, 56), nargs=2, type=options.positive_int, metavar=("LO", "HI"),
                          help="patch sides U{LO..HI}, pixels of the crop")
    negative.add_argument("--patch-size", default=32, type=int, metavar="N", help="has no effect, as in the published code")
    views = parser.add_argument_group("views")
    views.add_argument("--aug-plus", action="store_true", help="MoCo v2's augmentation instead of v1's")
    views.add_argument("--image-size", default=224, type=options.positive_int, metavar="S", help="side of the crops, pixels")
    views.add_argument("--preview", metavar="FILE.png", help="draw queries, keys and their NS, then exit")
    training = options.add_training_options(parser, epochs=200, batch_size=256, lr=0.03, schedule=[120, 160],
                                            weight_decay=1e-4)
    training.add_argument("--cos", action="store_true", help="half-cosine learning rate instead of --schedule")
    speed = options.add_precision_options(parser)
    speed.add_argument("--compile", action="store_true", help="compile the encoders; on a CPU this needs a C++ compiler")
    output = options.add_output_options(parser, "./ckpts/moco")
    output.add_argument("--save-freq", default=10, type=options.positive_int, metavar="N", help="epochs between numbered checkpoints")
    output.add_argument("--save-steps", type=options.positive_int, metavar="N",
                        help="steps between saves of checkpoint_latest; default: an epoch's")
    output.add_argument("--keep", type=options.positive_int, metavar="N", help="numbered checkpoints to keep; default: all")
    output.add_argument("--knn", action="store_true", help="log the top-1 of weighted 200-nearest-neighbour on val/")
    output.add_argument("--knn-freq", default=10, type=options.positive_int, metavar="E", help="epochs between those")
    options.add_launch_options(parser)
    args = parser.parse_args()
    args.robust = SPELLINGS[args.robust] if args.num_nonsem else "none"
    if args.robust == "none":
        args.num_nonsem = 0
    args.resume = checkpoint.resume_path(args.resume, args.ckpt_path, r"checkpoint_(\d{4,}|latest)\.pth\.tar")
    return args


def check(args):
    """Refuse, before anything is built, what could only fail later. Returns what follows from the arguments, to be printed."""
    low, high = args.patch_ratio
    if args.robust == "patch" and not low <= high <= args.image_size:
        raise failures.BadInput(f"--patch-ratio {low} {high}: LO must not be above HI, nor HI above the crops'"
                                f" {args.image_size} px; for example 16 72 at 224 px")
    if args.robust == "texture" and args.num_nonsem != 1:
        raise failures.BadInput(f"--num-nonsem {args.num_nonsem}: a photo has one texture; with --robust texture use 1")
    if args.start_epoch >= args.epochs:
        raise failures.BadInput(f"--start-epoch {args.start_epoch}: there are only --epochs {args.epochs}")
    local_size, world_size = launch.process_counts(**options.launch_settings(args))
    if args.preview:
        options.check_file("--preview", args.preview, endings=(".png", ".jpg", ".jpeg"))
    options.check_folder("--ckpt_path", args.ckpt_path)
    photos, _, _, classes, _ = list_data(args)
    batch_size = options.per_process(args.batch_size, local_size)
    batches = loader.ShuffledBatches(len(photos), batch_size, seed=0, place=distributed.Place(world_size=world_size))
    needed = memory.check(lambda: build_model(args, torch.float32), args.arch, batch_size, args.image_size, 2 + args.num_nonsem,
                          precision.DTYPES[args.precision].itemsize, launch.device_of(args.gpu or 0), local_size)
    if args.compile and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise failures.BadInput("--compile: on a CPU it needs a C++ compiler, and there is no g++; leave it out")
    if args.resume:
        check_resume(args, checkpoint.load(args.resume), classes, batches)
    return {"processes": world_size, "images": len(photos), "classes": len(classes), "images_per_step": batches.global_batch,
            "steps_per_epoch": len(batches), "chance_loss": f"{math.log(1 + args.moco_k + args.num_nonsem):.3f}",
            "memory_a_process": needed}


def check_resume(args, saved, classes, batches):
    source = f"--resume {args.resume}"
    checkpoint.check_resumable(saved, source, vars(args), classes, batches.images, batches.global_batch)
    with torch.device("meta"):
        checkpoint.check_exactly(build_model(args, torch.float32), checkpoint.without_prefix(saved["state_dict"]), source)
    if saved["epoch"] >= args.epochs:
        raise failures.BadInput(f"{source}: its {saved['epoch']} epochs are done; use a larger --epochs to go on")


def list_data(args):
    """(photos, textures or None, labels, classes, photos left out for lack of a texture) of the training split."""
    if args.robust == "texture":
        return folders.list_pairs(args.data)
    photos, labels, classes = folders.list_photos(folders.data_split(args.data, "train"))
    return photos, None, labels, classes, ""


def build_model(args, dtype):
    return MoCo(lambda num_classes: build_encoder(args.arch, num_classes), args.moco_dim, args.moco_k, args.moco_m,
                args.moco_t, args.mlp, args.alpha, dtype)


def train(place, args, plan):
    """The training of one process, on `place.device`; every way of launching ends here."""
    device = place.device
    memory.keep_freed(device)
    stop = signals.Stop()
    saved = checkpoint.load(args.resume) if args.resume else {}
    seed = args.seed if args.seed is not None else saved.get("seed", options.draw_seed())
    seed = distributed.agree(seed, device)

    # Data: uint8 crops from the workers; colour, blur, flip, normalisation and patches on the device.
    photos, textures, labels, classes, unpaired = list_data(args)
    batch_size = options.per_process(args.batch_size, place.local_size)
    batches = loader.ShuffledBatches(len(photos), batch_size, seed, place)
    workers = options.workers_per_process(args.workers, place.local_size)
    crops_of = loader.RandomViews(labels, loader.ViewPairs(photos, args.image_size, textures))
    batch_loader = loader.training_loader(crops_of, batches, workers, device)
    recipe = augment.V2 if args.aug_plus else augment.V1

    def views(crops, epoch, step):
        rng = np.random.default_rng(distributed.derive_seed(seed, epoch, step, place.rank))
        crops = crops.to(device, non_blocking=True)
        return negatives.training_views(crops, recipe, args.robust, args.num_nonsem, args.patch_ratio, rng)

    if args.preview:
        crops, _ = next(iter(batch_loader))
        if distributed.is_main():
            preview.save_views(args.preview, *views(crops[:8], epoch=0, step=0))
            print(f"wrote {args.preview}")
        return
    neighbours = None
    if args.knn:
        data = folders.photos_of(args.data) if args.robust == "texture" else args.data
        neighbours = knn.neighbour_loaders(data, args.image_size, batch_size, workers, place)

    # Model and optimiser. The seed makes all processes start from the same weights and queue.
    precision.configure_cudnn(args.strict_fp32, deterministic=args.seed is not None)
    distributed.seed_everything(seed)
    model = build_model(args, precision.DTYPES[args.precision])
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    for weight in model.encoder_q.parameters():
        # Left to itself, a fused first step that the scaler skips leaves them as whatever the memory held.
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    start_epoch, start_step, means = args.start_epoch, 0, metrics.Means()
    bad_images = images.BadImages(args.max_bad_images)
    if saved:
        checkpoint.load_exactly(model, checkpoint.without_prefix(saved["state_dict"]), f"--resume {args.resume}")
        checkpoint.load_optimizer(optimizer, saved["optimizer"])
        if saved.get("scaler"):                                      # none from another precision
            scaler.load_state_dict(saved["scaler"])
        start_epoch, start_step = saved["epoch"], saved.get("step", 0)
        bad_images = images.BadImages(args.max_bad_images, saved.get("bad_images"), saved.get("bad_in_epoch", 0))
        if start_step:
            means = metrics.Means.restored(saved["means"], device)
    if args.compile:
        model.encoder_q.compile()
        model.encoder_k.compile()
    stepped = distributed.parallel(model, device)

    log_path = os.path.join(args.ckpt_path, "log.jsonl")
    if distributed.is_main():
        options.make_folder("--ckpt_path", args.ckpt_path)
        metrics.keep_jsonl(log_path, before_epoch=start_epoch)
        options.echo(args, device=device, loading_processes=f"{workers} each", seed_of_this_run=seed, **plan)
        if unpaired:
            print(f"photos left out because they have no texture: {unpaired}")
        if args.knn and not neighbours:
            print(f"--knn is skipped: {args.data} has no val/ of the same classes")
        if args.patch_size != 32:
            print("--patch-size has no effect; --patch-ratio sets the patch sizes")
        print(f"from epoch {start_epoch}" + (f" step {start_step}" if start_step else "")
              + (f", resumed from {args.resume}" if saved else ""), flush=True)

    def refuse_nonfinite(epoch, weights=False):
        """End the run rather than report or save what is not finite."""
        step, what = means.finite_steps() + 1, "the loss is"
        if step > means.steps:
            if not weights or not diagnosis.nonfinite(model.state_dict()):
                return
            step, what = means.steps, "weights are"
        diagnosis.stop(args.ckpt_path, model, what, epoch=epoch, step=step, lr=lr, precision=args.precision,
                       images=[photos[index] for index in batches.of_step(step - 1)])

    def save(names, epoch, step=0):
        """Write the state after `epoch` whole epochs and `step` steps, by rank 0; all processes call this."""
        state = {"epoch": epoch, "step": step, "means": means.state() if step else None}
        if not distributed.is_main():
            return
        if step:
            refuse_nonfinite(epoch, weights=True)
        state |= {"arch": args.arch, "state_dict": checkpoint.with_prefix(model.state_dict()),
                  "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "seed": seed,
                  "bad_images": bad_images.known, "bad_in_epoch": bad_images.in_epoch if step else 0,
                  "image_size": args.image_size, "classes": classes, "images": len(photos),
                  "images_per_step": batches.global_batch,
                  "options": {name: getattr(args, name) for name in SAVED_OPTIONS}}
        for name in names:
            checkpoint.save(os.path.join(args.ckpt_path, f"checkpoint_{name}.pth.tar"), state)
        if args.keep:
            checkpoint.keep_last(args.ckpt_path, args.keep, r"checkpoint_\d{4,}\.pth\.tar")

    def end(signal, where):
        if signal:
            signals.leave(signal, where)
        bad_images.give_up()

    for epoch in range(start_epoch, args.epochs):
        # All randomness of a step follows from (seed, epoch, step, rank): a resumed run goes on as if never stopped.
        batches.epoch, batches.first_step = epoch, start_step
        lr = learning_rate(args.lr, epoch, args.epochs, args.cos, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        progress = metrics.Progress(batch_loader, f"epoch {epoch + 1}/{args.epochs}", batches.global_batch,
                                    args.print_freq, args.epochs - epoch - 1, start_step)
        prepared = loader.prepared(progress, lambda step, crops: views(crops, epoch, step), device, start_step)
        stepped.train()
        for step, (batch, faults) in enumerate(prepared, start_step + 1):  # counted from 1: the steps done after it
            distributed.seed_shuffles(seed, epoch, step)
            train_step(stepped, optimizer, scaler, batch, means)
            if progress.due():                                       # the one place that waits for the GPU
                refuse_nonfinite(epoch)
                progress.report("  ".join(f"{name} {value:.3f}" for name, value in means.read().items()))
            signal, unreadable = distributed.maxima(stop.received(), len(faults))
            if unreadable:
                bad_images.add(faults)
            ending = signal or bad_images.too_many()
            if step < len(batches):                                  # after the last one all is saved anyway
                if ending or args.save_steps and step % args.save_steps == 0:
                    save(["latest"], epoch, step)
                if ending:
                    end(signal, f"after epoch {epoch} step {step}")
        record = {"epoch": epoch, "lr": lr, **means.read(over_ranks=True), "bad_images": bad_images.in_epoch, **progress.speed()}
        if neighbours and not ending and ((epoch + 1) % args.knn_freq == 0 or epoch + 1 == args.epochs):
            record["knn_top1"] = knn.accuracy(model.encoder_q, *neighbours, device)
        if distributed.is_main():
            refuse_nonfinite(epoch, weights=True)
            if "knn_top1" in record:
                print(f"epoch {epoch + 1}/{args.epochs}  val: 200-nearest-neighbour top-1 {record['knn_top1']:.2f} %", flush=True)
            metrics.append_jsonl(log_path, record)
        numbered = (epoch + 1) % args.save_freq == 0 or epoch + 1 == args.epochs
        save([f"{epoch:04d}", "latest"] if numbered else ["latest"], epoch + 1)
        start_step, means, bad_images.in_epoch = 0, metrics.Means(), 0
        if ending:
            end(signal, f"after epoch {epoch + 1}")
    distributed.barrier()                                            # no process leaves while rank 0 is still saving


def train_step(model, optimizer, scaler, batch, means):
    """One step on a batch (query, key, negatives); its figures go into the means."""
    logits, labels = model(*batch)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    accuracy = metrics.correct_counts(logits, labels, ks=(1,))[0] * (100 / len(labels))
    means.add({"loss": loss, "contrast_acc": accuracy, **getattr(model, "module", model).similarities})


def learning_rate(base, epoch, epochs, cosine, schedule):
    """Half a cosine over all epochs, or a tenth of it from each epoch of the schedule on."""
    if cosine:
        return base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return base * 0.1 ** sum(epoch >= milestone for milestone in schedule)


def main():
    args = parse_args()
    plan = check(args)
    if args.dry_run:
        return options.echo(args, **plan, nothing_was_started="--dry-run")
    launch.launch(train, (args, plan), **options.launch_settings(args))


if __name__ == "__main__":
    failures.run(main)
