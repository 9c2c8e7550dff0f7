"""To other libraries a packed layer is a linear layer or a 1x1 convolution, with a weight that cannot be written."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization import ActivationScheme, PackedLayer, WeightScheme, convert, prepare
from fbqat_hub.quantization.convert import quantizable

LAYERS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), nn.Linear, (5, 6), torch.randn(2, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), nn.Linear, (5, 6), torch.randn(2, 6)),
    "convolution": (lambda: nn.Conv2d(6, 5, 1), nn.Conv2d, (5, 6, 1, 1), torch.randn(2, 6, 3, 3)),
}


def pack(layer: nn.Module) -> PackedLayer:
    model = nn.Sequential(layer)
    prepare(model, WeightScheme(), ActivationScheme())
    convert(model)
    assert isinstance(model[0], PackedLayer)
    return model[0]


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[PackedLayer, type[nn.Module], tuple[int, ...], Tensor]:
    torch.manual_seed(0)
    make, kind, shape, x = LAYERS[request.param]
    return pack(make()), kind, shape, x


def test_a_packed_layer_is_what_it_was(case) -> None:
    layer, kind, shape, _ = case
    assert isinstance(layer, kind)
    assert sum(isinstance(layer, each) for each in (nn.Linear, nn.Conv2d)) == 1
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == (shape, torch.float32, "cpu")
    assert quantizable(nn.Sequential(layer)) == {}


def test_the_view_has_the_dequantized_values(case) -> None:
    layer, _, shape, _ = case
    expected = layer.dequantize().reshape(shape)
    for read in (layer.weight + 0, layer.weight.data.clone(), layer.weight.detach() * 1, torch.cat([layer.weight])):
        assert type(read) is Tensor
        assert torch.equal(read, expected)
    assert torch.linalg.norm(layer.weight) == torch.linalg.norm(expected)
    assert (expected.clone() + layer.weight.data).sum() == 2 * expected.sum()
    kept = {"weight_packed", "weight_scale"} | ({"bias"} if layer.bias is not None else set())
    assert set(layer.state_dict()) == kept
    assert {name for name, _ in layer.named_parameters()} == kept - {"weight_scale"}
    assert torch.equal(layer.to_float().weight, expected)


def add_in_place(layer: PackedLayer) -> None:
    layer.weight.data += torch.ones_like(layer.weight)


def assign_data(layer: PackedLayer) -> None:
    layer.weight.data = torch.ones(layer.weight.shape)


def assign(layer: PackedLayer) -> None:
    layer.weight = torch.ones(layer.weight.shape)


def assign_parameter(layer: PackedLayer) -> None:
    layer.weight = nn.Parameter(torch.ones(layer.weight.shape))


WRITES = [
    add_in_place,
    assign_data,
    assign,
    assign_parameter,
    lambda layer: layer.weight.copy_(torch.ones(layer.weight.shape)),
    lambda layer: layer.weight.zero_(),
    lambda layer: torch.mul(torch.ones(1), 2, out=layer.weight),
    lambda layer: nn.init.normal_(layer.weight),
    lambda layer: layer.reset_parameters(),
]


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_a_write_is_refused_and_changes_nothing(write: Callable[[PackedLayer], object], case) -> None:
    """It would change a temporary tensor and be lost."""
    layer, _, _, x = case
    before = layer(x)
    with pytest.raises(ValueError, match="cannot be written: it is stored as codes and scales"):
        write(layer)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_the_layer(copied: Callable[[PackedLayer], PackedLayer], case) -> None:
    layer, kind, shape, x = case
    twin = copied(layer)
    assert isinstance(twin, kind)
    assert twin.weight.shape == shape
    assert torch.equal(twin(x), layer(x))


def test_the_view_has_the_dtype_and_device_of_the_model(case) -> None:
    layer = case[0]
    assert copy.deepcopy(layer).bfloat16().weight.dtype == torch.bfloat16
    assert copy.deepcopy(layer).to("meta").weight.device.type == "meta"


@torch.no_grad()
def test_what_is_fused_is_added_beside_the_codes(case) -> None:
    layer, _, _, x = case
    before, codes = layer(x), layer.codes()
    weight = layer.real_weight()
    layer.delta_down, layer.delta_up = 1e-3 * torch.randn(2, 6), torch.randn(5, 2)
    assert torch.equal(layer.real_weight(), weight + layer.delta_up @ layer.delta_down)
    float_layer = layer.to_float()
    change = float_layer(x) - nn_output(layer, weight, x)
    torch.testing.assert_close(layer(x) - before, change, rtol=0, atol=1e-5)
    assert (layer(x) - before).abs().max() > 1e-4
    layer.delta_down = layer.delta_up = None
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.codes(), codes)


def nn_output(layer: PackedLayer, weight: Tensor, x: Tensor) -> Tensor:
    float_layer = layer.to_float()
    float_layer.weight.copy_(weight.reshape(float_layer.weight.shape))
    return float_layer(x)


def test_a_packed_model_is_not_quantized_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prepare(model, WeightScheme(), ActivationScheme(), not_convert=["1"])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"quantized already \(0 is a .*\); start from the float model"):
            prepare(model, WeightScheme(), ActivationScheme())
        convert(model) if not isinstance(model[0], PackedLayer) else None


def test_what_is_compiled_reads_it(case) -> None:
    """Z-Image and T5 ask a layer's weight for its dtype."""
    layer, _, _, x = case

    def ask(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x.to(layer.weight.dtype)), layer.weight * 2

    expected = ask(x)
    torch._dynamo.reset()
    for found, wanted in zip(torch.compile(ask, fullgraph=True, backend="eager")(x), expected, strict=True):
        assert torch.equal(found, wanted)
    torch._dynamo.reset()
