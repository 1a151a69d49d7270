import pytest
import torch
from conftest import write_folder

from moco import checkpoint, classifier, datasets, loader
from moco.builder import build_encoder
from moco.distributed import DistContext
from moco.errors import UsageError


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    state = build_encoder("resnet10", 5).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def test_probe_has_the_given_backbone_frozen_and_a_new_head(backbone):
    torch.manual_seed(1)
    model = classifier.build_probe("resnet10", 400, backbone)
    assert classifier.changed_entries(model, backbone) == []
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    assert model.fc.weight.shape == (400, 256) and not model.fc.bias.any()
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("name", ["stem.0.0.weight", "stages.1.bn1.running_mean", "stem.0.1.num_batches_tracked"])
def test_a_changed_weight_or_statistic_is_noticed(backbone, name):
    model = classifier.build_probe("resnet10", 4, backbone)
    model.state_dict()[name].add_(1)
    assert classifier.changed_entries(model, backbone) == [name]


def test_a_backbone_of_another_architecture_is_refused(backbone):
    with pytest.raises(UsageError, match="does not fit"):
        classifier.build_probe("resnet18", 4, backbone)


def linear_checkpoint(width, **extra):
    return {"arch": "resnet10", "state_dict": checkpoint.add_prefix(build_encoder("resnet10", width).state_dict()), **extra}


def test_a_head_is_scored_only_on_its_own_classes():
    data = ["a", "b", "c"]
    classifier.check_classes(linear_checkpoint(3, wnids=data), data, "file")
    classifier.check_classes(linear_checkpoint(1000), data, "file")   # published: 1000 outputs, classes unsaid
    for saved, fault in ((linear_checkpoint(3, wnids=["a", "b", "x"]), "3 other classes than the 3"),
                         (linear_checkpoint(1000, wnids=["a", "b"]), "2 other classes"),
                         (linear_checkpoint(2), "2 outputs, the data 3 classes"),
                         ({"arch": "resnet10", "state_dict": {"queue": torch.ones(1)}}, "no linear head")):
        with pytest.raises(UsageError, match=fault):
            classifier.check_classes(saved, data, "file")


def test_a_linear_checkpoint_loads_with_a_head_as_wide_as_its_own(tmp_path):
    saved = linear_checkpoint(1000, best_acc1=torch.tensor(77.0))
    torch.save(saved, tmp_path / "model_best_0199.pth.tar")
    model, loaded = classifier.load_classifier(tmp_path / "model_best_0199.pth.tar")
    assert model.fc.out_features == 1000 and not model.training and loaded["best_acc1"] == 77
    assert torch.equal(model.fc.weight, saved["state_dict"]["module.fc.weight"])


class ByBrightness(torch.nn.Module):
    """Predicts class 1 for bright images, else class 0."""

    def forward(self, images):
        bright = images.mean(dim=(1, 2, 3)) > 0
        return torch.stack([~bright, bright, torch.zeros_like(bright)], dim=1).float()


def test_evaluate_counts_every_image_once(tmp_path):
    paths, labels, _ = datasets.list_images(write_folder(tmp_path) / "train")
    dataset = loader.StrictDataset(paths, labels, loader.eval_transform(16))
    batches = loader.eval_loader(dataset, 5, 0, DistContext())
    model = ByBrightness()
    (result,) = classifier.evaluate(lambda images: [model(images)], batches, torch.device("cpu"))
    bright = [classifier.to_input(dataset[i][0][None], torch.device("cpu")).mean().item() > 0 for i in range(16)]
    correct = sum(guess == label for guess, label in zip(bright, labels))
    assert result == {"acc1": 100 * correct / 16, "acc5": 100.0, "n": 16}
