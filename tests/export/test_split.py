"""A model in several graphs computes what it computes in one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from fbqat_hub.export import ExportError, export_htp
from fbqat_hub.export.bundle.export import export_bundle, psnr_db
from fbqat_hub.export.htp.graph import trace_graph
from fbqat_hub.export.onnx.float_graph import Feed, FloatGraph, as_feed, packed_layers, runnable
from fbqat_hub.export.onnx.split import describe_chain, split_graph
from fbqat_hub.export.onnx.wrappers import wrap
from fbqat_hub.pipelines import load_pipeline
from fbqat_hub.training.ptq import convert_pipeline
from tests.conftest import CAPTIONS, call_of
from tests.export.conftest import Item, float_sana, make_items, pack
from tests.export.test_bundle import draw
from tests.export.test_families import TEACHERS


@pytest.fixture(scope="module")
def three_blocks() -> tuple[FloatGraph, Feed]:
    model = pack(float_sana(blocks=3))
    item = make_items(1, seed=3)[0]
    wrapper = wrap(model, item)
    return trace_graph(wrapper, item, packed_layers(model))[0], as_feed(wrapper.host_inputs(item))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_parts_in_order_are_the_whole(parts: int, three_blocks: tuple[FloatGraph, Feed]) -> None:
    graph, feed = three_blocks
    values = dict(feed)
    found = split_graph(graph, parts)
    for part in found:
        session = onnxruntime.InferenceSession(runnable(part).SerializeToString())
        names = [value.name for value in part.model.graph.output]
        given = {value.name: values[value.name] for value in part.model.graph.input}
        values.update(zip(names, session.run(None, given), strict=True))
    whole = onnxruntime.InferenceSession(runnable(graph).SerializeToString()).run(None, feed)[0]
    np.testing.assert_allclose(values["sample"], whole, atol=1e-5)
    assert len(found) == parts
    assert sum(len(part.layers) for part in found) == len(graph.layers)
    assert sum(len(part.model.graph.node) for part in found) == len(graph.model.graph.node)


def test_more_graphs_than_blocks_are_refused(three_blocks: tuple[FloatGraph, Feed]) -> None:
    with pytest.raises(ExportError, match="4 graphs were asked for; the model has 3 blocks"):
        split_graph(three_blocks[0], 4)


@pytest.mark.slow
def test_two_graphs_on_the_emulator(calibration: list[Item], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    model = pack(float_sana(blocks=2))
    result = export_htp(model, calibration, make_items(2, seed=3), tmp_path / "out", graphs=2, progress=False)
    assert list(result["parts"]) == ["transformer_0", "transformer_1"]
    assert {"transformer_0.bin", "transformer_1.bin"} <= set(result["files"])
    layers = [part["audit"]["qdq"]["packed_weights_bit_equal"] for part in result["parts"].values()]
    assert sum(layers) == result["model"]["packed_layers"]
    assert result["parity"]["emulator_vs_torch_packed"]["sqnr_db"] > 30
    parts = list(result["parts"].values())
    for key, value in result["cost"].items():
        assert value == parts[0]["cost"][key] + parts[1]["cost"][key], key
    assert list(result["blocks"]) == [f"transformer_blocks.{index}/output_0" for index in range(2)]
    assert result["op_parity"]["ops"] == parts[0]["op_parity"]["ops"] + parts[1]["op_parity"]["ops"]
    assert result["op_parity"]["largest"]["error"] == max(part["op_parity"]["largest"]["error"] for part in parts)
    assert json.loads((tmp_path / "out" / "certificate.json").read_text()) == result


def test_the_chain_says_where_each_input_comes_from() -> None:
    def tensors(inputs: list[str], outputs: list[str]) -> dict[str, list[dict[str, str]]]:
        return {"inputs": [{"name": name} for name in inputs], "outputs": [{"name": name} for name in outputs]}

    graphs = {
        "a": tensors(["latents", "time"], ["x", "y"]),
        "b": tensors(["x", "time"], ["z"]),
        "c": tensors(["y", "z"], ["sample"]),
    }
    assert describe_chain(graphs) == [
        {"graph": "a", "reads": {"latents": "host", "time": "host"}},
        {"graph": "b", "reads": {"x": "a", "time": "host"}},
        {"graph": "c", "reads": {"y": "a", "z": "b"}},
    ]


@pytest.mark.slow
def test_the_runner_draws_with_two_graphs(tmp_path: Path) -> None:
    """The picture of the bundle's own runner, without torch, near torch's; the manifest names the tensor at the cut."""
    pytest.importorskip("onnxruntime_qnn")
    packed = convert_pipeline(f"fbqat-hub/{TEACHERS['sana']}-openmoji", tmp_path / "packed")
    call = call_of("sana", pipeline := load_pipeline(packed)) | {"num_inference_steps": 2}
    bundle = tmp_path / "out"
    export_bundle(pipeline, bundle, prompts=CAPTIONS[:3], call=call, pictures=1, graphs=2, progress=False)
    chain = json.loads((bundle / "manifest.json").read_text())["denoiser"]
    assert [part["graph"] for part in chain] == ["transformer_0", "transformer_1"]
    assert set(chain[0]["reads"].values()) == {"host"}
    assert set(chain[1]["reads"].values()) == {"transformer_0"}
    done = draw(bundle, "--output", str(tmp_path / "picture.png"))
    assert done.returncode == 0, done.stderr
    pictures = [Image.open(path) for path in (tmp_path / "picture.png", bundle / "pictures" / "0-torch.png")]
    assert psnr_db(*(np.asarray(picture) for picture in pictures)) > 20
