"""Have PopTorch's and PopART's own compilers compile this project's models, and read the result.

    python -m tests.tools.compiled_by_popart DIR [NAME ...] [--facts FILE] [--break]

DIR/python holds a package poptorch with the real compiled core and the real PopART up to the point
where Poplar would begin; docs/ipu_host.md says what that is. Needs Python 3.8 and torch 2.0.1.
NAME: only the cases whose name contains it, among them the configurations at their real sizes,
every family, every option that options.py and parallelize set, and the variants of tests/on_ipu.
Each is compiled in a process of its own, once as a run compiles it, and once without outlining,
whose intermediate representation is held to the layout and the options (popart_ir.py). --facts
writes what tests/planner/test_popart_facts.py holds the planner to. --break compiles models that
are wrong on purpose, and succeeds if each is found out. The exit status is 1 if a case fails.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parents[2]
HALF = {"precision": "float16", "loss_scaling": 64}
PHASES = ("training", "inference", "question")
TWO, FOUR = ({"pod_type": pod, "replication_factor": replicas}
             for pod, replicas in (("pod8", 2), ("pod16", 4)))
# Changes of the demo's configuration: each option on and off, and those that depend on each other.
OPTIONS: List[Dict[str, Any]] = [
    {}, HALF, {"pack": False}, {"micro_batch_size": 3}, {"device_iterations": 4}, TWO,
    {**FOUR, **HALF}, {"pod_type": "pod16", "replication_factor": 3},
    {**TWO, "replicated_tensor_sharding": False},
    {"layers_per_ipu": [4]}, {"layers_per_ipu": [0, 2, 2]}, {"layers_per_ipu": [0, 3, 1, 0]},
    {"layers_per_ipu": [0, 1, 1, 1, 1, 0], "pod_type": "pod8", "replication_factor": 1},
    {"layers_per_ipu": [0, 2, 2], "head_ipu": 0}, {"layers_per_ipu": [2, 2], "embedding_ipu": 1},
    {"layers_per_ipu": [2, 2], "recompute_checkpoint_every_layer": False},
    {"embedding_serialization_factor": 4}, {**TWO, **HALF, "embedding_serialization_factor": 2},
    {"matmul_proportion": [0.1, 0.2, 0.3, 0.4]}, {"enable_half_partials": False},
    {**HALF, "stochastic_rounding": False},
    *({**changes, **replicas, "optimizer_state_offchip": True}
      for changes in ({}, HALF, {**HALF, "enable_half_first_order_momentum": True})
      for replicas in ({}, FOUR, {**TWO, "replicated_tensor_sharding": False})),
    *({**HALF, **replicas, "enable_half_first_order_momentum": True} for replicas in ({}, FOUR)),
    *({**HALF, **replicas, "optimizer": "lamb"} for replicas in ({}, FOUR)), {"optimizer": "lamb"},
    {"max_grad_norm": 1.0}, {**HALF, **FOUR, "max_grad_norm": 1.0, "optimizer_state_offchip": True},
    {"max_grad_norm": 1.0, "optimizer": "lamb"},
    {**HALF, "max_grad_norm": 1.0, "enable_half_first_order_momentum": True},
    {**HALF, "auto_loss_scaling": True}, {"auto_loss_scaling": True},
    *({"output_mode": mode} for mode in ("final", "sum", "default")), {"watch_gradients": True},
    {**TWO, **HALF, "watch_gradients": True}, {"synthetic_data": True}]
OF_INFERENCE = [{}, HALF, {"pack": False}, {**FOUR, **HALF}, {"inference_layers_per_ipu": [4]},
                {"inference_embedding_serialization_factor": 4}, {"enable_half_partials": False},
                {"inference_matmul_proportion": [0.1, 0.4]}, {"synthetic_data": True}]
BREAKS = ("a block on another IPU", "a checkpoint dropped", "a constant for all stages",
          "optimizer state on chip", "a layer in float32")
SMALL = {"pod_type": "pod4", "layers_per_ipu": [1, 1, 1, 0], "max_seq_length": 64, "doc_stride": 32,
         **HALF, "gradient_accumulation_steps": 8, "inference_layers_per_ipu": [2, 1]}


def cases(folder: Path) -> Iterator[Tuple[str, str, Dict[str, Any]]]:
    """Yield (name, phase, flags of train.py and the planner) of each case.

    folder: for the config.json of small models.
    """
    from qa.settings import named_configs
    from tests.model.test_roberta import FAMILY
    from tests.on_ipu.variants import BASE, CONFIG, VARIANTS

    def config_json(name: str, values: Dict[str, Any]) -> str:
        path = folder / f"{name.replace(' ', '_')}.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return str(path)

    for phase in PHASES:
        for changes in OPTIONS if phase == "training" else OF_INFERENCE:
            flags = {"pod_type": "pod4", **changes}
            yield (" ".join(["demo", *(f"--{name} {value}" for name, value in flags.items())]),
                   phase, {"config": "demo", **flags})
    for name, values in FAMILY.items():
        dropped = {key: 0.1 for key in values if "dropout" in key}
        path = config_json(name, {"model_type": name.split()[0], **values, **dropped})
        for phase in PHASES:
            yield name, phase, {**SMALL, "config_json": path}
    path = config_json("variants", CONFIG.to_dict())
    for name, changes in VARIANTS.items():
        for phase in PHASES[:2]:
            yield f"acceptance, {name}", phase, {
                "pod_type": "pod4", "config_json": path, **BASE, "doc_stride": 32,
                "inference_layers_per_ipu": None, **changes}
    for name in named_configs():
        for phase in PHASES:
            yield name, phase, {"config": name}


def compile_case(phase: str, flags: Dict[str, Any], outlining: bool, wrong: str) -> None:
    """Compile one case with the poptorch that is installed; `wrong` is one of BREAKS, or ""."""
    import torch

    from ipu_options import options
    from ipu_options.config import inference_pipeline, training_pipeline
    from planner.from_settings import planned_model, request_of
    from qa.answers.inference import InferencePipeline
    from qa.data.loader import first_batch
    from qa.model.roberta import model_class
    from tests.on_ipu.variants import training_of
    from tests.reference.synthetic_windows import SyntheticWindows

    common = options._common_options

    def common_options(*arguments):
        made = common(*arguments)
        made._Popart.set("enableOutlining", outlining)
        return made

    options._common_options = common_options
    request = request_of(flags)
    settings, ipu_config, *_ = request
    model_config = planned_model(request)
    settings.compile_only = True  # for an offline target
    with torch.device("meta"):
        model = model_class(model_config)(model_config)
    model = model.to_empty(device="cpu")  # the values do not matter
    if wrong:
        make_wrong(wrong, model)
    layers = model_config.num_hidden_layers
    if phase == "training":
        made = training_of(settings, training_pipeline(ipu_config, layers, settings.pod_type),
                           model, bool(settings.watch_gradients))
        made.training_model.compile(**first_batch(made.options, made.rows,
                                                  settings.micro_batch_size))
    else:
        pipeline = inference_pipeline(ipu_config, layers, settings.pod_type,
                                      single_rows=phase == "question")
        InferencePipeline(model, pipeline, settings).compile(SyntheticWindows([20] * 5))


def make_wrong(wrong: str, model: Any) -> None:
    """Change the functions that place the model, or the model, so that its graph is wrong."""
    from ipu_options import ipu_kernels, poptorch
    from qa.model import parallelize
    begin = poptorch.BeginBlock
    if wrong == "a block on another IPU":
        poptorch.BeginBlock = lambda module, name, ipu_id: begin(
            module, name, ipu_id=2 if name == "Encoder 1" else ipu_id)
    elif wrong == "a checkpoint dropped":
        checkpoint = parallelize._checkpoint_output
        parallelize._checkpoint_output = lambda module, inputs, output: (
            output if module is model.layers[0] else checkpoint(module, inputs, output))
    elif wrong == "a constant for all stages":
        ipu_kernels.stage_scalar = lambda value, like, stage: value
    elif wrong == "optimizer state on chip":
        poptorch.TensorLocationSettings.useOnChipStorage = lambda self, use: self
    elif wrong == "a layer in float32":
        half = type(model).half
        type(model).half = lambda self: half(self) and self.layers[1].float() and self


def run(directory: Path, phase: str, flags: Dict[str, Any], outlining: bool, report: Path,
        wrong: str = "") -> str:
    """Compile a case in a process of its own; return "compiled", "refused: ..." or the error."""
    environment = {**os.environ, "PYTHONPATH": str(directory / "python"), "HF_HUB_OFFLINE": "1",
                   "POPART_STUB_REPORT": str(report), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.compiled_by_popart", str(directory), "--case",
         json.dumps([phase, flags, outlining, wrong])], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith(("compiled", "refused"))), None)
    return said or "; ".join(lines[-2:])[-300:]


def examine(report: Path, phase: str, flags: Dict[str, Any]) -> Tuple[List[str], dict]:
    """Return (problems, facts) of the representation that a case was compiled to."""
    from planner.from_settings import make_job, request_of
    from planner.phase import INFERENCE, TRAINING
    from tests.tools.popart_ir import Ir, facts, problems

    more = {"windows_per_row": 1} if flags.get("pack") else {}
    if phase == "question":
        more["eval_micro_batch_size"] = 1
    request = request_of({**flags, **more}, TRAINING if phase == "training" else INFERENCE)
    job, ir = make_job(request), Ir(report)
    return problems(ir, job, request.settings), facts(ir, job)


def main() -> int:
    """Compile the cases and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("names", metavar="NAME", nargs="*")
    parser.add_argument("--facts", metavar="FILE", type=Path)
    parser.add_argument("--break", dest="wrong", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    if not (directory / "python" / "poptorch").is_dir():
        parser.error(f"{directory} has no python/poptorch: skipped; docs/ipu_host.md says what "
                     "belongs there")
    if arguments.case:
        return compile_and_say(*json.loads(arguments.case))
    failed = refused = 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "ir.jsonl"
        if arguments.wrong:
            return found_out(directory, report)
        chosen = [case for case in cases(Path(folder)) if not arguments.names or any(
            name in case[0] for name in arguments.names)]
        for name, phase, flags in chosen:
            began = time.monotonic()
            said = run(directory, phase, flags, True, report)
            wrong, numbers = [], None
            if said == "compiled":
                said = run(directory, phase, flags, False, report)
                if said == "compiled":
                    wrong, numbers = examine(report, phase, flags)
            refused += said.startswith("refused")
            failed += bool(wrong) or not said.startswith(("compiled", "refused"))
            print(f"{phase:<9} {time.monotonic() - began:>5.0f} s  {name}: {said}", flush=True)
            for line in wrong:
                print(f"    {line}")
            if arguments.facts and numbers and set(flags) == {"config"} and phase != "question":
                write_facts(arguments.facts, name, phase, numbers)
    print(f"{len(chosen)} cases, {refused} of them refused, {failed} not as they should be")
    return 1 if failed else 0


def found_out(directory: Path, report: Path) -> int:
    """Compile wrong models; return 0 if each is found out."""
    missed = 0
    flags = {"config": "demo", "pod_type": "pod16", **FOUR, **HALF, "optimizer_state_offchip": True}
    for wrong in BREAKS:
        said = run(directory, "training", flags, False, report, wrong)
        lines = examine(report, "training", flags)[0] if said == "compiled" else [said]
        missed += not lines
        print(f"{wrong}: {len(lines)} lines, the first: {lines[0] if lines else 'NOT FOUND OUT'}",
              flush=True)
    return 1 if missed else 0


def compile_and_say(phase: str, flags: Dict[str, Any], outlining: bool, wrong: str) -> int:
    """Compile a case and print what `run` looks for."""
    from runtime.errors import UsageError
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            compile_case(phase, flags, outlining, wrong)
    except UsageError as error:
        print(f"refused: {error}")
        return 0
    print("compiled", flush=True)
    return 0


def write_facts(path: Path, name: str, phase: str, numbers: Dict[str, Any]) -> None:
    """Enter the facts of a configuration into the file `path`, with versions and command."""
    import torch
    import transformers

    from runtime.files import write_json
    known = json.loads(path.read_text("utf-8"))["configurations"] if path.exists() else {}
    known.setdefault(name, {})[phase] = numbers
    write_json(path, {
        "command": "python -m tests.tools.compiled_by_popart DIR --facts FILE",
        "versions": {"poptorch": "3.4.0 (c2a8b177)", "popart": "3.4.0 (d2f20d78)",
                     "torch": torch.__version__, "transformers": transformers.__version__},
        "configurations": known})


if __name__ == "__main__":
    sys.exit(main())
