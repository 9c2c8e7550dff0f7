"""torch.compile and torch.export take a packed model whole: one graph, and no other for other batches and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fbqat_hub.families import FAMILIES
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.quantization import PackedLayer, named_layers
from tests.conftest import SANA_FIRST
from tests.integrations.tiny import denoiser_inputs, pack_denoiser, predict

# within each no two sizes are equal, nor equal to a width of the model: torch would take equal sizes for one
SMALL = {"batch": 9, "height": 6, "width": 10, "text_tokens": 7}
LARGE = {"batch": 5, "height": 14, "width": 12, "text_tokens": 11}


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=SANA_FIRST)
def packed(request: pytest.FixtureRequest, teacher_of: Callable[[str], Path]) -> tuple[str, Any]:
    """A family and its tiny packed denoiser."""
    return request.param, pack_denoiser(load_pipeline(teacher_of(request.param)), request.param)


def check_one_graph(model: Any, family: str, *sizes: dict[str, int], **options: Any) -> None:
    """The first size compiles it, the others use that."""
    expected = [predict(model, family, **size) for size in sizes]
    model.compile(fullgraph=True, **options)
    assert torch.equal(predict(model, family, **sizes[0]), expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for size, wanted in zip(sizes[1:], expected[1:], strict=True):
            assert torch.equal(predict(model, family, **size), wanted)


def one_graph(packed: tuple[str, Any], teacher: Path, *sizes: dict[str, int], **options: Any) -> None:
    """Checks it; where the float model is not one graph either, the test is skipped."""
    family, model = packed
    try:
        check_one_graph(model, family, *sizes, **options)
    except RuntimeError:
        torch._dynamo.reset()
        with pytest.raises(RuntimeError):
            check_one_graph(load_pipeline(teacher).transformer, family, *sizes, **options)
        pytest.skip("not in diffusers")


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("eager", marks=pytest.mark.cell("compile(fullgraph=True, dynamic=True)")),
        pytest.param("aot_eager", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_every_batch_and_size(packed: tuple[str, Any], backend: str, teacher_of) -> None:
    one_graph(packed, teacher_of(packed[0]), SMALL, LARGE, dynamic=True, backend=backend)


@pytest.mark.cell("compile(fullgraph=True)")
def test_one_graph(packed: tuple[str, Any], teacher_of) -> None:
    """A second call is no recompile."""
    one_graph(packed, teacher_of(packed[0]), {}, {}, backend="eager")


@pytest.mark.cell("compile_repeated_blocks(fullgraph=True)")
@torch.no_grad()
def test_repeated_blocks_share_a_graph(packed: tuple[str, Any], teacher_of: Callable[[str], Path]) -> None:
    """As many graphs as the float model has: none for a layer's own weight."""
    family, packed_model = packed
    if not packed_model._repeated_blocks:
        pytest.skip("not in diffusers")
    graphs = []
    for model in (packed_model, load_pipeline(teacher_of(family)).transformer):
        torch._dynamo.reset()
        expected = predict(model, family)
        counter = CompileCounter()
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert torch.equal(predict(model, family), expected)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] == graphs[1]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_and_offloaded(teacher_of: Callable[[str], Path]) -> None:
    model = pack_denoiser(load_pipeline(teacher_of("sana")), "sana")
    expected = predict(model, "sana")
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type="leaf_level")
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1000):
        assert torch.equal(predict(compiled, "sana"), expected)


@pytest.mark.slow
@pytest.mark.cell("torch.export")
def test_exported_program_is_the_model(packed: tuple[str, Any], teacher_of: Callable[[str], Path]) -> None:
    family, model = packed
    inputs = denoiser_inputs(family, model, **SMALL)
    with torch.no_grad():
        expected = predict(model, family, **SMALL)
        try:
            program = torch.export.export(model, (), {**inputs, "return_dict": False})
        except RuntimeError:
            with pytest.raises(RuntimeError):
                torch.export.export(load_pipeline(teacher_of(family)).transformer, (), {**inputs, "return_dict": False})
            pytest.skip("not in diffusers")
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.fbqat.packed_linear.default) == len(dict(named_layers(model, PackedLayer)))
    assert torch.equal(FAMILIES[family].prediction(program.module()(**inputs, return_dict=False)[0]), expected)
