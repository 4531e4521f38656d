"""layers_per_ipu, pipelines and ipu_config.json: what is accepted, and what a refusal says."""
import itertools
import json

import pytest
import torch

from ipu_options import poptorch
from ipu_options.config import (
    IPUConfig,
    available_pod,
    inference_pipeline,
    read_ipu_config,
    training_pipeline,
)
from ipu_options.layout import Layout, make_layout
from runtime.errors import UsageError
from runtime.flags import Source, make_settings


@pytest.mark.parametrize("given, layers, ipus, counts", [
    ([0, 4, 4, 4], 12, None, [0, 4, 4, 4]),
    ([3, 7, 7, 7], 24, 4, [3, 7, 7, 7]),
    ([-1], 12, 4, [3, 3, 3, 3]),
    ([-1], 6, 4, [2, 2, 1, 1]),
    ([0, -1, -1, -1], 12, None, [0, 4, 4, 4]),
    ([1, 2, -1, -1], 12, 4, [1, 2, 5, 4]),
    ([12], 12, None, [12]),
])
def test_layers_are_where_layers_per_ipu_says(given, layers, ipus, counts):
    layout = make_layout(given, layers, ipus)
    assert [layout.layer_ipus.count(i) for i in range(len(counts))] == counts
    assert list(layout.layer_ipus) == sorted(layout.layer_ipus)
    assert (layout.embedding_ipu, layout.head_ipu) == (0, len(counts) - 1)


def test_stages_are_changes_of_ipu():
    # Every placement of embedding and 3 layers on 3 IPUs, the head on IPU 2. PopTorch begins on
    # IPU 0 (popart_compiler/source/Compiler.cpp, setActiveIpu).
    for embedding, *ipus in itertools.product(range(3), repeat=4):
        layout = Layout(embedding, tuple(ipus), 2)
        path = [0, embedding, *ipus, 2]
        changes = 1 + sum(a != b for a, b in zip(path, path[1:]))
        assert len(layout.stages()) == changes
        assert [name for _, names in layout.stages() for name in names] == [
            name for name, _ in layout.blocks()]
        assert layout.min_gradient_accumulation() == 2 * changes - 1


@pytest.mark.parametrize("given, layers, ipus, message", [
    ([0, 4, 4, 3], 12, None, "adds up to 11 layers, but the model has 12: the sum must be 12"),
    ([5, 4, 4, -1], 12, None, "the sum must be 12"),
    ([4, 4, 4], 12, 4, "names 3 IPUs, but --ipus_per_replica is 4"),
    ([4, -2, 4], 12, None, "0 or more"),
    ([6, 0, 6], 12, None, "leaves IPU 1 without any block"),
])
def test_a_layout_that_does_not_add_up_is_refused(given, layers, ipus, message):
    with pytest.raises(UsageError, match=message):
        make_layout(given, layers, ipus)


@pytest.mark.parametrize("ipus", [(0, 1, 2, 3), (0, 1, 0), (1, 0, 1), (1, 0), (3, 2, 1, 0)])
def test_stages_are_counted_as_poptorch_counts_them(ipus):
    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            for index, ipu in enumerate(ipus):
                with poptorch.Block(f"block {index}", ipu_id=ipu):
                    x = x * self.weight
                    if index == len(ipus) - 1:
                        return poptorch.identity_loss(x.sum(), reduction="none")

    def compile_with(accumulation):
        options = poptorch.Options()
        options.Training.gradientAccumulation(accumulation)
        poptorch.trainingModel(Blocks(), options).compile(torch.ones(accumulation, 2))

    least = Layout.from_blocks(ipus).min_gradient_accumulation()
    compile_with(least)
    with pytest.raises(poptorch.Error, match=rf"number of pipeline stages \({least}\)"):
        compile_with(least - 1)


@pytest.mark.parametrize("change, message", [
    (dict(gradient_accumulation_steps=6), "needs at least 7"),
    (dict(inference_device_iterations=3), "use at least 4"),
    (dict(layers_per_ipu=[6, 6], embedding_ipu=1, gradient_accumulation_steps=6),
     "over 4 pipeline stages needs at least 7"),
    (dict(layers_per_ipu=[6, 6], embedding_ipu=1, inference_device_iterations=3), "use at least 4"),
    (dict(replication_factor=2), "use at most 1"),
    (dict(layers_per_ipu=[2, 2, 2, 2, 4]), "name no more than that, as in -1 -1 -1 -1"),
    (dict(embedding_ipu=4), "--embedding_ipu 4"),
])
def test_a_pipeline_poptorch_would_refuse_is_refused_with_the_nearest_setting(change, message):
    config = IPUConfig(**{**dict(gradient_accumulation_steps=16), **change}).for_pod("pod4")
    with pytest.raises(UsageError, match=message):
        training_pipeline(config, 12, "pod4")
        inference_pipeline(config, 12, "pod4")


def test_inference_twins_replace_training_values():
    config = IPUConfig(inference_layers_per_ipu=[12], inference_matmul_proportion=0.6,
                       inference_device_iterations=8).for_pod("pod16")
    training, inference = (training_pipeline(config, 12, "pod16"),
                           inference_pipeline(config, 12, "pod16"))
    assert training.config.replication_factor == 4
    assert inference.config.replication_factor == 16  # one for each of the IPUs that train
    assert len(training.layout.stages()) == 4 and len(inference.layout.stages()) == 1
    assert inference.config.matmul_proportion == 0.6 and inference.config.device_iterations == 8
    assert inference.config.gradient_accumulation_steps == 1


def test_an_inference_layout_of_equal_shares_has_the_replicas_ipus(tmp_path):
    """As optimum-graphcore counts inference_ipus_per_replica (ipu_configuration.py, __init__)."""
    for layers, ipus, inference_layers, expected in (
            ([-1], 4, [-1], [3, 3, 3, 3]), ([-1], 4, [12], [12]), ([3, 3, 3, 3], 4, [-1], [12]),
            ([-1], 4, [-1, -1], [6, 6]), ([-1], 4, None, [3, 3, 3, 3])):
        (tmp_path / "ipu_config.json").write_text(json.dumps({
            "layers_per_ipu": layers, "ipus_per_replica": ipus,
            "inference_layers_per_ipu": inference_layers, "replication_factor": 1}))
        config = make_settings(IPUConfig, [read_ipu_config(str(tmp_path))])
        layout = inference_pipeline(config, 12, "pod4").layout
        assert layout.layers_per_ipu(len(expected)) == expected


@pytest.mark.parametrize("values", [{"replication_factor": 2}, {"inference_replication_factor": 4}])
@pytest.mark.parametrize("inference_layers", [[6, 6], None])
def test_a_model_trained_on_a_larger_pod_answers_on_a_smaller_one(values, inference_layers):
    """Replicas change speed alone: only a flag's number is refused."""
    values = {**values, "layers_per_ipu": [0, 4, 4, 4], "inference_device_iterations": 4,
              "inference_layers_per_ipu": inference_layers}
    config = make_settings(IPUConfig, [Source(values, "ipu_config.json")])
    of_file = inference_pipeline(config, 12, "pod4").config
    assert of_file.replication_factor * of_file.num_ipus() == 4
    flag = Source({"inference_replication_factor": 4})
    with pytest.raises(UsageError, match="^--inference_replication_factor 4 takes .* pod4 has 4"):
        inference_pipeline(make_settings(IPUConfig, [Source(values), flag]), 12, "pod4")


@pytest.mark.parametrize("pod, replicas", [("pod8", 1), ("pod16", 2), ("pod64", 8)])
def test_default_replicas_are_as_many_as_the_pod_has_room_for(pod, replicas):
    config = make_settings(IPUConfig, [Source({"layers_per_ipu": [0, 2, 2, 2, 2, 2, 1, 1]})])
    assert training_pipeline(config, 12, pod).config.replication_factor == replicas
    assert inference_pipeline(config, 12, pod).config.replication_factor == replicas


def test_the_published_ipu_config_is_read_and_written(tmp_path):
    published = {
        "embedding_serialization_factor": 1, "recompute_checkpoint_every_layer": True,
        "optimizer_state_offchip": False, "replicated_tensor_sharding": True,
        "enable_half_partials": True, "device_iterations": 1, "inference_device_iterations": 5,
        "replication_factor": {
            "pod4": 1, "pod8": 2, "pod16": 4, "pod32": 8, "pod64": 16, "default": 1},
        "gradient_accumulation_steps": 16, "executable_cache_dir": "./exe_cache",
        "ipus_per_replica": 4, "layers_per_ipu": [0, 4, 4, 4], "matmul_proportion": 0.25,
        "optimum_version": "1.0", "seed": 3}
    (tmp_path / "ipu_config.json").write_text(json.dumps(published))
    config = IPUConfig(**read_ipu_config(str(tmp_path)).values)
    assert config.for_pod("pod16").replication_factor == 4 and config.for_pod(
        "pod4").replication_factor == 1
    assert training_pipeline(config.for_pod("pod16"), 12, "pod16").layout == make_layout(
        [0, 4, 4, 4], 12)
    config.write(tmp_path / "ipu_config.json")
    assert IPUConfig(**read_ipu_config(str(tmp_path / "ipu_config.json")).values) == config


def test_the_pod_comes_from_the_flag_or_the_environment(monkeypatch):
    monkeypatch.delenv("NUM_AVAILABLE_IPU", raising=False)
    assert available_pod() == "pod4"
    monkeypatch.setenv("NUM_AVAILABLE_IPU", "16")
    assert available_pod() == "pod16" and available_pod("pod64") == "pod64"
    monkeypatch.setenv("NUM_AVAILABLE_IPU", "")
    assert available_pod() == "pod4"
    monkeypatch.setenv("NUM_AVAILABLE_IPU", "5")
    with pytest.raises(UsageError, match="NUM_AVAILABLE_IPU=5"):
        available_pod()


@pytest.mark.parametrize("ipus, layers", [(1, [12]), (2, [6, 6])])
def test_a_partition_of_one_or_two_ipus_takes_the_layout_that_its_refusal_names(
        monkeypatch, ipus, layers):
    monkeypatch.setenv("NUM_AVAILABLE_IPU", str(ipus))
    pod = available_pod()
    with pytest.raises(UsageError, match=f"{pod} has {ipus}") as refusal:
        training_pipeline(IPUConfig(), 12, pod)
    advised = str(refusal.value).split("as in ")[1].split(" (")[0]
    config = IPUConfig(layers_per_ipu=[int(layer) for layer in advised.split()],
                       gradient_accumulation_steps={"pod4": 32, "default": 8})
    pipeline = training_pipeline(config, 12, pod)
    assert pipeline.layout.layers_per_ipu(ipus) == layers
    assert pipeline.config.gradient_accumulation_steps == 32  # the smallest published pod's
    assert inference_pipeline(config, 12, pod).config.replication_factor == 1
