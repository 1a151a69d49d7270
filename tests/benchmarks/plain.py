"""Pre-training written in the obvious way: the baseline of the benchmarks.

PIL, torchvision's transforms one photo at a time, a Python loop for the patches, fp32 in PyTorch's default layout, a
loop over the weights for the momentum update, SGD one weight at a time. Same method, same sizes. Also a script:

    python tests/benchmarks/plain.py ARCH BATCH WORKERS EPOCHS DIR

prints the images per second of the last epoch, on a GPU if there is one.
"""

import random
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms as transforms
from PIL import ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.models import get_model

SIZE, PATCH_SIDES, K, T, M, ALPHA = 224, (16, 72), 65536, 0.2, 0.999, 2


class Blur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


VIEW = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([Blur()], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def patch_negative(image):
    side = random.randint(*PATCH_SIDES)
    rows = []
    for _ in range(SIZE // side + 1):
        row = []
        for _ in range(SIZE // side + 1):
            top, left = random.randint(0, SIZE - side), random.randint(0, SIZE - side)
            row.append(image[:, top : top + side, left : left + side])
        rows.append(torch.cat(row, dim=2))
    return torch.cat(rows, dim=1)[:, :SIZE, :SIZE]


class Views(Dataset):
    """(query, key, negative) of each photo, ready for the network."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        photo = pil_loader(self.paths[index])
        query = VIEW(photo)
        return query, VIEW(photo), patch_negative(query)


class Trainer:
    def __init__(self, arch, device="cpu"):
        self.query_encoder, self.key_encoder = (get_model(arch, num_classes=128) for _ in range(2))
        for encoder in (self.query_encoder, self.key_encoder):
            width = encoder.fc.in_features
            encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
            encoder.to(device)
        self.key_encoder.load_state_dict(self.query_encoder.state_dict())
        self.queue = F.normalize(torch.randn(128, K, device=device), dim=0)
        self.position = 0
        settings = {"momentum": 0.9, "weight_decay": 1e-4, "foreach": False}
        self.optimizer = torch.optim.SGD(self.query_encoder.parameters(), 0.03, **settings)

    def step(self, query, key, negative):
        q = F.normalize(self.query_encoder(query), dim=1)
        with torch.no_grad():
            for slow, fast in zip(self.key_encoder.parameters(), self.query_encoder.parameters()):
                slow.data = slow.data * M + fast.data * (1 - M)
            k = F.normalize(self.key_encoder(key), dim=1)
            t = F.normalize(self.key_encoder(negative), dim=1)
        positives = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
        negatives = torch.einsum("nc,ck->nk", q, self.queue.clone())
        textures = ALPHA * torch.einsum("nc,nc->n", q, t).unsqueeze(1)
        logits = torch.cat([positives, negatives, textures], dim=1) / T
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue[:, self.position : self.position + len(k)] = k.T
        self.position = (self.position + len(k)) % K
        return loss.item()


def main():
    arch, batch, workers, epochs, directory = sys.argv[1:]
    paths = [path for path, _ in ImageFolder(Path(directory, "train")).samples]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer, batch = Trainer(arch, device), int(batch)
    loader = DataLoader(Views(paths), batch, shuffle=True, num_workers=int(workers), drop_last=True)
    for _ in range(int(epochs)):
        start = time.perf_counter()
        for query, key, negative in loader:
            trainer.step(query.to(device), key.to(device), negative.to(device))
        speed = len(loader) * batch / (time.perf_counter() - start)
    print(speed)


if __name__ == "__main__":
    main()
