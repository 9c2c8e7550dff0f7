"""prepare -> calibrate -> set_bit_width -> convert over a whole tree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fbqat_hub.quantization import (
    ActivationScheme,
    FakeQuantizedLinear,
    FakeQuantizedPointwiseConv2d,
    PackedLayer,
    PackedLinear,
    PackedPointwiseConv2d,
    Rounding,
    WeightScheme,
    calibrate,
    convert,
    converted,
    named_layers,
    prepare,
    quantization_disabled,
    set_bit_width,
    stored_bits_per_weight,
)
from fbqat_hub.quantization.clip import mse_clip
from fbqat_hub.quantization.convert import matches, targets

LAYERS = ["blocks.0.to_q", "blocks.0.to_out", "blocks.1.to_q", "blocks.1.to_out", "inverted", "pointwise", "proj_out"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out(nn.functional.gelu(self.to_q(x)))


class Tree(nn.Module):
    """Linear layers, 1x1, 3x3 and depthwise convolutions, a norm, and a layer of an odd number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(12)
        self.inverted = nn.Conv2d(12, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.strided = nn.Conv2d(8, 8, 1, stride=2)
        self.pointwise = nn.Conv2d(8, 6, 1, bias=False)
        self.conv3 = nn.Conv2d(6, 5, 3, padding=1)
        self.proj_out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).movedim(-1, 1)
        x = self.pointwise(self.strided(self.depthwise(self.inverted(x))))
        return self.proj_out(self.conv3(x).movedim(1, -1))


@pytest.fixture
def tree() -> Tree:
    torch.manual_seed(0)
    return Tree()


def batch(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 4, 12, generator=torch.Generator().manual_seed(seed))


def prepared(tree: Tree, activations: ActivationScheme, overrides: Any = None, **weights: Any) -> list[str]:
    names = prepare(tree, WeightScheme(**weights), activations, overrides=overrides)
    calibrate(tree, [{"x": batch(seed)} for seed in (1, 2)])
    return names


def test_prepare_takes_linear_layers_and_pointwise_convolutions_only(tree: Tree) -> None:
    assert prepare(tree, WeightScheme(), ActivationScheme()) == LAYERS
    assert [name for name, _ in named_layers(tree, FakeQuantizedLinear)] == LAYERS
    assert [name for name, _ in named_layers(tree, FakeQuantizedPointwiseConv2d)] == ["inverted", "pointwise"]
    assert type(tree.depthwise) is type(tree.strided) is type(tree.conv3) is nn.Conv2d


def test_prepare_copies_the_weights_in_float32() -> None:
    tree = Tree().bfloat16()
    before = {name: parameter.clone() for name, parameter in tree.named_parameters()}
    prepare(tree, WeightScheme(), ActivationScheme())
    for name in LAYERS:
        weight = tree.get_parameter(f"{name}.weight")
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[f"{name}.weight"].float())


def test_patterns_leave_layers_alone(tree: Tree) -> None:
    names = prepare(tree, WeightScheme(), ActivationScheme(), not_convert=["blocks.*.to_q", "proj_out"])
    assert names == ["blocks.0.to_out", "blocks.1.to_out", "inverted", "pointwise"]
    assert type(tree.proj_out) is type(tree.blocks[1].to_q) is nn.Linear


def test_patterns_are_case_sensitive_and_cover_the_whole_name() -> None:
    assert matches("blocks.0.to_q", ["*.to_[qk]"])
    assert not matches("blocks.0.to_q", ["to_q", "*.TO_Q", "blocks.0"])


@pytest.mark.parametrize("options", [{"not_convert": ["bloks.*"]}, {"overrides": {"bloks.*": {"bits": 16}}}])
def test_a_pattern_that_matches_nothing_is_refused(tree: Tree, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'bloks\.\*' matches no linear layer.*blocks\.0\.to_q"):
        prepare(tree, WeightScheme(), ActivationScheme(), **options)
    assert type(tree.proj_out) is nn.Linear  # nothing was replaced


def test_nothing_to_quantize_is_refused(tree: Tree) -> None:
    with pytest.raises(ValueError, match="nothing to quantize"):
        prepare(tree, WeightScheme(), ActivationScheme(), not_convert=["*"])
    with pytest.raises(ValueError, match="nothing to quantize"):
        prepare(nn.Sequential(nn.Conv2d(3, 3, 3)), WeightScheme(), ActivationScheme())
    with pytest.raises(ValueError, match="prepare it first"):
        convert(tree)
    with pytest.raises(ValueError, match="convert it first"):
        stored_bits_per_weight(tree)


def test_a_layer_that_groups_do_not_fit_is_named(tree: Tree) -> None:
    with pytest.raises(ValueError, match=r"proj_out cannot be quantized: group_size 4 does not suit .* 5 inputs"):
        prepare(
            tree, WeightScheme(granularity="per_group", group_size=4), ActivationScheme(), not_convert=["pointwise"]
        )
    assert type(tree.inverted) is nn.Conv2d  # nothing was replaced


def test_overrides_apply_in_order(tree: Tree) -> None:
    overrides = {"blocks.*": {"bits": 16}, "*.to_q": {"range": "static"}, "blocks.1.*": {"bits": 32}}
    scheme = ActivationScheme()
    schemes = {each.names[0]: each.activations for each in targets(tree, scheme, overrides=overrides)}
    assert schemes["proj_out"] == scheme
    assert schemes["blocks.0.to_q"] == ActivationScheme(bits=16, range="static")
    assert schemes["blocks.1.to_q"] == ActivationScheme(bits=32, range="static")
    prepare(tree, WeightScheme(), scheme, overrides=overrides)
    assert {name: layer.activation_scheme.bits for name, layer in named_layers(tree, FakeQuantizedLinear)} == dict(
        zip(LAYERS, [16, 16, 32, 32, 8, 8, 8], strict=True)
    )


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("clip", ["max_abs", "mse", "learned"])
@pytest.mark.parametrize(
    ("activations", "overrides"),
    [
        (ActivationScheme(), {}),
        (ActivationScheme(range="per_tensor"), {}),
        (ActivationScheme(range="static"), {}),
        (
            ActivationScheme(range="static"),
            {"proj_out": {"bits": 16}, "*.to_q": {"range": "per_token"}, "inv*": {"bits": 32}},
        ),
    ],
    ids=["per_token", "per_tensor", "static", "mixed"],
)
def test_packed_layers_equal_the_fake_quantized_ones(
    tree: Tree, granularity: str, clip: str, activations: ActivationScheme, overrides: dict[str, Any]
) -> None:
    check_packed(tree, granularity, clip, activations, overrides, 4)


@pytest.mark.parametrize("bits", [3, 5, 6, 7, 8])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("clip", ["max_abs", "learned"])
def test_packed_layers_of_other_widths_equal_the_fake_quantized_ones(
    tree: Tree, granularity: str, clip: str, bits: int
) -> None:
    check_packed(tree, granularity, clip, ActivationScheme(range="static"), {"*.to_q": {"range": "per_token"}}, bits)
    packed = list(named_layers(tree, PackedLayer))
    assert {layer.weight_packed.dtype for _, layer in packed} == {torch.uint8 if bits <= 4 else torch.int8}
    stored = sum(layer.codes().numel() * (0.5 if bits <= 4 else 1) + layer.weight_scale.nbytes for _, layer in packed)
    odd_rows = sum(0.5 * layer.out_features * (layer.in_features % 2) for _, layer in packed) if bits <= 4 else 0
    weights = sum(layer.codes().numel() for _, layer in packed)
    assert stored_bits_per_weight(tree) == pytest.approx(8 * (stored + odd_rows) / weights)


def check_packed(
    tree: Tree,
    granularity: str,
    clip: str,
    activations: ActivationScheme,
    overrides: dict[str, Any],
    bits: int,
) -> None:
    """Codes bit for bit, outputs to float rounding.

    Both compute sum_i a_i w_i with the same a and w, rounded at other places: of n products in any order, float32
    loses at most n * 2^-24 of sum |a_i w_i|, and a handful of roundings for scales and bias.
    """
    weights: dict[str, Any] = {"granularity": granularity, "clip": clip}
    if granularity == "per_group":
        tree.proj_out = nn.Identity()  # 5 inputs
        overrides = {pattern: change for pattern, change in overrides.items() if pattern != "proj_out"}
        weights["group_size"] = 4
    names = prepared(tree, activations, overrides, **weights)
    set_bit_width(tree, 5.5)
    set_bit_width(tree, bits)

    seen: dict[str, tuple[Tensor, Tensor]] = {}
    fakes = dict(named_layers(tree, FakeQuantizedLinear))
    for name, layer in fakes.items():
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output.detach())})
        )
    tree(batch())
    codes = {name: layer.codes_and_scales()[0] for name, layer in fakes.items()}
    bounds = {}
    for name, layer in fakes.items():
        x, magnitude = seen[name][0], layer.fake_quantized_weight().detach().abs()
        bias = None if layer.bias is None else layer.bias.detach().abs()
        operation = nn.functional.conv2d if magnitude.dim() == 4 else nn.functional.linear
        # |x| + a step of the activation grid, and on top of it what is lost where a product is rounded
        largest = operation(x.abs() + x.abs().max() / 64, magnitude, bias).detach()
        bounds[name] = 2 * (layer.in_features + 8) * 2**-24 * largest

    twin = converted(tree)
    assert [name for name, _ in named_layers(tree, FakeQuantizedLinear)] == names
    assert convert(tree) == names
    for (name, value), (other, copied) in zip(tree.state_dict().items(), twin.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, copied), name
    for name, packed in named_layers(tree, PackedLayer):
        assert torch.equal(packed.codes(), codes[name]), name
        weight = fakes[name].fake_quantized_weight().detach().view(packed.out_features, -1)
        assert torch.equal(packed.dequantize(), weight), name
        x, expected = seen[name]
        assert bool(((packed(x) - expected).abs() <= bounds[name]).all()), name


def test_convert_keeps_kinds_and_bias(tree: Tree) -> None:
    prepared(tree, ActivationScheme())
    bias = tree.proj_out.bias.clone()
    convert(tree)
    assert [name for name, _ in named_layers(tree, PackedPointwiseConv2d)] == ["inverted", "pointwise"]
    assert tree.pointwise.bias is None
    assert torch.equal(tree.proj_out.bias, bias)
    assert not list(named_layers(tree, FakeQuantizedLinear))
    assert not any(
        parameter.requires_grad for _, layer in named_layers(tree, PackedLayer) for parameter in layer.parameters()
    )


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (4.25, r"proj_out cannot be packed: the layer is at 4.25 bits; set_bit_width\(4\), or a whole number up to 8"),
        (9, "proj_out cannot be packed: the layer is at 9 bits"),
    ],
)
def test_convert_replaces_all_or_nothing(tree: Tree, width: float, message: str) -> None:
    prepared(tree, ActivationScheme())
    tree.proj_out.set_bit_width(width)
    with pytest.raises(ValueError, match=message):
        convert(tree)
    assert [name for name, _ in named_layers(tree, FakeQuantizedLinear)] == LAYERS


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_numbers_that_no_file_may_have_are_not_packed(tree: Tree, value: float) -> None:
    prepare(tree, WeightScheme(clip="mse"), ActivationScheme())
    tree.proj_out.clip.found.fill_(value)
    with pytest.raises(ValueError, match="proj_out cannot be packed: its weight_scale has values that are not finite"):
        convert(tree)


def test_a_bias_that_is_not_finite_is_not_packed(tree: Tree) -> None:
    prepare(tree, WeightScheme(), ActivationScheme())
    tree.proj_out.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="proj_out cannot be packed: its bias has values that are not finite"):
        convert(tree)


def test_set_bit_width_reaches_every_layer(tree: Tree) -> None:
    prepared(tree, ActivationScheme())
    assert set_bit_width(tree, 4.5, Rounding(0.2)) == []
    assert {(layer.bit_width, layer.rounding.ewgs) for _, layer in named_layers(tree, FakeQuantizedLinear)} == {
        (4.5, 0.2)
    }
    with pytest.raises(ValueError, match="bit width is 1"):
        set_bit_width(tree, 1)


def test_layers_that_keep_a_width_of_their_own(tree: Tree) -> None:
    prepare(tree, WeightScheme(clip="mse"), ActivationScheme(), widths={"*": 6, "proj_out": 8, "pointwise": 4})
    layers = dict(named_layers(tree, FakeQuantizedLinear))
    wanted = dict.fromkeys(layers, 6) | {"proj_out": 8, "pointwise": 4}
    clips = {name: layer.current_clip().clone() for name, layer in layers.items()}
    assert set_bit_width(tree, 5, Rounding(0.2)) == []
    for name, layer in layers.items():
        assert (layer.bit_width, layer.rounding.ewgs) == (wanted[name], 0.2)
        assert torch.equal(layer.current_clip(), clips[name])
        assert torch.equal(layer.current_clip(), mse_clip(layer.grouped_weight(), wanted[name]))
    set_bit_width(tree, 5)
    convert(tree)
    assert {name: layer.weight_bits for name, layer in named_layers(tree, PackedLayer)} == wanted


def test_a_width_of_no_layer_is_refused(tree: Tree) -> None:
    with pytest.raises(ValueError, match="pattern 'proj_uot' matches no linear layer"):
        prepare(tree, WeightScheme(), ActivationScheme(), widths={"proj_uot": 8})


def test_clips_that_were_set_anew_are_told(tree: Tree) -> None:
    """What Adam remembers of them is of another clip."""
    prepared(tree, ActivationScheme(), clip="learned")
    clips = [layer.clip.log_clip for _, layer in named_layers(tree, FakeQuantizedLinear)]
    for width, rounding, expected in (
        (4, Rounding(0.2), []),
        (4.25, Rounding(0.2), clips),
        (4.25, Rounding(0.1), []),
        (4, Rounding(0.0), clips),
    ):
        before = [clip.detach().clone() for clip in clips]
        assert [id(each) for each in set_bit_width(tree, width, rounding)] == [id(each) for each in expected]
        assert all(torch.equal(*pair) for pair in zip(before, clips, strict=True)) is not bool(expected)


class Shared(nn.Module):
    """A layer under two names, a block under two names, and two layers of one weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(12, 12)
        self.block = Block()
        self.same_block = self.block
        self.tied, self.tied_too = nn.Linear(12, 12), nn.Linear(12, 12)
        self.tied_too.weight, self.tied_too.bias = self.tied.weight, self.tied.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.same_block(self.block(self.again(self.first(x))))
        return self.tied_too(2 * self.tied(x))


class TestShared:
    NAMES = ["first", "again", "block.to_q", "block.to_out", "same_block.to_q", "same_block.to_out", "tied", "tied_too"]

    @pytest.fixture
    def shared(self) -> Shared:
        torch.manual_seed(0)
        return Shared()

    @staticmethod
    def stay_one(model: Any, kind: type[nn.Module]) -> None:
        assert model.first is model.again
        assert model.block is model.same_block
        assert all(type(layer) is kind for layer in (model.first, model.block.to_q, model.tied, model.tied_too))

    def test_prepare_and_convert_take_a_layer_under_all_its_names(self, shared: Shared) -> None:
        assert prepare(shared, WeightScheme(clip="mse"), ActivationScheme()) == self.NAMES
        self.stay_one(shared, FakeQuantizedLinear)
        expected = shared(batch())
        twin = converted(shared)
        self.stay_one(twin, PackedLinear)
        self.stay_one(shared, FakeQuantizedLinear)
        assert convert(shared) == self.NAMES
        self.stay_one(shared, PackedLinear)
        torch.testing.assert_close(shared(batch()), expected)
        assert torch.equal(twin(batch()), shared(batch()))

    def test_a_float_model_computes_as_before(self, shared: Shared) -> None:
        expected = shared(batch())
        prepare(shared, WeightScheme(), ActivationScheme())
        with quantization_disabled(shared):
            torch.testing.assert_close(shared(batch()), expected)

    def test_layers_of_one_weight_train_one_weight(self, shared: Shared) -> None:
        prepare(shared, WeightScheme(clip="learned"), ActivationScheme())
        assert shared.tied.weight is shared.tied_too.weight
        assert shared.tied.bias is shared.tied_too.bias
        assert shared.tied.clip.log_clip is not shared.tied_too.clip.log_clip  # each is clipped for its own inputs
        parameters = list(shared.parameters())
        # first, to_q: weight, bias, clip; to_out has no bias; the tied ones have a weight, a bias and two clips
        assert len(parameters) == 3 + 3 + 2 + 4
        before = shared.tied.weight.detach().clone()
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        shared(batch()).square().mean().backward()
        optimizer.step()
        assert not torch.equal(before, shared.tied_too.weight)
        convert(shared)
        assert torch.equal(shared.tied.codes(), shared.tied_too.codes())

    def test_a_weight_shared_with_what_is_not_quantized_is_copied(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 12), nn.Linear(12, 5, bias=False))
        model[1].weight = model[0].weight
        prepare(model, WeightScheme(), ActivationScheme())
        assert model[1].weight is not model[0].weight
        assert torch.equal(model[1].weight, model[0].weight)

    def test_patterns_count_for_a_layer_by_any_of_its_names(self, shared: Shared) -> None:
        overrides = {"same_block.to_q": {"bits": 16}, "block.to_q": {"range": "static"}}
        names = prepare(shared, WeightScheme(), ActivationScheme(), not_convert=["again"], overrides=overrides)
        assert names == self.NAMES[2:]
        assert type(shared.first) is nn.Linear
        assert shared.first is shared.again
        assert shared.block.to_q.activation_scheme == ActivationScheme(bits=16, range="static")


def test_a_layer_alone_is_no_model() -> None:
    with pytest.raises(ValueError, match="the model is itself a Linear; put it into a module"):
        prepare(nn.Linear(3, 3), WeightScheme(), ActivationScheme())


def test_more_bits_are_nearer_to_float(tree: Tree) -> None:
    expected = tree(batch())
    prepared(tree, ActivationScheme(bits=32))
    errors = []
    for bits in (3, 3.5, 4, 5.5, 8, 16):
        set_bit_width(tree, bits)
        errors.append((tree(batch()) - expected).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]


def test_quantization_disabled_is_the_float_model_and_nests(tree: Tree) -> None:
    expected = tree(batch())
    prepared(tree, ActivationScheme())
    with quantization_disabled(tree):
        with quantization_disabled(tree):
            pass
        torch.testing.assert_close(tree(batch()), expected)
    assert not torch.allclose(tree(batch()), expected)
    with pytest.raises(RuntimeError, match="stop"), quantization_disabled(tree):
        raise RuntimeError("stop")
    assert all(layer.enabled for _, layer in named_layers(tree, FakeQuantizedLinear))


class TestCalibrate:
    STATIC = ActivationScheme(range="static")

    def test_ranges_are_those_of_the_float_activations(self, tree: Tree) -> None:
        batches = [batch(seed) for seed in (1, 2, 3)]
        inputs: list[Tensor] = []
        hook = tree.proj_out.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        for x in batches:
            tree(x)
        hook.remove()

        prepare(tree, WeightScheme(bits=2), self.STATIC)  # so coarse that quantized activations would differ
        ranges = calibrate(tree, ({"x": x} for x in batches), rule="min_max")
        seen = torch.cat(inputs)
        assert list(ranges) == LAYERS
        assert ranges["proj_out"] == pytest.approx((seen.min().item(), seen.max().item()), rel=1e-5)
        low, high = ranges["proj_out"]
        assert tree.proj_out.input_scale.item() == pytest.approx((high - low) / 255)
        assert tree.proj_out.input_zero_point.item() == round(-low / ((high - low) / 255))
        assert tree(batch()).requires_grad  # no hook and no state of calibration is left behind
        assert not any(layer._forward_pre_hooks for _, layer in named_layers(tree, FakeQuantizedLinear))

    def test_only_static_layers_are_calibrated(self, tree: Tree) -> None:
        overrides = {"proj_out": {"range": "per_token"}, "inverted": {"bits": 32}}
        prepare(tree, WeightScheme(), self.STATIC, overrides=overrides)
        ranges = calibrate(tree, [{"x": batch()}])
        assert set(ranges) == set(LAYERS) - {"proj_out", "inverted"}
        assert tree.proj_out.input_scale is None

    def test_16_bits_get_a_finer_scale(self, tree: Tree) -> None:
        prepare(tree, WeightScheme(), self.STATIC, overrides={"blocks.0.to_q": {"bits": 16}})
        low, high = calibrate(tree, [{"x": batch()}])["blocks.0.to_q"]
        assert tree.blocks[0].to_q.input_scale.item() == pytest.approx((high - low) / 65535)

    def test_a_layer_that_no_batch_reaches_is_named_and_no_range_is_set(self, tree: Tree) -> None:
        tree.unused = nn.Linear(3, 3)
        prepare(tree, WeightScheme(), self.STATIC)
        with pytest.raises(ValueError, match="no input of unused was observed"):
            calibrate(tree, [{"x": batch()}])
        assert tree.proj_out.input_scale is None
        assert all(layer.enabled for _, layer in named_layers(tree, FakeQuantizedLinear))

    def test_an_uncalibrated_layer_says_so(self, tree: Tree) -> None:
        prepare(tree, WeightScheme(), self.STATIC)
        with pytest.raises(ValueError, match="calibrate it first"):
            tree(batch())


def test_stored_bits_per_weight() -> None:
    """Per-channel: 4 bits, and 32 of a scale over 64 inputs. Per-group: 32 over 16."""
    for weights, expected in ((WeightScheme(), 4.5), (WeightScheme(granularity="per_group", group_size=16), 6.0)):
        model = nn.Sequential(nn.Linear(64, 10))
        prepare(model, weights, ActivationScheme())
        convert(model)
        assert stored_bits_per_weight(model) == expected
