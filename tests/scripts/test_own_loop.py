"""docs/own-loop.md: its blocks run as printed and compute what the page says; the package can be installed."""

import copy
import importlib.util
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ENVIRONMENT, PROBE, REPOSITORY, run_script, unit

from moco.builder import MoCo, contrastive_logits
from moco.encoders import ResNet10
from moco.training import checkpoint

PAGE = (REPOSITORY / "docs" / "own-loop.md").read_text()
SETTINGS = {"dim": 128, "K": 4096, "m": 0.99, "T": 0.2, "mlp": True, "alpha": 2}


def blocks(heading):
    """The indented blocks of Python in a section of the page."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", section, re.MULTILINE)
    return [textwrap.dedent(block) for block in found if "import " in block]


def start():
    """A model, as all blocks begin with, and two batches; the queue is lightly's for this seed."""
    torch.manual_seed(0)
    model = MoCo(ResNet10, **SETTINGS)
    model.queue.copy_(unit(4096, 128).T)
    return model, [(torch.randn(4, 3, 80, 80), torch.randn(4, 3, 80, 80)) for _ in range(2)]


def run_loop(block, model, **more):
    """The loss of the last batch in a loop with the model's encoders."""
    encoder_q, encoder_k = copy.deepcopy(model.encoder_q), copy.deepcopy(model.encoder_k)
    optimizer = torch.optim.SGD(encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    # The loop drops the last columns, the model its first ones.
    names = {"encoder_q": encoder_q, "encoder_k": encoder_k, "optimizer": optimizer, "queue": model.queue.flip(1)}
    exec(block, names := names | more)
    return names["loss"].item()


def test_the_lines_in_the_readme_give_the_paper_s_loss():
    block = (REPOSITORY / "README.md").read_text().split("16 to 72 px:\n\n")[1].split("\n\n")[0]
    names = {"queries": torch.rand(3, 3, 224, 224), "keys": torch.rand(3, 3, 224, 224), "queue": unit(5, 8).T}
    encoders = dict.fromkeys(("encode_q", "encode_k"), lambda x: F.normalize(x[:, 0, 0, :8]))
    exec(textwrap.dedent(block), names | encoders, names)
    logits = contrastive_logits(*(names[each] for each in ("q", "k", "t", "queue")), 0.2, 2)
    assert names["loss"].isclose(F.cross_entropy(logits, torch.zeros(3, dtype=torch.long)))


@pytest.fixture(scope="module")
def reference():
    """The loss of the second of two steps of MoCo itself, in the loop as printed."""
    (block,) = blocks("With the model of this project")
    model, batches = start()
    names = {"base_encoder": ResNet10, "batches": batches}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moco.builder.MoCo", lambda base_encoder, **settings: settings == SETTINGS and model)
        exec(block, names)
    assert 1 < names["loss"].item() < 20
    return names["loss"].item()


def test_a_loop_with_the_six_lines_has_the_models_loss(reference):
    (block,) = blocks("In a loop that you have")
    assert block.count("# NS") == 6
    model, batches = start()
    assert run_loop(block, model, batches=batches) == pytest.approx(reference, abs=2e-4)
    without = run_loop(block.replace("alpha=2", "alpha=0"), model, batches=batches)
    assert abs(without - reference) > 2e-3


def test_a_loop_with_lightly_has_the_models_loss(monkeypatch, reference):
    memory_bank = pytest.importorskip("lightly.loss.memory_bank")
    (block,) = blocks("With lightly")
    model, batches = start()

    class Bank(memory_bank.MemoryBankModule):  # starts with the queue of the others
        def __init__(self, size):
            super().__init__(size)
            self.bank.copy_(model.queue.T)

    monkeypatch.setattr(memory_bank, "MemoryBankModule", Bank)
    loader = [(batch, None, None) for batch in batches]
    assert run_loop(block, model, loader=loader) == pytest.approx(reference, abs=2e-4)


def test_without_negatives_the_loss_is_lightlys():
    loss = pytest.importorskip("lightly.loss")
    criterion = loss.NTXentLoss(temperature=0.2, memory_bank_size=(64, 16))
    queue = criterion.memory_bank.bank.T.clone()
    q, k = unit(8, 16, seed=1), unit(8, 16, seed=2)
    logits = contrastive_logits(q, k, torch.empty(8, 0, 16), queue, 0.2, 2.0)
    torch.testing.assert_close(F.cross_entropy(logits, torch.zeros(8, dtype=torch.long)), criterion(q, k))


def exported(arch, folder):
    """The headless query encoder of a pre-training checkpoint, after exporting it to `folder`/ARCH.pth."""
    encoder = torchvision.models.get_model(arch, num_classes=128)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    state = {f"encoder_q.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"arch": arch, "state_dict": checkpoint.add_prefix(state)}, folder / "checkpoint_0000.pth.tar")
    run_script(PROBE, "--pretrained", folder / "checkpoint_0000.pth.tar", "--export-backbone", folder / f"{arch}.pth")
    encoder.fc = torch.nn.Identity()
    return encoder.eval()


ARCHS = ["resnet18", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("resnet50", "resnext50_32x4d"))]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_exported_backbone_has_equal_features_in(library, arch, tmp_path):
    pytest.importorskip(library)
    (block,) = (each for each in blocks("The backbone in torchvision and timm") if f"import {library}\n" in each)
    encoder, names = exported(arch, tmp_path), {}
    exec(block.replace("resnet50", arch), names)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(images), encoder(images))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_the_package_can_be_installed_without_its_scripts(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in ("moco", "docs", "preprocess", "tests"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("*.py", "*.toml", "*.txt", "*.md", "LICENSE"):
        for path in REPOSITORY.glob(pattern):
            shutil.copy(path, source)
    install = "-m pip install -q --no-deps --no-build-isolation --no-index --disable-pip-version-check . --target"
    subprocess.run([sys.executable, *install.split(), target], cwd=source, check=True)
    assert {path.name for path in target.iterdir()} == {"moco", "non_semantic_negatives-0.dist-info"}
    metadata = (target / "non_semantic_negatives-0.dist-info" / "METADATA").read_text()
    for line in (REPOSITORY / "requirements.txt").read_text().split():
        assert f"Requires-Dist: {line}\n" in metadata
    program = "from moco import builder; from moco.evaluation import paper; print(builder.__file__, len(paper.rows()))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(target)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == [str(target / "moco" / "builder.py"), "9"]
