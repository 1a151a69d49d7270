import pytest
import torch
import torch.nn as nn

from moco.builder import MoCo
from moco.encoders import ARCHS, DTYPES, autocast, build_encoder, check_input, configure_device, float32_linear
from moco.errors import UsageError

FAMILIES = pytest.mark.parametrize("arch", ["resnet10", "resnet18", "regnet_y_400mf", "shufflenet_v2_x0_5"])


@FAMILIES
def test_every_family_ends_in_fc_of_the_given_width(arch):
    assert arch in ARCHS
    encoder = build_encoder(arch, 7)
    assert encoder.fc.out_features == 7
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_head_and_features_of_a_two_byte_encoder_are_fp32():
    model = MoCo(
        lambda num_classes: build_encoder("resnet10", num_classes), dim=8, K=16, mlp=True, dtype=torch.bfloat16
    )
    seen = []
    for layer in (model.encoder_q.stages, *model.encoder_q.fc):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    logits, _ = model(*(torch.randn(4, 3, 32, 32) for _ in range(2)), torch.randn(4, 0, 3, 32, 32))
    assert seen == [torch.bfloat16, *[torch.float32] * 3] and logits.dtype == torch.float32
    assert "encoder_q.fc.2.weight" in model.state_dict()


def test_a_float32_linear_shares_the_layers_weights_and_names():
    layer = nn.Linear(3, 2)
    random_state = torch.get_rng_state()
    head = float32_linear(layer)
    assert torch.equal(torch.get_rng_state(), random_state)  # a seeded run draws the same weights in every precision
    assert head.weight is layer.weight and head.bias is layer.bias
    assert head.state_dict().keys() == layer.state_dict().keys() == {"weight", "bias"}
    x = torch.randn(4, 3)
    with autocast(x.device, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        full = head(x)
    torch.testing.assert_close(full, layer(x))


def test_a_model_has_the_same_weights_in_every_precision():
    states = []
    for dtype in DTYPES.values():
        torch.manual_seed(0)
        model = MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=8, K=16, mlp=True, dtype=dtype)
        states.append(model.state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


@FAMILIES
def test_every_family_can_be_built_on_the_meta_device(arch):
    """The checks before a run build it there."""
    with torch.device("meta"):
        encoder = build_encoder(arch, 7)
    assert {value.device.type for value in encoder.state_dict().values()} == {"meta"}
    assert encoder.eval()(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("arch, batch, size", [("resnet10", 1, 1), ("resnet18", 1, 32), ("shufflenet_v2_x0_5", 4, 0)])
def test_images_that_an_encoder_cannot_take_are_refused(arch, batch, size):
    with torch.device("meta"):
        encoder = build_encoder(arch, 7)
    check_input(encoder, arch, 4, 64)
    with pytest.raises(UsageError, match=f"--arch {arch} does not accept {batch} images of {size} px"):
        check_input(encoder, arch, batch, size)


def test_a_device_computes_as_the_options_say(monkeypatch):
    for name in ("allow_tf32", "deterministic", "benchmark"):  # restores them
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    for strict, deterministic in ((True, False), (False, True)):
        configure_device(torch.device("cuda"), strict, deterministic)
        assert torch.backends.cudnn.allow_tf32 == (not strict)
        assert torch.backends.cudnn.deterministic == deterministic == (not torch.backends.cudnn.benchmark)
