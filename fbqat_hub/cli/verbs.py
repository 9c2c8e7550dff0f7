"""The verbs, one function each: options to a function of the library, its result to text. Imports come when needed."""

from __future__ import annotations

import argparse
import shlex
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fbqat_hub.cli.settings import changes_of
from fbqat_hub.inputs import read_prompts, read_text

if TYPE_CHECKING:
    from fbqat_hub.training.recipe import Recipe

# Arguments of a pipeline call that are text: what is typed is taken as it is, not read as YAML.
_TEXTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")

# Parameters of a denoiser from which on a plan takes long enough to say so.
_LARGE = 10**9


def demo(options: argparse.Namespace) -> None:
    """``fbqat demo``."""
    from fbqat_hub.training.demo import demo

    demo(options.output, steps=options.steps)


def train(options: argparse.Namespace) -> None:
    """``fbqat train``."""
    from accelerate import PartialState

    from fbqat_hub.training.distill import train

    recipe = _recipe(options)
    output = train(recipe, options.output, resume=options.resume)
    named = shlex.quote(str(output))
    if PartialState().is_main_process:
        print(f"saved {output}. Next: fbqat evaluate {named} ; fbqat card {named}")


def plan(options: argparse.Namespace) -> None:
    """``fbqat plan``."""
    if options.measure and (options.gpus or options.seconds_per_step):
        option = "--gpus" if options.gpus else "--seconds-per-step"
        raise ValueError(f"{option} is for what is computed without weights; give it without --measure.")
    recipe = _recipe(options)
    if not options.measure:
        if options.output:
            raise ValueError("--output keeps what --measure measures; give both, or neither.")
        from fbqat_hub.components import quiet
        from fbqat_hub.training.costs import costs
        from fbqat_hub.training.costs_report import report

        with quiet(), warnings.catch_warnings(action="ignore"):  # of the models that are built without numbers
            found = costs(recipe)
            if found.parameters["transformer"] > _LARGE:
                print(
                    "computing the memory of a step from shapes; it may take some minutes", file=sys.stderr, flush=True
                )
            text = report(found, options.gpus, options.seconds_per_step)
        print(text)
        return
    from fbqat_hub.training.plan import plan

    print(plan(recipe, options.output).text())
    if options.output:
        print(f"saved {options.output}")


def _recipe(options: argparse.Namespace) -> Recipe:
    """That is named, with the fields that are set, and the average width that fits."""
    from fbqat_hub.training.recipe import load_recipe

    recipe = load_recipe(options.recipe, **changes_of(options.set))
    if options.fit is None:
        return recipe
    from fbqat_hub.training.fit import fitted

    recipe = fitted(recipe, options.fit)
    print(f"--fit: quantization.average_bits={recipe.quantization.average_bits:g}")
    return recipe


def convert(options: argparse.Namespace) -> None:
    """``fbqat convert``."""
    given = [name for name in ("prompts", "samples", "device") if getattr(options, name)]
    if options.method != "gptq" and given:
        raise ValueError(f"--{given[0]} is for GPTQ; give --method gptq too, or leave it out.")
    if options.method == "gptq" and not options.prompts:
        raise ValueError("--method gptq needs prompts to calibrate on; give --prompts FILE, a prompt on each line.")
    if options.lora_scale is not None and not options.lora:
        raise ValueError("--lora-scale is of an adapter; give --lora ADAPTER too.")
    call = changes_of(options.set, texts=_TEXTS)
    prompts = read_prompts(options.prompts) if options.prompts else ()
    from fbqat_hub.training.lora_merge import Lora
    from fbqat_hub.training.ptq import Calibrated, convert_pipeline

    settings = {"weight_clip": options.clip, "modules_to_not_convert": options.leave}
    if options.average_bits is not None:
        settings["average_bits"] = options.average_bits
    counted = {"samples": options.samples} if options.samples else {}
    output = convert_pipeline(
        options.pipeline,
        options.output,
        settings,
        options.variant,
        text_encoders=options.text_encoders,
        fit=options.fit,
        gptq=Calibrated(prompts=prompts, device=options.device, **counted) if prompts else None,
        lora=Lora(options.lora, 1.0 if options.lora_scale is None else options.lora_scale) if options.lora else None,
        call=call,
    )
    print(
        f"saved {output}. Its recipe.yaml names OpenMoji as data; measure it on prompts of your choice: "
        f"fbqat evaluate {shlex.quote(str(output))} --prompts mjhq-30k --images 1000"
    )


def generate(options: argparse.Namespace) -> None:
    """``fbqat generate``."""
    call = changes_of(options.set, texts=_TEXTS)
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else ())]
    from fbqat_hub.training.generate import generate

    path = generate(options.model, prompts, options.output, seed=options.seed, call=call, device=options.device)
    print(f"saved {path}")


def evaluate(options: argparse.Namespace) -> None:
    """``fbqat evaluate``."""
    from fbqat_hub.stages import find_stage
    from fbqat_hub.training.evaluate import evaluate

    found = evaluate(
        options.run_folder,
        stage=options.stage,
        prompts=options.prompts,
        images=options.images,
        metrics=options.metrics or None,
        device=options.device,
    )
    for record in found.records:
        unit = "" if record.unit == "1" else f" {record.unit}"
        interval = "" if record.interval is None else "  95% interval {:.4g} to {:.4g}".format(*record.interval)
        name = record.metric + (", teacher" if record.method == "teacher" else "")
        equal = f", {record.extra['equal']} more are equal to the teacher's" if record.extra.get("equal") else ""
        print(f"{name:21s} {record.value:.4g}{unit}{interval}  (n = {record.n}{equal})")
    for metric, reason in found.not_measured.items():
        print(f"{metric:21s} not measured: {reason}")
    folder = options.run_folder if options.stage is None else find_stage(options.run_folder, options.stage)
    print(f"saved {folder / 'results.json'}")


def compare(options: argparse.Namespace) -> None:
    """``fbqat compare``."""
    from fbqat_hub.evaluation.compare import DEFAULT, compare, table

    rows = compare(options.a, options.b, options.output, options.metrics or DEFAULT, device=options.device)
    print(table(rows))
    if options.output:
        print(f"saved {options.output / 'comparison.json'} and {options.output / 'comparison.png'}")


def card(options: argparse.Namespace) -> None:
    """``fbqat card``."""
    from fbqat_hub.hub.card import write_card

    print(f"saved {write_card(options.run_folder, options.repo, options.data)}")


def space(options: argparse.Namespace) -> None:
    """``fbqat space``."""
    import gradio  # noqa: F401  # an extra: that it is missing is said before anything is looked for

    _check_free(options.host, options.port)
    sources = options.models or sorted(str(path.parent) for path in Path("runs").glob("*/model_index.json"))
    if not sources:
        raise ValueError("no model given, and none in runs/; make one: fbqat train sana-tiny --output runs/sana-tiny")
    from fbqat_hub.integrations.gradio import app, open_pair
    from fbqat_hub.training.teachers import resolve_teacher

    page = app([open_pair(source, resolve_teacher) for source in sources], options.device)
    page.launch(server_name=options.host, server_port=options.port, share=False)


def _check_free(host: str, port: int) -> None:
    """Raise OSError if a server cannot listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise OSError(f"--host {host!r:.80} is no address of a machine ({error}).") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise OSError(
                f"{host}, port {port} cannot be listened on ({error.strerror}); give another --port."
            ) from None


def export(options: argparse.Namespace) -> None:
    """``fbqat export``."""
    if options.to != "htp":
        return _export_files(options)
    prompts = read_prompts(options.prompts) if options.prompts else ()
    from fbqat_hub.export.htp.targets import DEFAULT_SOC
    from fbqat_hub.export_run import export_run

    signal.signal(signal.SIGTERM, _stop)
    output = options.output or _beside(options.run_folder, "htp")
    made = export_run(
        options.run_folder,
        output,
        soc=options.soc if len(options.soc) > 1 else (options.soc or [DEFAULT_SOC])[0],
        precision=options.precision,
        target_db=options.target_db,
        a16=options.a16,
        graphs=options.graphs,
        prompts=prompts,
        pictures=options.images,
        tune=options.tune,
        decoder_tile=options.decoder_tile,
        samples=options.samples,
        quick=options.quick,
    )
    if len(options.soc) > 1:
        from fbqat_hub.export.bundle.targets_table import targets_table

        print(targets_table(made))
        print(f"saved {output}: a bundle in each folder. Never ran on: a phone.")
        return
    for name in ("emulator_vs_cpu_qdq", "emulator_vs_torch_packed", "cpu_qdq_vs_torch_packed"):
        print(f"{name.replace('_', ' '):26s} SQNR {made['parity'][name]['sqnr_db']:.1f} dB")
    if made["tuning"]:
        for name in ("emulator_vs_torch_tuned", "emulator_vs_teacher"):
            print(f"{name.replace('_', ' '):26s} SQNR {made['parity'][name]['sqnr_db']:.1f} dB")
    if made["pictures"]:
        print(f"{'pictures vs torch':26s} PSNR {made['pictures']['mean_psnr_db']:.1f} dB")
    print(f"saved {output}. Ran on: {made['ran_on']}. Never ran on: {made['never_ran_on']}.")


def _beside(run: str, format_name: str) -> Path:
    """Where an export goes that was given no folder; of a Hub id not into a folder of its name, which would hide it.

    >>> _beside("me/sana-4bit@main", "htp").as_posix()
    'sana-4bit-htp'
    """
    if Path(run).is_dir():
        return Path(run) / format_name
    from fbqat_hub.hub.names import repo_and_revision

    return Path(f"{Path(repo_and_revision(run)[0]).name}-{format_name}")


def _stop(number: int, _frame: Any) -> None:
    """End as by Ctrl-C: folders that are being built go, and so does the compiler's process."""
    sys.exit(128 + number)


def _export_files(options: argparse.Namespace) -> None:
    """In another library's format; that library is not needed."""
    if given := [name for name, default in options.of_htp.items() if getattr(options, name) != default]:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{option} is for a phone (--to htp); with --to {options.to} give --output only.")
    output = options.output or _beside(options.run_folder, options.to)
    if options.to == "encodings":
        from fbqat_hub.integrations.encodings import FILE, export_encodings

        found = export_encodings(options.run_folder, output)
        print(f"encodings of {found.weights} weights and {found.activations} activations")
        print(f"saved {output}: a float pipeline, and transformer/{FILE} for AIMET and Qualcomm's converters")
    elif options.to == "comfyui":
        from fbqat_hub.integrations.comfyui import export_comfyui

        file = export_comfyui(options.run_folder, output)
        print(_activations(file))
        print(f"saved {file.file}. Put it into ComfyUI/models/diffusion_models, and load it by Load Diffusion Model.")
    else:
        from fbqat_hub.integrations.sdnq import export_sdnq
        from fbqat_hub.integrations.torchao import export_torchao

        made = {"sdnq": export_sdnq, "torchao": export_torchao}[options.to](options.run_folder, output)
        print(_activations(made) + (f", {len(made.float_weights)} in float32" if options.to == "torchao" else ""))
        print(f"saved {output}. It needs: pip install {options.to} ; DiffusionPipeline.from_pretrained loads it.")


def _activations(made: Any) -> str:
    """How many layers of an export have which."""
    return f"{len(made.int8)} layers with int8 activations, {len(made.float_activations)} with float activations"


def doctor(options: argparse.Namespace) -> None:
    """``fbqat doctor``."""
    from fbqat_hub.export.bundle import doctor
    from fbqat_hub.export.htp.targets import target_for

    if not options.model and not options.log:
        raise ValueError("give a bundle or a packed pipeline to look at, or --log FILE of a device.")
    target, findings = target_for(options.soc), []
    log = read_text(options.log, strict=False) if options.log else None
    if options.model and (Path(options.model) / "manifest.json").is_file():
        findings += doctor.diagnose_bundle(Path(options.model), target)
    elif options.model:
        bundles = sorted(Path(options.model).glob("*/manifest.json"))
        if bundles and not (Path(options.model) / "model_index.json").exists():
            raise ValueError(
                f"{options.model} holds a bundle for each chip; give one of them, e.g. {bundles[0].parent}."
            )
        from fbqat_hub.pipelines import load_pipeline

        findings += doctor.diagnose_pipeline(load_pipeline(options.model))
    if log is not None:
        findings += doctor.diagnose_log(log)
    for finding in findings:
        print(f"{finding.level:8s} {finding.what}" + (f"\n         -> {finding.cure}" if finding.cure else ""))
    if errors := sum(finding.level == "error" for finding in findings):
        raise ValueError(f"{errors} {'error' if errors == 1 else 'errors'} found, see above.")


def lora_check(options: argparse.Namespace) -> None:
    """``fbqat lora check``."""
    from fbqat_hub.training.lora_check import check

    found = check(
        options.adapter,
        options.base,
        options.float_base,
        prompts=options.prompt,
        output=options.output,
        card=options.card,
        seed=options.seed,
    )
    print(found.text())
    if options.card:
        print(f"saved the card of {options.adapter}: README.md")
    if options.output:
        print(f"saved {options.output}" + (f" and {options.output.with_suffix('.png')}" if options.prompt else ""))


def lora_train(options: argparse.Namespace) -> None:
    """``fbqat lora train``."""
    from fbqat_hub.training.lora_train import train

    done = train(
        options.pictures,
        options.base,
        options.output,
        rank=options.rank,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=options.device,
    )
    print(f"held-out loss before {done.loss_before:.4g}, after {done.loss_after:.4g} ({done.held_out} pictures)")
    adapter, base = shlex.quote(str(done.output)), shlex.quote(options.base)
    print(f"saved {done.output}. Next: fbqat lora check {adapter} --base {base} --card")


def lora_publish(options: argparse.Namespace) -> None:
    """``fbqat lora publish``."""
    from fbqat_hub.hub.adapter import publish_adapter

    publish_adapter(options.adapter, options.repo, base=options.base, private=options.private, dry_run=options.dry_run)


def publish(options: argparse.Namespace) -> None:
    """``fbqat publish``."""
    from fbqat_hub.hub.publish import publish

    publish(
        options.run_folder,
        options.repo,
        private=options.private,
        device_repo=options.device_repo,
        collection=options.collection,
        branches=options.branches,
        dry_run=options.dry_run,
    )


def pull(options: argparse.Namespace) -> None:
    """``fbqat pull``."""
    from fbqat_hub.hub.names import repo_and_revision
    from fbqat_hub.hub.pull import pull, verify

    model, named = options.model, None
    if not Path(model).exists():
        model, named = repo_and_revision(model)
    if named and options.revision not in (None, named):
        raise ValueError(
            f"{options.model} names revision {named}, and --revision {options.revision}; give one of them."
        )
    revision = named or options.revision or "main"
    if options.verify:
        verify(model, use=options.use, revision=revision)
    else:
        pull(model, options.output, use=options.use, revision=revision, offline=options.offline)


def list_models(options: argparse.Namespace) -> None:
    """``fbqat list``."""
    from fbqat_hub.hub.listing import downloaded, published, runs, table

    models = [*runs(options.runs), *downloaded()]
    try:
        models = models if options.local else [*published(options.author), *models]
    finally:
        print(table(models))
