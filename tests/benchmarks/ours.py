"""The project's side of the benchmarks: its training step alone, and its pre-training script."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from moco.builder import MoCo
from moco.encoders import DTYPES, build_encoder
from tests.benchmarks import plain

REPOSITORY = Path(__file__).resolve().parents[2]
METHOD = ["--mlp", "--aug-plus", "--moco-t", plain.T, "--alpha", plain.ALPHA]


class Training:
    """Model, optimizer and training step of moco-non-sem-neg.py, on one device."""

    def __init__(self, arch, precision, device="cpu", compiled=False, K=plain.K):
        self.model = MoCo(
            lambda num_classes: build_encoder(arch, num_classes),
            K=K, T=plain.T, mlp=True, alpha=plain.ALPHA, dtype=DTYPES[precision],
        ).to(device, memory_format=torch.channels_last)  # fmt: skip
        if compiled:
            self.model.encoder_q.compile()
            self.model.encoder_k.compile()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=True)

    def step(self, query, key, negatives):
        logits, labels = self.model(query, key, negatives)
        self.optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        self.optimizer.step()


def run(*command):
    """stdout of a Python script of the repository."""
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout


def pretrain(data, *options):
    """The last line of the log of moco-non-sem-neg.py."""
    with tempfile.TemporaryDirectory() as out:
        run("moco-non-sem-neg.py", *METHOD, *options, "--ckpt_path", out, data)
        return json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])


def row(*cells):
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
