"""MoCo with non-semantic negatives: the loss, two encoders and a queue of keys.

He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020;
Ge et al., Robust Contrastive Learning Using Negative Samples with Diminished Semantics, NeurIPS 2021.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from moco import distributed
from moco.encoders import autocast, float32_linear


def contrastive_logits(
    q: torch.Tensor, k: torch.Tensor, t: torch.Tensor, queue: torch.Tensor, temperature: float, alpha: float
) -> torch.Tensor:
    """Logits of the paper's equation 3; the positive is column 0, so the loss is the cross-entropy with label 0.

    q: queries (N, C); k: keys (N, C); t: non-semantic negatives (N, n, C), n may be 0; queue: older keys (C, K).
    All features have unit length. alpha multiplies the similarity q·t, inside the exponential.
    Returns (N, 1 + K + n). Raises ValueError for other shapes, which broadcasting could hide.
    """
    if q.dim() != 2 or k.shape != q.shape or t.dim() != 3 or t.shape[::2] != q.shape or queue.shape[:-1] != q.shape[1:]:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in zip("qkt", (q, k, t)))
        raise ValueError(
            f"the features must be q (N, C), k (N, C), t (N, n, C) and queue (C, K), not {shapes} and queue"
            f" {tuple(queue.shape)}; one negative per query is t.unsqueeze(1)"
        )
    positive = (q * k).sum(dim=1, keepdim=True)  # N×1
    negative = q @ queue  # N×K
    nonsemantic = alpha * (t * q.unsqueeze(1)).sum(dim=2)  # N×n; a bmm here would need a C compiler on CUDA
    return torch.cat([positive, negative, nonsemantic], dim=1) / temperature


class MoCo(nn.Module):
    """Query encoder, momentum (key) encoder and queue; the same module in one process or many.

    base_encoder(num_classes=dim) builds an encoder whose final linear layer is `fc`. dim: feature dimension C;
    K: queue length; m: momentum of the key encoder; T: temperature; mlp: two-layer head (MoCo v2);
    alpha: weight of the similarity to non-semantic negatives; dtype: number format of the backbones (encoders.py).
    state_dict: encoder_q.*, encoder_k.*, queue (C, K), queue_ptr (1,). Raises ValueError for an encoder without `fc`.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        alpha: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.K, self.m, self.T, self.alpha, self.dtype = K, m, T, alpha, dtype
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        if not isinstance(getattr(self.encoder_q, "fc", None), nn.Linear):
            name = type(self.encoder_q).__name__
            raise ValueError(f"base_encoder: {name} has no last linear layer fc: docs/own-loop.md#in-this-project")
        for encoder in (self.encoder_q, self.encoder_k):
            layers = [encoder.fc]
            if mlp:
                layers.insert(0, nn.Linear(encoder.fc.in_features, encoder.fc.in_features))
            if dtype.itemsize == 2:
                layers = [float32_linear(layer) for layer in layers]
            encoder.fc = nn.Sequential(layers[0], nn.ReLU(), layers[1]) if mlp else layers[0]
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self._ema_update = get_ema_multi_avg_fn(m)

    def forward(self, im_q: torch.Tensor, im_k: torch.Tensor, im_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the method: encode, update the key encoder, enqueue the keys.

        im_q, im_k: query and key crops (N, 3, H, W); im_t: negatives of the query crops (N, n, 3, H, W).
        Returns logits (N, 1 + K + n) and labels (N,), all 0. `self.similarities` then describes this batch.
        Raises ValueError for other shapes.
        """
        if im_q.dim() != 4 or im_k.shape != im_q.shape or im_t.dim() != 5 or len(im_t) != len(im_q):
            shapes = ", ".join(str(tuple(images.shape)) for images in (im_q, im_k, im_t))
            raise ValueError(
                f"the images must be im_q (N, 3, H, W), im_k (N, 3, H, W) and im_t (N, n, 3, H, W), not {shapes}"
            )
        q = self._features(self.encoder_q, im_q)  # N×C
        with torch.no_grad():
            self._ema_update(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), None)
            keys = self._encode_keys([im_k, *im_t.unbind(dim=1)])
            k, t = keys[:, 0], keys[:, 1:]  # N×C, N×n×C
        queue = self.queue.clone()  # backward needs it as it was before this step's keys
        logits = contrastive_logits(q, k, t, queue, self.T, self.alpha)
        self.similarities = similarities(q, k, t, queue)
        self._enqueue(k)
        return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)

    def _features(self, encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Unit-length features (N, C), in the number format of the queue."""
        with autocast(images.device, self.dtype):
            features = encoder(images)
        return F.normalize(features.to(self.queue.dtype), dim=1)

    @torch.no_grad()
    def _encode_keys(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features (N, len(batches), C) of the key encoder, a pass for each batch: BatchNorm statistics never mix.

        Shuffled BN: a key's batch statistics come from other images than its query's, so they cannot give the positive
        away.
        """
        order = distributed.draw_shuffle(len(batches[0]))
        features = []
        for images in batches:
            if self.dtype.itemsize == 2:  # autocast would convert them anyway; before the shuffle it halves the traffic
                images = images.to(self.dtype)
            features.append(self._features(self.encoder_k, distributed.exchange_rows(images, order)))
        return distributed.exchange_rows(torch.stack(features, dim=1), order.argsort())

    @torch.no_grad()
    def _enqueue(self, keys: torch.Tensor) -> None:
        keys = distributed.gather(keys)  # all ranks, rank 0 first
        skipped = max(0, len(keys) - self.K)  # a batch longer than the queue
        positions = torch.arange(skipped, len(keys), device=keys.device)
        self.queue.index_copy_(1, (self.queue_ptr + positions) % self.K, keys[skipped:].T)
        self.queue_ptr.add_(len(keys)).remainder_(self.K)


@torch.no_grad()
def similarities(q: torch.Tensor, k: torch.Tensor, t: torch.Tensor, queue: torch.Tensor) -> dict[str, torch.Tensor]:
    """Figures to watch in training: the mean cosine of q with its key, its NS and the queue, and the spread of q.

    spread is 1 - |mean q|²: 1 if features cover the sphere evenly, 0 if they have collapsed to one point.
    Shapes as for contrastive_logits. Returns 0-d tensors: q_k, q_t (if there are NS), q_queue, spread.
    """
    center = q.mean(dim=0)
    cosines = {"q_k": (q * k).sum(dim=1).mean()}
    if t.shape[1]:
        cosines["q_t"] = (t * q.unsqueeze(1)).sum(dim=2).mean()
    return cosines | {"q_queue": center @ queue.mean(dim=1), "spread": 1 - center.square().sum()}
