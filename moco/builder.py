"""MoCo with non-semantic negatives: two encoders, a queue of keys, one loss.

He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020;
Ge et al., Robust Contrastive Learning Using Negative Samples with Diminished Semantics, NeurIPS 2021.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.models
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock

from moco import distributed, precision


class ResNet10(nn.Module):
    """A residual network for images of about 64 px on a CPU: one BasicBlock a stage, half of ResNet-18's widths.

    (N, 3, H, W) to (N, num_classes); 1.2 million weights.
    """

    def __init__(self, num_classes=1000, widths=(32, 64, 128, 256)):
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, widths[0], 7, stride=2), nn.ReLU(inplace=True),
                                  nn.MaxPool2d(3, stride=2, padding=1))
        self.stages = nn.Sequential(BasicBlock(widths[0], widths[0]), *[
            BasicBlock(narrow, wide, stride=2, downsample=_convolution(narrow, wide, 1, stride=2))
            for narrow, wide in zip(widths, widths[1:])])
        self.norm = nn.BatchNorm1d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):                         # as torchvision's networks start
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.fc(self.norm(self.stages(self.stem(x)).mean(dim=(2, 3))))


def _convolution(inputs, outputs, side, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False),
                         nn.BatchNorm2d(outputs))


FAMILIES = ("resnet", "resnext", "wide_resnet", "regnet", "shufflenet")  # all end in one linear layer named fc
ARCHS = ["resnet10"] + [name for name in torchvision.models.list_models(module=torchvision.models)
                        if name.startswith(FAMILIES)]


def build_encoder(arch, num_classes):
    """The network `arch` (one of ARCHS), randomly initialised, whose `fc` has `num_classes` outputs."""
    if arch == "resnet10":
        return ResNet10(num_classes)
    return torchvision.models.get_model(arch, weights=None, num_classes=num_classes)


def contrastive_logits(q, k, t, queue, temperature, alpha):
    """Logits of the paper's equation 3; the positive is column 0.

    q: queries (N, C); k: keys (N, C); t: non-semantic negatives (N, n, C), n may be 0; queue: (C, K).
    All features have unit length. alpha multiplies the similarity q·t, not its exponential.
    Returns (N, 1 + K + n).
    """
    positive = (q * k).sum(dim=1, keepdim=True)                      # N×1
    negative = q @ queue                                             # N×K
    nonsemantic = alpha * (t @ q.unsqueeze(2)).squeeze(2)            # N×n
    return torch.cat([positive, negative, nonsemantic], dim=1) / temperature


@torch.no_grad()
def similarities(q, k, t, queue):
    """How far learning has come: mean cosine of q with its key, its NS and the queue, and the spread of q.

    The spread is 1 - |mean q|²: 1 for features all over the sphere, 0 where all collapse into one point.
    With alpha > 1 these show learning and collapse; contrast accuracy, near 0 by design, does not.
    Returns 0-d tensors by name: q_k, q_t (if there are NS), q_queue, spread.
    """
    center = q.mean(dim=0)
    means = {"q_k": (q * k).sum(dim=1).mean()}
    if t.shape[1]:
        means["q_t"] = (t @ q.unsqueeze(2)).mean()
    return means | {"q_queue": center @ queue.mean(dim=1), "spread": 1 - center.square().sum()}


class MoCo(nn.Module):
    """Query encoder, momentum encoder and queue; the same module in one process or many.

    base_encoder(num_classes=dim) builds an encoder with a final linear layer `fc`. dim: feature dimension C;
    K: queue length; m: momentum of the key encoder; T: temperature; mlp: two-layer head (MoCo v2);
    alpha: strength of the non-semantic negatives; dtype: what the encoders compute in (see precision.py).
    state_dict: encoder_q.*, encoder_k.*, queue (C, K), queue_ptr (1,).
    """

    def __init__(self, base_encoder, dim=128, K=65536, m=0.999, T=0.07, mlp=False, alpha=1.0, dtype=torch.float32):
        super().__init__()
        self.K, self.m, self.T, self.alpha, self.dtype = K, m, T, alpha, dtype
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        for encoder in (self.encoder_q, self.encoder_k):
            if mlp:
                width = encoder.fc.in_features
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
            if dtype.itemsize == 2:
                precision.keep_fp32(encoder.fc)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._move_towards = get_ema_multi_avg_fn(m)

    @torch.no_grad()
    def _update_key_encoder(self):
        self._move_towards(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), None)

    def _features(self, encoder, images):
        """Unit features (N, C), in the format of the queue whatever the encoder's."""
        with precision.autocast(images.device, self.dtype):
            features = encoder(images)
        return F.normalize(features.to(self.queue.dtype), dim=1)

    @torch.no_grad()
    def _encode_key(self, images):
        # Shuffled BN: the key's batch statistics come from other images than the query's,
        # so that they cannot give the positive away.
        if self.dtype.itemsize == 2:                                 # autocast would cast them next:
            images = images.to(self.dtype)                           # do it now, and half the bytes travel
        images, order = distributed.shuffle(images)
        return distributed.unshuffle(self._features(self.encoder_k, images), order)

    @torch.no_grad()
    def _enqueue(self, keys):
        keys = distributed.gather(keys)                              # every rank's keys, rank 0's first
        overwritten = max(0, len(keys) - self.K)                     # a batch longer than the queue
        places = torch.arange(overwritten, len(keys), device=keys.device)
        self.queue.index_copy_(1, (self.queue_ptr + places) % self.K, keys[overwritten:].T)
        self.queue_ptr.add_(len(keys)).remainder_(self.K)

    def forward(self, im_q, im_k, im_t):
        """im_q, im_k: query and key crops (N, 3, H, W); im_t: negatives of the query crop (N, n, 3, H, W).

        One step of the method: encode, move the key encoder, enqueue the keys.
        Returns logits (N, 1 + K + n) and labels (N,), all 0. `self.similarities` then describes this batch.
        """
        q = self._features(self.encoder_q, im_q)                     # N×C
        with torch.no_grad():
            self._update_key_encoder()
            k = self._encode_key(im_k)                               # N×C
            t = q.new_empty(len(q), im_t.shape[1], q.shape[1])       # N×n×C
            for i in range(im_t.shape[1]):                           # one pass each: their BN statistics never mix
                t[:, i] = self._encode_key(im_t[:, i])
        queue = self.queue.clone()                                   # backward needs it as it was before this enqueue
        logits = contrastive_logits(q, k, t, queue, self.T, self.alpha)
        self.similarities = similarities(q, k, t, queue)
        self._enqueue(k)
        return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)
