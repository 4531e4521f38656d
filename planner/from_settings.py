"""Makes the planner's Job from the settings of train.py: model, counts, pipeline and data."""
from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

from ipu_options.config import IPUS_OF_A_HOST, POD_IPUS, IPUConfig, pod_of, reserved_ipus
from ipu_options.layout import Layout, in_ipus
from planner import calibrate
from planner.flags import MODELS, JobSettings, Request, flag_words
from planner.job import Job
from planner.machine import MACHINES
from planner.phase import INFERENCE, PHASES, TRAINING, Phase
from planner.plan import Plan, make_plan
from planner.search import settings_in, settings_of
from qa.data import demo
from qa.families import check_checkpoint, check_config, check_row_length, family_of, most_tokens
from qa.settings import TrainSettings, train_settings
from runtime.errors import UsageError
from runtime.files import read_json_object, writing

# Mean number of real tokens of a window, and number of windows of an epoch, for SQuAD at length 384
# and stride 128, as in the published runs of roberta-base and roberta-base-squad2. The validation
# questions are 10,570 and 11,873, some with long contexts.
REAL_TOKENS = {"demo": demo.MEAN_TOKENS, "squad": 181, "squad_v2": 181}
WINDOWS = {
    TRAINING: {"demo": demo.TRAIN_QUESTIONS, "squad": 88568, "squad_v2": 131823},
    INFERENCE: {"demo": demo.VALIDATION_QUESTIONS, "squad": 10_800, "squad_v2": 12_200}}
PACKING_EFFICIENCY = 0.97  # share of real tokens in the rows that best-fit decreasing packs


def request_of(flags: Dict[str, Any], phase: Phase = TRAINING) -> Request:
    """Return the request of flags by name. Raises what `train_settings` raises."""
    return Request(*train_settings(flags, JobSettings), phase, flags)


def make_job(request: Request) -> Job:
    """Return the job that train.py would run, or evaluate with; raises as `planned_model` does."""
    settings, ipu_config, planning, phase, _ = request
    model = planned_model(request)
    from planner.count import make_counter  # takes seconds, for torch
    config, layout, _ = vars(phase.pipeline(
        ipu_config, model.num_hidden_layers, planned_pod(request))).values()
    config = replace(config, layers_per_ipu=layout.layers_per_ipu(config.num_ipus()))
    check_row_length(settings, most_tokens(model))
    packed = _packed_windows_per_row(request)
    if settings.pack and packed is None:
        raise UsageError(
            f"{settings.source('pack')}: how many windows share a row of your own data is not "
            "known before it is read: give --windows_per_row (a run prints it)")
    if config.embedding_serialization_factor > model.vocab_size:
        raise UsageError(
            f"{config.source('embedding_serialization_factor')} "
            f"{config.embedding_serialization_factor} is more than the model's "
            f"{model.vocab_size} words")
    pack = packed is not None and (settings.pack or phase is INFERENCE)  # answers are packed
    count = make_counter(
        model, max_seq_length=settings.max_seq_length, precision=settings.precision,
        max_windows_per_row=settings.max_windows_per_row, training=phase is TRAINING)
    micro_batch_size, steps = getattr(settings, phase.micro_batch_flag), settings.max_steps
    return Job(
        count(micro_batch_size, config.embedding_serialization_factor, pack), layout, config,
        MACHINES[planning.ipu], micro_batch_size, settings.max_seq_length, settings.precision,
        phase, settings.max_grad_norm is not None, pack=pack, packed_windows_per_row=packed,
        windows=_windows(request), epochs=settings.num_train_epochs,
        updates=steps and steps * config.device_iterations if phase is TRAINING else None,
        count=count)


def planned(request: Request) -> Plan:
    """Return the plan of a request. Raises what `make_job` and `calibrate.load` raise."""
    return make_plan(make_job(request), calibrate.load(request.planning.calibration))


def run_command(plan: Plan, request: Request, file: Optional[str] = None) -> str:
    """Return the command line that runs a plan; with `file`, its pipeline is read from there."""
    settings, ipu_config, planning, _, flags = request
    if planning.shape() or planning.config_json:
        return "(a model of given sizes has no checkpoint to train)"
    flags = {**flags, **settings_in(plan, ipu_config, plan.job.ipus)}
    names = {"ipu_config", *settings.values(), *(ipu_config.values() if file is None else ())}
    flags = {name: value for name, value in flags.items() if name in names}
    if file:
        flags["ipu_config"] = file
    if plan.job.ipus > POD_IPUS[settings.pod_type]:
        flags["pod_type"] = pod_of(plan.job.ipus)
    return shlex.join(["python", "train.py", *flag_words(flags)])


def write_pipeline(plan: Plan, request: Request, file: str, ipus: Optional[int] = None) -> str:
    """Write a plan's pipeline, which evaluates on `ipus`, to `file`; return how to train so."""
    with writing(f"--write {file}"):
        settings_of(plan, request.ipu_config, ipus or plan.job.ipus).write(file)
    return f"Wrote {file}. Train with it: {run_command(plan, request, file)}"


def pod_note(request: Request, job: Job) -> Optional[str]:
    """Return a sentence on the pod that the job takes, if a run with these flags has less."""
    settings, pod = request.settings, pod_of(job.ipus)
    if job.ipus > IPUS_OF_A_HOST:
        return (f"That takes {pod} and several hosts; a run needs --pod_type {pod} as well.\n"
                f"{hosts_text(job)}")
    if job.ipus <= POD_IPUS[settings.pod_type]:
        return None
    here = os.environ.get("NUM_AVAILABLE_IPU") and "pod_type" not in settings.sources
    if here and reserved_ipus(job.config.num_ipus()) > POD_IPUS[settings.pod_type]:
        return (f"That takes {in_ipus(job.ipus)}, and NUM_AVAILABLE_IPU is "
                f"{POD_IPUS[settings.pod_type]}: `python -m planner search` with these flags "
                "finds what fits there.")
    return (f"That takes {pod}: a run needs --pod_type {pod} --replication_factor "
            f"{job.config.replication_factor} as well.")


def packing_note(request: Request, job: Job) -> Optional[str]:
    """Return what is assumed of packed rows, which the job has not, but would gain from."""
    data = _data(request.settings)
    if not job.gains_by_packing:
        return None if data or job.pack or not job.training else (
            "--pack is not tried: how many windows share a row of your own data is not known; "
            "--windows_per_row says it.")
    how = ("as --windows_per_row says" if request.planning.windows_per_row else
           f"assumed: a window of {data} has {REAL_TOKENS[data]} tokens on average, and rows are "
           f"{100 * PACKING_EFFICIENCY:.0f} % full")
    return f"With --pack a row holds {job.packed_windows_per_row:.2f} windows, {how}."


def hosts_text(job: Job) -> str:
    """Return how several hosts share the job, what starts them, and what is assumed of them."""
    replicas, hosts = job.config.replication_factor, job.hosts
    text = (f"{hosts} hosts of {IPUS_OF_A_HOST} IPUs, with one instance each, which feeds "
            f"{replicas // hosts} replicas (more instances on a host are not planned): poprun "
            f"--num-instances {hosts} --num-replicas {replicas} --ipus-per-replica "
            f"{reserved_ipus(job.config.num_ipus())}.")
    return text if not job.training else (
        f"{text}\nAssumed: gradients are reduced within each rack of {IPUS_OF_A_HOST} over its "
        "IPU-Links, and the shares of its IPUs between racks over two GW-Links of 100 Gbit/s for "
        "each four IPUs; no published run tells how good this is.")


def planned_pod(request: Request) -> str:
    """Return the pod to plan on, for a plan books nothing: --pod_type if given.

    Else the smallest one, from a run's on, with whose by-pod values the pipeline fits; if the
    replicas grow with the pod, the smallest one with the IPUs of one replica.
    """
    settings, ipu_config = request.settings, request.ipu_config
    if "pod_type" in settings.sources:
        return settings.pod_type
    for pod in (pod for pod in POD_IPUS if POD_IPUS[pod] >= POD_IPUS[settings.pod_type]):
        config = ipu_config.for_pod(pod)
        config = config.inference() if request.phase is INFERENCE else config
        replica = reserved_ipus(config.num_ipus())
        if config.replication_factor * replica <= POD_IPUS[pod]:
            return pod
    return pod_of(replica)


def published() -> List[calibrate.PublishedRun]:
    """Return the runs of published_runs.json, whose "about" describes the format."""
    from planner.count import make_counter

    runs, file = [], Path(__file__).with_name("published_runs.json")
    for run in json.loads(file.read_text(encoding="utf-8"))["runs"]:
        config, model = IPUConfig(**run["ipu_config"]), run["model"]
        phase = PHASES[run.get("phase", "training")]
        size, length = run["micro_batch_size"], run["max_seq_length"]
        sizes = {"base": model} if isinstance(model, str) else dict(model)
        dropout = {"attention_probs_dropout_prob": 0.0} if config.head_ipu == 0 else {}
        sizes = {"model_type": "roberta", **dropout, **MODELS.get(sizes.pop("base", None), {}),
                 **sizes}
        halves = [ipu for ipu, parts in run.get("att_ffn_placement", ())
                  for _ in range(sum(parts))]
        count = partial(make_counter(_configuration(sizes), max_seq_length=length,
                                     training=phase is TRAINING), halves=bool(halves))
        blocks = count(size, config.embedding_serialization_factor)
        layout = Layout(config.embedding_ipu, tuple(halves), config.head_ipu) if halves else (
            config.layout(sum(block.kind == "layer" for block in blocks)))
        job = Job(blocks, layout, config, MACHINES[run["machine"]], size, length, phase=phase,
                  count=count)
        runs.append(calibrate.PublishedRun(run["name"], run["use"], run.get("rows_per_second"),
                                           run["source"], job, run.get("framework", "PyTorch")))
    return runs


def planned_model(request: Request) -> Any:
    """Return transformers' configuration of the model to plan, changed by the shape flags.

    Raises UsageError for an unsuitable model, RunError if its configuration cannot be loaded.
    """
    settings, planning = request.settings, request.planning
    sizes = MODELS.get(settings.model_name_or_path.split("/")[-1])
    if planning.config_json is not None:
        model = _from_json(planning.config_json)
    elif settings.demo_data:
        model = _configuration({"model_type": "roberta", **demo.MODEL})
    elif sizes is None or Path(settings.model_name_or_path).is_dir():
        check_checkpoint(settings, weights=False)  # before torch is imported
        from qa.model.pretrained import load_config
        model = load_config(settings, weights=False)
    else:
        model = _configuration(sizes)
    shape = planning.shape()
    width = shape.get("hidden_size")
    if width:  # of heads 64 wide, if that goes
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        shape = {"num_attention_heads": heads, "intermediate_size": 4 * width, **shape}
    own_names = family_of(model).own_names
    for name, value in shape.items():
        setattr(model, own_names.get(name, name), value)
    width, heads = model.hidden_size, model.num_attention_heads
    if width % heads:
        raise UsageError(f"--hidden_size {width} is not a multiple of the {heads} attention heads: "
                         f"the nearest is {max(1, round(width / heads)) * heads}")
    return model


def planned_name(request: Request) -> str:
    """Return what to call the planned job in a heading: its configuration and its model."""
    settings, planning = request.settings, request.planning
    name = planning.config_json or (
        "the demo's model" if settings.demo_data else settings.model_name_or_path)
    if planning.shape():
        model = planned_model(request)
        name += f" with {model.num_hidden_layers} layers {model.hidden_size} wide"
    return f"{settings.config}, {name}"


def _from_json(path: str) -> Any:
    from transformers import AutoConfig
    source = f"--config_json {path}"
    if not Path(path).is_file():
        raise UsageError(f"{source}: no such file; name the config.json of a checkpoint")
    values = read_json_object(Path(path), source)
    if "model_type" not in values:
        raise UsageError(f"{source}: has no model_type; name the config.json of a checkpoint")
    check_config(SimpleNamespace(**values), source)
    return AutoConfig.for_model(**values)


def _configuration(values: dict) -> Any:
    from transformers import AutoConfig
    names = family_of(SimpleNamespace(**values)).own_names
    return AutoConfig.for_model(**{names.get(name, name): value for name, value in values.items()})


def _packed_windows_per_row(request: Request) -> Optional[float]:
    """Return the mean number of windows in a packed row; None for data that is not known."""
    settings, windows = request.settings, request.planning.windows_per_row
    if request.phase is TRAINING and "--pack" == settings.sources.get("pack") and not settings.pack:
        return None  # --pack false: it is not to be considered
    if windows is not None:
        if windows > settings.max_windows_per_row:
            raise UsageError(
                f"--windows_per_row {windows:g}: it should be between 1 and "
                f"--max_windows_per_row, which is {settings.max_windows_per_row}")
        return windows
    tokens = REAL_TOKENS.get(_data(settings))
    return tokens and max(1.0, min(PACKING_EFFICIENCY * settings.max_seq_length / tokens,
                                   float(settings.max_windows_per_row)))


def _windows(request: Request) -> Optional[int]:
    """Return the number of windows of an epoch, or to answer; None if it is not known."""
    settings, phase = request.settings, request.phase
    windows = getattr(request.planning, f"{phase.data}_windows")
    if windows is not None or getattr(settings, f"max_{phase.data}_samples") is not None:
        return windows
    usual = (settings.max_seq_length, settings.doc_stride) == (384, 128) or settings.demo_data
    return WINDOWS[phase].get(_data(settings)) if usual else None


def _data(settings: TrainSettings) -> Optional[str]:
    """Return the name of the data set, None for files of one's own."""
    return "demo" if settings.demo_data else None if settings.train_file else settings.dataset_name
