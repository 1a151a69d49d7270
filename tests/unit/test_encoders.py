import pytest
import torch
from helpers import same

from moco.builder import MoCo
from moco.encoders import ARCHS, DTYPES, build_encoder, check_input, configure_device
from moco.errors import UsageError


def moco(dtype):
    torch.manual_seed(0)
    return MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=8, K=16, mlp=True, dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # the checks before a run build it on the meta device
@pytest.mark.parametrize("arch", ["resnet10", "resnet18", "regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_every_family_ends_in_fc_of_the_given_width(arch, device):
    assert arch in ARCHS
    with torch.device(device):
        encoder = build_encoder(arch, 7)
        features = encoder(torch.randn(2, 3, 64, 64))
    assert encoder.fc.out_features == 7 and features.shape == (2, 7)
    assert {value.device.type for value in encoder.state_dict().values()} == {device}


def test_head_and_features_of_a_two_byte_encoder_are_fp32():
    model = moco(torch.bfloat16)
    seen = []
    for layer in (model.encoder_q.stages, *model.encoder_q.fc):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    logits, _ = model(*(torch.randn(4, 3, 32, 32) for _ in range(2)), torch.randn(4, 0, 3, 32, 32))
    assert seen == [torch.bfloat16, *[torch.float32] * 3] and logits.dtype == torch.float32
    assert "encoder_q.fc.2.weight" in model.state_dict()


def test_a_model_has_the_same_weights_in_every_precision():
    first, *others = (moco(dtype).state_dict() for dtype in DTYPES.values())
    assert len(others) == 2 and all(same(first, state) for state in others)


@pytest.mark.parametrize("arch, batch, size", [("resnet10", 1, 1), ("resnet18", 1, 32), ("shufflenet_v2_x0_5", 4, 0)])
def test_images_that_an_encoder_cannot_take_are_refused(arch, batch, size):
    with torch.device("meta"):
        encoder = build_encoder(arch, 7)
    check_input(encoder, arch, 4, 64)
    with pytest.raises(UsageError, match=f"--arch {arch} does not accept {batch} images of {size} px"):
        check_input(encoder, arch, batch, size)


def test_a_device_computes_as_the_options_say(monkeypatch):
    for name in ("deterministic", "benchmark"):  # restores them
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    for deterministic in (True, False):
        configure_device(torch.device("cuda"), False, deterministic)
        assert torch.backends.cudnn.deterministic == deterministic == (not torch.backends.cudnn.benchmark)


@pytest.fixture
def tf32():
    """Restores these settings."""
    places = torch.backends, torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [each.fp32_precision for each in places]
    yield
    torch.set_float32_matmul_precision("highest")
    for each, value in zip(places, before):
        each.fp32_precision = value


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch below 2.9 has one setting for cuDNN")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("asked", ["nothing", "all", "products", "products, as before 2.9"])
def test_strict_fp32_is_without_tf32_and_otherwise_the_surroundings_decide(tf32, strict, asked):
    conv, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    if asked == "all":
        torch.backends.fp32_precision = "tf32"
    elif asked == "products":
        products.fp32_precision = "tf32"
    elif asked != "nothing":  # what NVIDIA's containers do by environment
        torch.set_float32_matmul_precision("high")
    before = conv.fp32_precision, products.fp32_precision
    configure_device(torch.device("cuda"), strict, deterministic=True)
    assert (conv.fp32_precision, products.fp32_precision) == (("ieee", "ieee") if strict else before)
