"""The published code's losses, and the method once more in plain loops: what moco/builder.py must equal."""

import json

import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import REPOSITORY, fill, fill_encoder

from moco import distributed
from moco.builder import MoCo
from moco.encoders import build_encoder

# The losses and first-row logits of the published code in float64, for weights and images that `fill` gives
GOLDEN = json.loads((REPOSITORY / "tests/data/moco_reference.json").read_text())


def build(arch="resnet10", **settings):
    return MoCo(lambda num_classes: build_encoder(arch, num_classes), **settings)


def golden_images(case, i, world=1):
    """The global batch of step i: query, key and negatives."""
    shape = (world * case["batch"], 3, case["size"], case["size"])
    im_q = fill(f"q{i}", shape)
    views = im_q, 0.8 * im_q + 0.2 * fill(f"k{i}", shape), fill(f"t{i}", (shape[0], case["n"], *shape[1:]))
    return [view.double() for view in views]


def golden_model(case):
    model = build(case["arch"], **{name: case[name] for name in ("dim", "K", "m", "T", "mlp", "alpha")})
    fill_encoder(model.encoder_q)
    fill_encoder(model.encoder_k)
    model.queue.copy_(F.normalize(fill("queue", model.queue.shape), dim=0))
    return model.double()


def golden_steps(case, model, steps=None, ctx=distributed.DistContext()):  # noqa: B008
    """Train as the file's rule says. Returns this rank's losses, logits and queue pointers of every step."""
    ddp_model = distributed.wrap_ddp(model, ctx.device)
    optimizer = torch.optim.SGD(model.parameters(), case["lr"], momentum=0.9, weight_decay=1e-4, fused=True)
    result = {"loss": [], "logits": [], "queue_ptr": []}
    for i in range(steps or case["steps"]):
        images = golden_images(case, i, ctx.world_size)
        logits, labels = ddp_model(*(views.chunk(ctx.world_size)[ctx.rank].to(ctx.device) for views in images))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result["loss"].append(loss.item())
        result["logits"].append(logits.detach().cpu())
        result["queue_ptr"].append(model.queue_ptr.item())
    return result


# An independent oracle: all ranks in one process, in plain loops


def arrangement(n, **_):
    """In place of torch.randperm."""
    return (torch.arange(n) * 5 + 3) % n if n % 5 else torch.arange(n).flip(0)


def oracle_encoder(case):
    encoder = build_encoder(case["arch"], case["dim"])
    if case["mlp"]:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    fill_encoder(encoder)
    return encoder.double()


def oracle_keys(encoder, images, world):
    """The keys of a global batch, whose rows were dealt to the ranks in another order."""
    order = arrangement(len(images)).tolist() if world > 1 else range(len(images))
    batch, keys = len(images) // world, [None] * len(images)
    for rank in range(world):
        rows = order[rank * batch : (rank + 1) * batch]
        for row, feature in zip(rows, encoder(torch.stack([images[row] for row in rows]))):
            keys[row] = feature / feature.norm()
    return keys


def oracle_steps(case, world):
    """[{"loss", "logits", "queue_ptr"} of every step] of each rank."""
    encoder_q, encoder_k = oracle_encoder(case), oracle_encoder(case)
    parameters, momenta = list(encoder_q.parameters()), {}
    queue = list(F.normalize(fill("queue", (case["dim"], case["K"])), dim=0).double().T)  # a list of keys
    pointer, batch = 0, case["batch"]
    result = [{"loss": [], "logits": [], "queue_ptr": []} for _ in range(world)]
    for i in range(case["steps"]):
        im_q, im_k, im_t = golden_images(case, i, world)
        queries = [encoder_q(im_q[rank * batch : (rank + 1) * batch]) for rank in range(world)]
        with torch.no_grad():
            for key, query in zip(encoder_k.parameters(), parameters):
                key.copy_(case["m"] * key + (1 - case["m"]) * query)
            keys = oracle_keys(encoder_k, im_k, world)
            negatives = [oracle_keys(encoder_k, im_t[:, j], world) for j in range(case["n"])]
        losses = []
        for rank in range(world):
            logits = []
            for row, q in enumerate(F.normalize(queries[rank], dim=1), rank * batch):
                products = [
                    q @ keys[row],
                    *(q @ old for old in queue),
                    *(case["alpha"] * (q @ t[row]) for t in negatives),
                ]
                logits.append(torch.stack(products) / case["T"])
            losses.append(sum(row.exp().sum().log() - row[0] for row in logits) / batch)
            result[rank]["loss"].append(losses[rank].item())
            result[rank]["logits"].append(torch.stack(logits).detach())
        gradients = torch.autograd.grad(sum(losses) / world, parameters)
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients)):
                gradient = gradient + 1e-4 * parameter
                momenta[number] = 0.9 * momenta[number] + gradient if number in momenta else gradient
                parameter -= case["lr"] * momenta[number]
        for key in keys:
            queue[pointer] = key
            pointer = (pointer + 1) % case["K"]
        for rank in range(world):
            result[rank]["queue_ptr"].append(pointer)
    return result
