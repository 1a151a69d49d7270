"""A frozen backbone with a linear head: built, loaded and evaluated. Used by both evaluating scripts."""

import torch
import torch.nn as nn

from moco import augment, checkpoint, distributed, metrics
from moco.builder import ARCHS, build_encoder
from moco.failures import BadInput

HEAD = ("fc.weight", "fc.bias")


def build_probe(arch, classes, backbone):
    """`arch` with the given backbone weights, frozen, and a new head of `classes` outputs: N(0, 0.01), bias 0.

    backbone: what checkpoint.backbone gave, or {} for random weights. BadInput if it does not fit.
    """
    model = build_encoder(arch, classes)
    if backbone:
        checkpoint.load_exactly(model, backbone, "--pretrained", allowed_missing=HEAD)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    nn.init.normal_(model.fc.weight, mean=0.0, std=0.01)
    nn.init.zeros_(model.fc.bias)
    return model


def check_image_size(model, arch, image_size):
    """BadInput where the network, on the meta device, does not take images of that size."""
    try:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError) as error:                      # shapes are all that can be wrong here
        raise BadInput(f"--image-size {image_size} does not suit --arch {arch} ({str(error).splitlines()[0]}); 224 px does") from error


class Heads(nn.ModuleList):
    """Linear heads side by side on the same features (N, d): their logits (heads, N, classes)."""

    def forward(self, features):
        return torch.stack([head(features) for head in self])


def head_width(saved, source):
    """How many outputs the head of a linear checkpoint has; BadInput if it has no linear head."""
    state = checkpoint.without_prefix(saved.get("state_dict", {}))
    if not set(HEAD) <= state.keys():
        raise BadInput(f"{source}: it has no linear head; linear checkpoints are what main_lincls.py writes,"
                       " checkpoint_robust_*.pth.tar and model_best_*.pth.tar")
    return len(state["fc.bias"])


def check_classes(saved, classes, source):
    """BadInput unless the head of a linear checkpoint can be scored on data of these classes (sorted names).

    A published head does not say its classes; there, one at least as wide as the data is taken at its word.
    """
    own = saved.get("wnids")
    if own is not None and own != classes:
        other = sorted(set(own) ^ set(classes))
        raise BadInput(f"{source}: its head was trained on {len(own)} other classes than the {len(classes)} of this data"
                       f" (for example {other[0] if other else own[0]}); use the data it was trained on")
    if head_width(saved, source) < len(classes):
        raise BadInput(f"{source}: its head has {head_width(saved, source)} outputs, the data {len(classes)} classes;"
                       " use the data it was trained on")


def load_classifier(path, option="--pretrained"):
    """(model in eval mode, checkpoint) of a linear checkpoint, with a head as wide as its own."""
    saved = checkpoint.load(path, option)
    width = head_width(saved, f"{option} {path}")
    if saved.get("arch") not in ARCHS:
        raise BadInput(f"{option} {path}: its arch {saved.get('arch')!r} is none of {', '.join(ARCHS)}")
    model = build_encoder(saved["arch"], width)
    checkpoint.load_exactly(model, checkpoint.without_prefix(saved["state_dict"]), f"{option} {path}")
    return model.eval(), saved


def changed_entries(model, backbone):
    """The names of backbone weights and statistics that are no longer the pre-trained ones: none, if it was frozen."""
    own = model.state_dict()
    return [name for name, value in backbone.items() if not torch.equal(own[name].cpu(), value)]


def to_input(images, device):
    """uint8 images (N, 3, H, W) from the loader to normalised ones on the device."""
    return augment.normalize(images.to(device, non_blocking=True).float() / 255)


@torch.inference_mode()
def outputs(predict, batches, device):
    """predict(images) for each batch, normalised and on the device: yields its result and the labels (N,)."""
    for images, labels in batches:
        yield predict(to_input(images, device)), labels.to(device, non_blocking=True)


def evaluate(predict, batches, device):
    """Exact accuracy over all processes, each image counted once, of several classifiers at once: for each one
    {"acc1", "acc5"} in percent, and "n". predict(images) gives the logits (N, classes) of each."""
    correct = 0
    for logits, labels in outputs(predict, batches, device):
        counts = [metrics.correct_counts(own, labels) for own in logits]
        correct = correct + torch.stack([torch.cat([count, count.new_tensor([len(labels)])]) for count in counts])
    return [{"acc1": 100 * top1 / n, "acc5": 100 * top5 / n, "n": n}
            for top1, top5, n in distributed.all_reduce(correct).tolist()]
