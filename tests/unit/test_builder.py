"""The method against the published code, against an independent slow oracle, and piece by piece."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from helpers import fill, unit
from oracle import GOLDEN, build, golden_model, golden_steps, oracle_steps

from moco.builder import MoCo, contrastive_logits, similarities

# The published code: tests/data/moco_reference.json holds its losses in float64


@pytest.mark.parametrize("golden", GOLDEN, ids=["alpha2-n1", "alpha3-n3"])
def test_every_step_equals_the_published_code(golden):
    expected, model = golden["rank"][0], golden_model(golden["case"])
    result = golden_steps(golden["case"], model)
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-7, rel=0)
    assert result["logits"][0][0].tolist() == pytest.approx(expected["logits_row0"], abs=1e-7, rel=0)
    assert result["queue_ptr"] == expected["queue_ptr"]
    assert model.queue.abs().sum().item() == pytest.approx(expected["queue_abs_sum"], rel=1e-5)
    key_fc = sum(p.abs().sum().item() for name, p in model.encoder_k.named_parameters() if name.startswith("fc"))
    assert key_fc == pytest.approx(expected["key_fc_sum"], rel=1e-5)


def alpha_outside(q, k, t, queue, T, alpha):
    """alpha weights the exponentials of the negatives instead of their similarities."""
    logits = contrastive_logits(q, k, t, queue, T, 1.0)
    logits[:, -t.shape[1] :] += math.log(alpha)
    return logits


def queue_after_enqueue(q, k, t, queue, T, alpha):
    return contrastive_logits(q, k, t, torch.cat([k.T, queue[:, len(k) :]], dim=1), T, alpha)


@pytest.mark.parametrize("target, fault", [
    ("contrastive_logits", alpha_outside), ("contrastive_logits", queue_after_enqueue),
    ("get_ema_multi_avg_fn", lambda m: lambda *all: None)], ids=["alpha", "queue", "no momentum update"])  # fmt: skip
def test_the_golden_losses_tell_a_wrong_method(target, fault, monkeypatch):
    monkeypatch.setattr(f"moco.builder.{target}", fault)
    losses = golden_steps(GOLDEN[0]["case"], golden_model(GOLDEN[0]["case"]), steps=2)["loss"]
    assert max(abs(a - b) for a, b in zip(losses, GOLDEN[0]["rank"][0]["loss"])) > 1e-4


def test_the_oracle_equals_the_published_code():
    expected, (result,) = GOLDEN[1]["rank"][0], oracle_steps(GOLDEN[1]["case"], world=1)
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-7, rel=0)
    assert result["logits"][0][0].tolist() == pytest.approx(expected["logits_row0"], abs=1e-7, rel=0)


# Piece by piece


@pytest.mark.parametrize("n", [0, 1, 3])
def test_logits_equal_the_formula_written_out_in_loops(n):
    N, C, K, T, alpha = 4, 6, 5, 0.3, 2.5
    q, k, t, queue = unit(N, C), unit(N, C, seed=1), unit(N, n, C, seed=2), unit(K, C, seed=3).T
    logits = contrastive_logits(q, k, t, queue, T, alpha)
    assert logits.shape == (N, 1 + K + n)

    def dot(a, b):
        return sum(x * y for x, y in zip(a.tolist(), b.tolist()))

    for i in range(N):
        expected = [dot(q[i], k[i]) / T] + [dot(q[i], queue[:, j]) / T for j in range(K)]
        expected += [alpha * dot(q[i], t[i, j]) / T for j in range(n)]
        assert logits[i].tolist() == pytest.approx(expected, abs=1e-5)


def test_no_gradient_reaches_keys_negatives_or_key_encoder():
    model = build(dim=8, K=16)
    images = torch.randn(4, 3, 32, 32)
    key, negatives = images.clone().requires_grad_(), images.unsqueeze(1).clone().requires_grad_()
    logits, labels = model(images, key, negatives)
    F.cross_entropy(logits, labels).backward()
    assert key.grad is None and negatives.grad is None
    assert all(p.grad is None for p in model.encoder_k.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder_q.fc.parameters())


class Flat(nn.Module):
    """The smallest encoder: one linear layer."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(12, num_classes)

    def forward(self, images):
        return self.fc(images.flatten(1))


@pytest.mark.parametrize("K, batch", [(10, 4), (7, 3), (5, 12), (6, 6), (1, 4)])
def test_queue_wraps_exactly_for_any_batch_and_length(K, batch):
    model = MoCo(Flat, dim=4, K=K)
    expected, pointer = model.queue.clone(), 0
    for step in range(6):
        images = fill(f"k{step}", (batch, 3, 2, 2))
        model(images, images, images[:, None][:, :0])
        for key in F.normalize(model.encoder_k(images), dim=1):  # the plain ring buffer
            expected[:, pointer] = key
            pointer = (pointer + 1) % K
        assert torch.equal(model.queue, expected)
        assert model.queue_ptr.tolist() == [pointer]


def test_similarities_tell_collapse_from_spread():
    spread, collapsed = unit(1000, 64), unit(1, 64).expand(1000, -1)
    queue = unit(100, 64, seed=5).T
    told = similarities(spread, spread, -spread.unsqueeze(1), queue)
    assert told["q_k"].item() == pytest.approx(1, abs=1e-5) and told["q_t"].item() == pytest.approx(-1, abs=1e-5)
    assert told["spread"].item() > 0.95
    assert told["q_queue"].item() == pytest.approx((spread @ queue).mean().item(), abs=1e-6)
    told = similarities(collapsed, collapsed, collapsed[:, None][:, :0], queue)
    assert told["spread"].item() == pytest.approx(0, abs=1e-5) and "q_t" not in told


def test_state_dict_has_the_published_names():
    state = build("resnet18", dim=16, K=8, mlp=True).state_dict()
    assert state["queue"].shape == (16, 8)
    assert state["queue_ptr"].shape == (1,) and state["queue_ptr"].dtype == torch.long
    rest = {name for name in state if not name.startswith(("encoder_q.", "encoder_k."))}
    assert rest == {"queue", "queue_ptr"}
    assert state["encoder_q.fc.0.weight"].shape == (512, 512) and state["encoder_q.fc.2.weight"].shape == (16, 512)


SHAPES = {"q": (4, 8), "k": (4, 8), "t": (4, 2, 8), "queue": (8, 16)}


@pytest.mark.parametrize("name, shape", [
    ("q", (4, 1, 8)), ("q", (8,)), ("q", (3, 8)), ("k", (1, 8)), ("k", (8,)), ("t", (4, 8)), ("t", (1, 2, 8)),
    ("t", (4, 2, 9)), ("queue", (16, 8)), ("queue", (8,))])  # fmt: skip
def test_features_of_other_shapes_which_could_broadcast_are_refused(name, shape):
    features = {key: unit(*size) for key, size in (SHAPES | {name: shape}).items()}
    with pytest.raises(ValueError) as refusal:
        contrastive_logits(*features.values(), 0.2, 2.0)
    assert f"{name} {shape}" in str(refusal.value) and "q (N, C), k (N, C), t (N, n, C)" in str(refusal.value)


@pytest.mark.parametrize("shapes", [
    [(3, 2, 2), (3, 2, 2), (1, 3, 2, 2)], [(2, 3, 2, 2), (2, 3, 2, 2), (2, 3, 2, 2)],
    [(2, 3, 2, 2), (3, 3, 2, 2), (2, 1, 3, 2, 2)], [(2, 3, 2, 2), (2, 3, 2, 2), (1, 1, 3, 2, 2)]])  # fmt: skip
def test_images_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="im_q.*im_k.*im_t") as refusal:
        MoCo(Flat, dim=8, K=16)(*map(torch.zeros, shapes))
    assert ", ".join(map(str, shapes)) in str(refusal.value)


def test_an_encoder_without_fc_is_told_how_to_get_one():
    with pytest.raises(ValueError, match="VisionTransformer has no last linear layer fc: docs/own-loop.md"):
        MoCo(lambda num_classes: torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 8), dim=8, K=16)
