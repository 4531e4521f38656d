"""Every option that options.py sets, by the names and values that PopTorch hands to its compiler.

The names are those of PopTorch's Options.toDict() (python/options.py) and of PopART's
SessionOptions.
"""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ipu_options
from ipu_options import options as options_module
from ipu_options import poptorch
from ipu_options.config import DeviceSettings, IPUConfig, inference_pipeline
from ipu_options.options import (
    attach,
    compile_model,
    describe_poptorch,
    inference_options,
    training_options,
    watched_gradient,
)
from runtime import processes
from runtime.errors import UsageError
from runtime.signals import StopSignals

CONFIG = IPUConfig(layers_per_ipu=[0, 4, 4, 4], replication_factor=4)


def training(device=DeviceSettings(), seed=7, watched=None, watch=None, **changes):
    config = IPUConfig(**{**CONFIG.values(), **changes})
    return training_options(config, device, seed=seed, watched=watched, watch=watch).toDict()


def inference(device=DeviceSettings(), **changes):
    config = IPUConfig(**{**CONFIG.values(), **changes})
    return inference_options(inference_pipeline(config, 12, "pod16"), device).toDict()


def test_what_both_pipelines_set():
    for options, name in ((training(), "training"), (inference(), "inference")):
        assert options["model_name"] == name
        assert options["auto_round_num_ipus"] is True
        assert options["execution_mode"] == 0  # pipelined
        assert options["available_memory_proportion"] == {ipu: 0.25 for ipu in range(4)}
        assert options["replication_factor"] == 4
        assert options["partialsTypeMatMuls"] == "half"
        assert options["convolutionOptions"] == {"partialsType": "half"}
        assert options["subgraphCopyingStrategy"] == 1  # just in time
        assert options["engineOptions"]["opt.useAutoloader"] == "true"
        assert options["engineOptions"]["target.syncReplicasIndependently"] == "true"
        # Other processes can use the IPUs until this one has compiled.
        assert options["connection_type"] == poptorch.ConnectionType.OnDemand.value


def test_what_training_sets():
    options = training()
    assert options["gradient_accumulation"] == 32 and options["device_iterations"] == 1
    assert options["accumulation_and_replication_reduction_type"] == poptorch.ReductionType.Mean
    assert options["output_mode"] == poptorch.OutputMode.All.value
    assert options["random_seed"] == 7
    assert options["enableStochasticRounding"] is True
    assert options["location_optimizer"] == {"onChip": 1, "useReplicatedTensorSharding": 1}
    assert options["disableGradAccumulationTensorStreams"] is True
    assert options["patterns"] == {"TiedGather": True, "TiedGatherAccumulate": True,
                                   "UpdateInplacePrioritiesForIpu": True}
    assert options["accumulateOuterFragmentSettings.schedule"] == 3  # overlap, memory optimised
    assert options["accumulateOuterFragmentSettings.excludedVirtualGraphs"] == ["0"]
    assert options["scheduleNonWeightUpdateGradientConsumersEarly"] is True
    assert "automaticLossScalingSettings.enabled" not in options
    # An overflow becomes NaN. By default it would become 65,504, which looks like any other number.
    assert options["engineOptions"]["debug.nanOverflowMode"] == "true"


def test_what_inference_sets():
    options = inference()
    assert options["gradient_accumulation"] == 1 and options["device_iterations"] == 16
    assert options["output_mode"] == poptorch.OutputMode.All.value
    assert options["enableStochasticRounding"] is False
    assert not {"location_optimizer", "random_seed", "patterns"} & set(options)


@pytest.mark.parametrize("changes, expected", [
    (dict(gradient_accumulation_steps=9), {"gradient_accumulation": 9}),
    (dict(device_iterations=3), {"device_iterations": 3}),
    (dict(replication_factor=2), {"replication_factor": 2}),
    (dict(replication_factor=1),  # there is no other replica to share the state with
     {"location_optimizer": {"onChip": 1, "useReplicatedTensorSharding": 0}}),
    (dict(replicated_tensor_sharding=False),
     {"location_optimizer": {"onChip": 1, "useReplicatedTensorSharding": 0}}),
    (dict(optimizer_state_offchip=True),
     {"location_optimizer": {"onChip": 0, "useReplicatedTensorSharding": 1}}),
    (dict(stochastic_rounding=False), {"enableStochasticRounding": False}),
    # It needs an overflow to become 65,504, and looks for numbers near it.
    (dict(auto_loss_scaling=True), {
        "automaticLossScalingSettings.enabled": True, "engineOptions": {
            "opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"}}),
    (dict(output_mode="final"), {"output_mode": poptorch.OutputMode.Final.value}),
    (dict(output_mode="sum"), {"output_mode": poptorch.OutputMode.Sum.value}),
    (dict(matmul_proportion=[0.1, 0.2, 0.3, 0.4]),
     {"available_memory_proportion": {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}}),
    (dict(executable_cache_dir="cache"), {"cachePath": "cache"}),
    (dict(executable_cache_dir=""), {"enableEngineCaching": False}),
    (dict(executable_cache_dir="disabled"), {"enableEngineCaching": False}),
])
def test_each_setting_reaches_its_option_and_no_other(changes, expected, monkeypatch):
    monkeypatch.delenv("POPLAR_EXECUTABLE_CACHE_DIR", raising=False)
    before, after = training(), training(**changes)
    different = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert set(expected) <= different <= {*expected, "replication_factor", "location_optimizer",
                                          "cachePath"}
    assert {name: after[name] for name in expected} == expected


def test_partials_stay_float32_where_half_is_not_asked_for():
    assert "partialsTypeMatMuls" not in training(enable_half_partials=False)


def test_an_inference_twin_takes_the_place_of_its_setting():
    options = inference(inference_layers_per_ipu=[6, 6], inference_replication_factor=2,
                        inference_device_iterations=3, inference_matmul_proportion=0.5)
    assert options["available_memory_proportion"] == {0: 0.5, 1: 0.5}
    assert (options["replication_factor"], options["device_iterations"]) == (2, 3)


@pytest.mark.parametrize("training_layers, replicas, inference_layers, inference_replicas", [
    ([0, 4, 4, 4], 4, [6, 6], 8), ([4, 4, 4], 4, [6, 6], 8),  # 3 IPUs are reserved as 4
    ([12], 16, [6, 6], 8), ([12], 1, [6, 6], 1), ([0, 4, 4, 4], 4, None, 4)])
def test_inference_replicas_share_the_ipus_that_train(training_layers, replicas, inference_layers,
                                                      inference_replicas):
    options = inference(layers_per_ipu=training_layers, replication_factor=replicas,
                        matmul_proportion=[0.3] * len(training_layers),
                        inference_layers_per_ipu=inference_layers)
    assert options["replication_factor"] == inference_replicas
    # A share for each training IPU says nothing about a pipeline with another number of IPUs.
    inherited = len(inference_layers or training_layers) == len(training_layers)
    assert set(options["available_memory_proportion"].values()) == {0.3 if inherited else 0.25}


def test_a_single_row_runs_through_the_stages_one_after_the_other():
    pipeline = inference_pipeline(CONFIG, 12, "pod16", single_rows=True)
    options = inference_options(pipeline, DeviceSettings()).toDict()
    assert (options["device_iterations"], options["replication_factor"]) == (1, 1)
    assert options["execution_mode"] == 1  # sharded
    assert pipeline.layout == inference_pipeline(CONFIG, 12, "pod16").layout


@pytest.mark.parametrize("device, expected", [
    (DeviceSettings(synthetic_data=True), {"syntheticDataMode": 2}),  # random normal
    (DeviceSettings(ipu_model=True), {"use_model": True}),
    (DeviceSettings(compile_only=True), {"connection_type": poptorch.ConnectionType.Never.value}),
])
def test_the_device_is_what_was_asked_for(device, expected):
    for options in (training(device), inference(device)):
        assert {name: int(options[name]) for name in expected} == expected


def test_executables_are_cached_where_setting_environment_or_user_keep_them(monkeypatch, tmp_path):
    monkeypatch.delenv("POPLAR_EXECUTABLE_CACHE_DIR", raising=False)
    monkeypatch.delenv("POPTORCH_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert training()["cachePath"].startswith(str(tmp_path)) and training()["enableEngineCaching"]
    monkeypatch.setenv("POPTORCH_CACHE_DIR", "PopTorch's")
    assert training()["cachePath"] == "PopTorch's"
    monkeypatch.setenv("POPLAR_EXECUTABLE_CACHE_DIR", "Poplar's")
    assert training()["cachePath"] == "Poplar's"
    assert training(executable_cache_dir="set")["cachePath"] == "set"
    assert training(executable_cache_dir="")["enableEngineCaching"] is False


def test_a_profile_is_written_below_the_folder_under_the_models_name_as_poptorch_adds_it(tmp_path):
    device = DeviceSettings(profile_dir=str(tmp_path))
    for options, phase in ((training(device), "training"), (inference(device), "inference")):
        assert options["engineOptions"]["autoReport.directory"] == str(tmp_path)
        assert options["model_name"] == phase
        assert options["engineOptions"]["opt.useAutoloader"] == "true"  # is still there
        # An executable from the cache would bring no memory report.
        assert options["enableEngineCaching"] is False


@pytest.mark.parametrize("watch, compile_only, anchored", [
    (None, False, True), (None, True, False), (True, True, True), (False, False, False)])
def test_a_gradient_is_watched_where_it_is_asked_for_or_no_ipu_runs(watch, compile_only, anchored):
    device = DeviceSettings(compile_only=compile_only)
    options = training_options(CONFIG, device, seed=1, watched="w", watch=watch)
    assert [name for name, *_ in options.anchored_tensors.values()] == ["Gradient___w"] * anchored


def test_a_watched_gradient_is_read_after_a_call():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            return poptorch.identity_loss((self.w * x).sum(), reduction="none")

    config = IPUConfig(layers_per_ipu=[1], gradient_accumulation_steps=2, replication_factor=1)
    options = training_options(config, DeviceSettings(), seed=1, watched="w")
    model = Model()
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    training_model = poptorch.trainingModel(model, options, optimizer)
    inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    training_model(inputs)
    (gradient,) = watched_gradient(options, training_model).values()
    assert torch.equal(gradient.reshape(2, 2), inputs)  # one row for each micro-batch


def test_a_profiled_run_has_no_cache_that_an_environment_variable_names(monkeypatch, tmp_path):
    """PopTorch's processes wait for each other's compiling where there is a path (_impl.py)."""
    monkeypatch.setenv("POPTORCH_CACHE_DIR", str(tmp_path))
    assert training()["cachePath"] == str(tmp_path)
    profiled = training(DeviceSettings(profile_dir=str(tmp_path / "profile")))
    assert profiled["cachePath"] == "" and profiled["enableEngineCaching"] is False


def test_torchrun_is_refused_where_there_are_ipus(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.place.cache_clear()
    try:
        assert "poptorch_host" in describe_poptorch(DeviceSettings())
        monkeypatch.setattr(options_module, "device", "IPU")
        with pytest.raises(UsageError, match="start the processes with poprun"):
            describe_poptorch(DeviceSettings())
    finally:
        monkeypatch.undo()
        processes.place.cache_clear()


@pytest.mark.slow
def test_poptorch_waits_for_ipus_that_others_have_and_prints_no_stacks_at_sigterm(tmp_path):
    """In a process of its own, with a module that does at its import what PopTorch's does."""
    (tmp_path / "poptorch.py").write_text(
        "import faulthandler, signal; faulthandler.register(signal.SIGTERM, chain=True)\n")
    script = """if True:
        import os, signal
        signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
        from ipu_options import device
        signal.raise_signal(signal.SIGTERM)
        print(os.environ["POPTORCH_WAIT_FOR_IPU"], device)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=Path(ipu_options.__file__).parents[1], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=120)
    assert done.stdout == "handled\n1 IPU\n"


class Executor:
    """A model that is compiled while others have the IPUs, until `attachToDevice` gets them."""

    compiled = attached = False

    def __init__(self, options):
        self.options = options

    def compile(self, **batch):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # no handler could run meanwhile
        self.compiled = True
        if self.options.connection_type != poptorch.ConnectionType.Never:
            raise poptorch.Error("'popart_runtime_error': Failed to attach to device")

    def attachToDevice(self):
        assert self.compiled and not self.attached
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        self.attached = True

    def isAttachedToDevice(self):
        return self.attached


@pytest.mark.parametrize("offline", [False, True])
def test_a_model_is_attached_as_soon_as_others_free_their_ipus(offline):
    options = poptorch.Options().connectionType(poptorch.ConnectionType.OnDemand)
    executor = Executor(options.useOfflineIpuTarget() if offline else options)
    with StopSignals():
        compile_model(executor, {})
        assert executor.compiled and executor.attached != offline
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    if not offline:
        attach(executor)  # nothing to do


def test_another_error_of_the_compiler_is_no_lack_of_ipus():
    executor = Executor(poptorch.Options())
    executor.compile = lambda: poptorch_host_error("out of memory")
    with pytest.raises(poptorch.Error, match="out of memory"):
        compile_model(executor, {})


def poptorch_host_error(message):
    raise poptorch.Error(message)
