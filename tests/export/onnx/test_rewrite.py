"""Each rewrite computes the same function; what has no cure is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from fbqat_hub.export import ExportError
from fbqat_hub.export.onnx import rewrite as rewrites
from fbqat_hub.export.onnx.float_graph import trace
from fbqat_hub.families.graph import GraphWrapper
from tests.export.graphs import norm_and_bias, one_op


def run(model: onnx.ModelProto, **feed: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]


def test_reciprocal_becomes_a_division() -> None:
    model = one_op("Reciprocal", {"x": [4]})
    assert rewrites.rewrite(model)["reciprocal_to_div"] == 1
    assert [node.op_type for node in model.graph.node] == ["Div"]
    x = np.array([0.1, 0.25, 3, -2], np.float32)
    np.testing.assert_array_equal(run(model, x=x), 1 / x)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("form", ["transpose", "einsum"])
def test_unpatchify_without_six_dimensions(patch: int, form: str) -> None:
    class Unpatchify(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            grid = tokens.reshape(1, 3, 4, patch, patch, 5)
            if form == "einsum":
                grid = torch.einsum("nhwpqc->nchpwq", grid)
            else:
                grid = grid.permute(0, 5, 1, 3, 2, 4)
            return grid.reshape(1, 5, 3 * patch, 4 * patch)

    tokens = torch.randn(1, 12, patch * patch * 5)
    model = trace(GraphWrapper(Unpatchify(), lambda item: dict(item)), {"tokens": tokens}, {}).model
    assert rewrites.rewrite(model)["unpatchify"] == 1
    assert all(len(shape) <= 4 for shape in rewrites.static_shapes(model).values())
    np.testing.assert_array_equal(run(model, tokens=tokens.numpy()), Unpatchify()(tokens).numpy())


def test_a_squeeze_that_squeezes_nothing_is_dropped() -> None:
    model = one_op("Reshape", {"x": [2, 64]}, {"shape": np.array([2, 64])})
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 64]))
    model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 64]))
    assert rewrites.rewrite(model)["drop_same_shape"] == 1
    assert list(model.graph.node[0].input) == ["x"]


def test_a_bias_of_zero_is_dropped_and_no_other() -> None:
    model, other = norm_and_bias(0.0, "Sigmoid"), norm_and_bias(0.5, "Sigmoid")
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 8)).astype(np.float32)
    before = run(model, x=x)
    assert rewrites.rewrite(model)["drop_zero_bias"] == 1
    assert rewrites.rewrite(other)["drop_zero_bias"] == 0
    np.testing.assert_array_equal(run(model, x=x), before)


def test_a_layer_norm_s_bias_becomes_a_sum() -> None:
    """Two in a row, each with its own bias; of the one without nothing changes."""
    module = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8, bias=False))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 4, 8)
    model = trace(GraphWrapper(module, lambda item: dict(item)), {"x": x}, {}).model
    assert rewrites.rewrite(model)["layer_norm_bias_to_add"] == 2
    assert all(len(node.input) == 2 for node in model.graph.node if node.op_type == "LayerNormalization")
    np.testing.assert_allclose(run(model, x=x.numpy()), module(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 6, 4, 4), (1, 6, 16)], ids=["picture", "tokens"])
def test_group_norm_becomes_layer_norm(shape: tuple[int, ...]) -> None:
    """In two groups, each channel with its own scale and bias; two in a row, as in an autoencoder."""
    norm = torch.nn.GroupNorm(2, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    module = torch.nn.Sequential(norm, norm)
    x = torch.randn(shape)
    model = trace(GraphWrapper(module, lambda item: dict(item)), {"x": x}, {}).model
    assert rewrites.rewrite(model)["group_norm_to_layer_norm"] == 2
    assert "GroupNormalization" not in {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(run(model, x=x.numpy()), module(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(("rows", "changed"), [(8, 2), (4, 0)])
def test_silu_of_8_rows_is_computed_as_1_row(rows: int, changed: int) -> None:
    """Two of them; a gate of something else (Sana's GLU has x * Sigmoid(y)) is left alone."""

    class Gates(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.silu(torch.nn.functional.silu(x))
            return x * torch.sigmoid(2 * x)

    x = torch.randn(1, 3, rows, 4)
    model = trace(GraphWrapper(Gates(), lambda item: dict(item)), {"x": x}, {}).model
    assert rewrites.rewrite(model)["silu_of_8_rows_to_1_row"] == changed
    shapes = rewrites.static_shapes(model)
    of_one_row = [node.op_type for node in model.graph.node if shapes[node.output[0]] == [1, 3, 1, 8 * 4]]
    assert sorted(of_one_row) == sorted(["Reshape", "Sigmoid", "Mul"] * changed)
    np.testing.assert_allclose(run(model, x=x.numpy()), Gates()(x).numpy(), atol=1e-6)


def test_upsampling_is_by_whole_sizes() -> None:
    x = torch.randn(1, 2, 3, 4)
    module = torch.nn.Upsample(scale_factor=2.0, mode="nearest")
    model = trace(GraphWrapper(module, lambda item: dict(item)), {"x": x}, {}).model
    assert rewrites.rewrite(model)["resize_to_sizes"] == 1
    np.testing.assert_array_equal(run(model, x=x.numpy()), module(x).numpy())


def test_attention_is_refused_because_it_would_run_in_float() -> None:
    class Fused(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    model = trace(GraphWrapper(Fused(), lambda item: dict(item)), {"x": torch.randn(1, 2, 8, 16)}, {}).model
    with pytest.raises(ExportError, match=r"Attention .*in float"):
        rewrites.rewrite(model)


def test_nodes_of_large_constants_are_computed() -> None:
    """Over 8192 numbers torch's exporter leaves the slices of a table to the graph, where they would be float ops."""
    table = torch.arange(200.0 * 64).reshape(200, 64)

    class Tables(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", table)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens * self.table[:150] + self.table[50:]

    tokens = torch.randn(1, 150, 64)
    model = trace(GraphWrapper(Tables(), lambda item: dict(item)), {"tokens": tokens}, {}).model
    assert "Slice" in [node.op_type for node in model.graph.node]
    assert rewrites.rewrite(model)["fold_constants"] >= 2
    assert [node.op_type for node in model.graph.node] == ["Mul", "Add"]
    expected = (tokens * table[:150] + table[50:]).numpy()
    np.testing.assert_allclose(run(model, tokens=tokens.numpy()), expected, rtol=1e-6)
