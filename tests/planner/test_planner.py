"""The planner's memory, throughput, calibration, profiles and commands."""
from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, RobertaConfig

from ipu_options.config import IPUConfig, inference_pipeline, training_pipeline
from ipu_options.layout import Layout
from planner import calibrate
from planner.commands import DOES_NOT_FIT, main
from planner.confidence import (
    CONFIDENCE,
    HOST_ERROR,
    PUBLISHED_RMS,
    QUANTILE,
    expected_error,
    host_range,
    unexplained_error,
)
from planner.count import make_counter
from planner.flags import JobSettings, TrainPlanSettings, flag_words
from planner.from_settings import MODELS, published
from planner.machine import FITTED, MACHINES, Efficiencies
from planner.memory import IN_STEP, ipu_memory
from planner.plan import make_plan
from planner.profile import advice, read_profile
from planner.sweep import read_rows, run_sweep, write_rows
from planner.throughput import stage_work
from qa.settings import parse_train
from runtime.errors import RunError, UsageError
from tests.tools import planner_walk

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [
    "--hidden_size", "64", "--num_hidden_layers", "4", "--vocab_size", "500", "--layers_per_ipu",
    "1", "1", "1", "1", "--max_seq_length", "64", "--doc_stride", "16"]


@pytest.fixture(scope="module")
def runs():
    return published()


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NUM_AVAILABLE_IPU", "4")


def test_a_plan_that_this_machine_has_too_few_ipus_for_says_so(monkeypatch, capsys):
    for available, note in (("2", "takes 4 IPUs, and NUM_AVAILABLE_IPU is 2: `python -m "
                             "planner search`"), ("4", None)):
        monkeypatch.setenv("NUM_AVAILABLE_IPU", available)
        assert main(["plan"]) == 0
        said = capsys.readouterr().out
        assert note in said if note else "NUM_AVAILABLE_IPU" not in said
        assert "--pod_type" not in said


def run_named(runs, name):
    return next(run for run in runs if run.name == name)


def job_named(runs, name):
    return run_named(runs, name).job


@pytest.mark.slow
def test_published_runs_are_predicted_and_every_verdict_is_right(capsys):
    assert main(["calibrate", "--show", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in records if not run["right"]] == []
    measured = [run for run in records if run["use"] == "measured"]
    for machine in ("Mk2", "Bow"):
        errors = np.array([run["error_percent"] for run in measured if run["machine"] == machine])
        assert len(errors) >= 6 and np.sqrt(np.mean(errors ** 2)) < 8
        assert np.abs(errors).max() < 20
    # Of a framework that schedules as PopTorch does, runs that are held back are as near.
    for run in (run for run in records if run["use"] == "held"):
        low = -5 if run["framework"] == "TensorFlow 2" else -15
        assert low < run["error_percent"] < low + 10, run["name"]
    # Of the runs that took no part in a fit, at least as many as it says lie in the range.
    assert sum(run["within_expected"] for run in measured) >= CONFIDENCE * len(measured)
    rms = [np.sqrt(np.mean([(run[name] / 100) ** 2 for run in measured]))
           for name in ("error_percent", "cross_validated_error_percent")]
    assert rms == pytest.approx(PUBLISHED_RMS, abs=1e-3)


@pytest.mark.slow
def test_cross_validation_leaves_out_all_runs_of_a_publisher(runs):
    """A wrong throughput changes the blind plans of all others, and none of its own publisher."""
    wrong = [run._replace(rows_per_second=run.rows_per_second / 2)
             if run.publisher == "graphcore.cn" and run.use == "measured" else run for run in runs]
    for run, right, changed in zip(runs, calibrate.compare(runs, Efficiencies()),
                                   calibrate.compare(wrong, Efficiencies())):
        if "error_percent" in right:
            blind = [record["published_rows_per_second"] * (
                1 + record["cross_validated_error_percent"] / 100) for record in (right, changed)]
            same = blind[0] == pytest.approx(blind[1], rel=1e-12)
            assert same == (run.publisher == "graphcore.cn"), run.name


@pytest.mark.slow
def test_the_default_efficiencies_are_the_fit_to_published_runs(runs):
    fitted = calibrate.fit_published(runs)
    for name in FITTED:
        assert getattr(Efficiencies(), name) == pytest.approx(getattr(fitted, name), rel=1e-3)
    np.testing.assert_allclose(Efficiencies().covariance, fitted.covariance, atol=1e-4)


@pytest.mark.slow
def test_a_fit_finds_the_efficiencies_that_made_the_runs(runs):
    """With all data but no noise, and hardly any prior, the fit must return what the data shows."""
    true = Efficiencies(0.6, 40e3, 3.0, 0.03, 200e-9)
    jobs = [run.job for run in runs if run.use == "measured"]
    fitted = calibrate.fit([(job, make_plan(job, true).rows_per_second) for job in jobs],
                           calibrate.START, (100.0,) * 5, lambda plan: 0.01, "a test")
    for name in FITTED:
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=1e-3)


@pytest.mark.slow
def test_the_expected_range_is_that_of_many_draws(runs):
    """The ranges follow from slopes; draws of the fitted numbers must scatter as much."""
    plan = make_plan(job_named(runs, "bert-large SQuAD v1, tutorial, 16 Mk2"))
    draw = np.random.default_rng(0)
    logs = draw.multivariate_normal(np.zeros(5), plan.efficiencies.covariance, 2000)
    drawn = [make_plan(plan.job, replace(plan.efficiencies, **{
        name: getattr(plan.efficiencies, name) * math.exp(change)
        for name, change in zip(FITTED, changes)})) for changes in logs]
    scatter, of_host = (
        math.hypot(np.log([getattr(one, name) for one in drawn]).std(), unexplained) for
        name, unexplained in (("rows_per_second", unexplained_error(plan)),
                              ("host_seconds", HOST_ERROR)))
    least, most = host_range(plan)
    assert math.sqrt(least * most) == pytest.approx(plan.host_seconds)
    assert math.log(most / least) / 2 == pytest.approx(QUANTILE * of_host, rel=0.1)
    low, high = expected_error(plan)
    assert low < 0 < high
    assert math.log1p(high) == pytest.approx(-math.log1p(low))
    assert math.log1p(high) == pytest.approx(QUANTILE * scatter, rel=0.1)


@pytest.mark.slow
def test_twice_the_micro_batch_of_the_published_pretraining_does_not_fit(runs):
    """Graphcore's micro-batches are as large as memory allows, so twice as much must not fit."""
    for name in ("pretrain_large_128", "pretrain_large_512",
                 "bert-base pretraining phase 2, 16 Mk2"):
        job = job_named(runs, name)
        by_row = ("saved_bytes", "input_bytes", "output_bytes", "result_bytes", "matmul_flops",
                  "large_flops")
        blocks = tuple(
            replace(b, **{field: 2 * getattr(b, field) for field in by_row}) for b in job.blocks)
        assert not make_plan(replace(job, blocks=blocks)).fits


@pytest.mark.slow
def test_memory_by_hand(runs):
    """The memory of roberta-base with micro-batch 4 and 4 replicas, worked out by hand.

    IPU 1 holds layers 0 to 3 and is the second of four stages.
    """
    memory = ipu_memory(job_named(runs, "roberta-base SQuAD v1, 16 Mk2"), code_bytes=0)
    parameters = 4 * (12 * 768 ** 2 + 13 * 768)
    assert memory[1]["weights"] == memory[1]["gradients"] == 2 * parameters
    # Two float32 moments, divided among four replicas.
    assert memory[1]["optimizer_state"] == 8 * parameters // 4
    hidden, window_ids = 4 * 384 * 768 * 2, 4 * 384 * 4  # in float16 and int32
    # Stage i of S keeps 2 (S - 1 - i) + 1 micro-batches, here with four checkpoints each.
    assert memory[1]["stash"] == 5 * (4 * hidden + window_ids)
    # The backward pass of the last stage follows at once: PopART stashes nothing there.
    assert memory[3]["stash"] == 0
    # The embedding's gradient comes when all else is free, beside its two activations.
    step = sum(memory[0][name] for name in IN_STEP)
    assert step == 2 * 50265 * 768 + 2 * 4 * 384 * 768 * 2


@pytest.mark.slow
def test_the_update_of_the_embedding_is_counted_on_ipu_0(runs):
    """With one replica and float32 moments on chip, PopART holds its gradient in float32.

    In the pipeline's steps, its float16 gradient and the temporaries of the embedding's block are
    live in their place. The update needs more than they do, by the difference.
    """
    job = job_named(runs, "roberta-base SQuAD v1, notebook, 4 Bow")
    words, memory = 50265 * 768, ipu_memory(job, code_bytes=0)
    steps = sum(memory[0][name] for name in IN_STEP)
    assert memory[0]["update_temporaries"] == 4 * words - steps > 70 * 2 ** 20
    parts = replace(job, blocks=tuple(job.count(1, 4)) if job.count else job.blocks)
    assert parts == job or ipu_memory(parts, 0)[0]["update_temporaries"] < 2 * words


@pytest.mark.slow
def test_clipping_keeps_the_gradients_of_all_parameters_in_float32(runs):
    job = job_named(runs, "roberta-base SQuAD v1, notebook, 4 Bow")
    steps = ("activations", "matmul_temporaries", "embedding_gradient", "update_temporaries")
    plain, clipped = (ipu_memory(replace(job, clips=clips), code_bytes=0)[1] for clips in (0, 1))
    assert sum(clipped[name] for name in steps) == 4 * 4 * (12 * 768 ** 2 + 13 * 768)
    assert sum(plain[name] for name in steps) < sum(clipped[name] for name in steps)


@pytest.mark.slow
def test_the_last_layer_is_not_recomputed(runs):
    """What is recomputed is the forward pass of all layers but the last, and not the head."""
    job = job_named(runs, "roberta-base SQuAD v1, 16 Mk2")
    work = stage_work(job, Efficiencies())
    assert work[1].recompute == work[1].forward
    one_layer = work[1].forward / 4
    assert work[3].recompute == pytest.approx(3 * one_layer, rel=0.01)
    without = job.changed(recompute_checkpoint_every_layer=False)
    assert stage_work(without, Efficiencies())[3].recompute == 0
    alone = replace(job, layout=Layout(0, (0,) * 12, 0), config=replace(
        job.config, layers_per_ipu=[12], recompute_checkpoint_every_layer=True))
    assert [work.recompute for work in stage_work(alone, Efficiencies())] == [0]


@pytest.mark.slow
def test_attention_dropout_saves_what_it_must(runs):
    """With attention dropout, the probabilities before and after it are kept for the backward pass.

    Without it they are one tensor of [rows, heads, length, length].
    """
    sizes = dict(MODELS["bert-base-uncased"], max_position_embeddings=514)
    with_it, without = (
        make_counter(RobertaConfig(**sizes, attention_probs_dropout_prob=rate),
                     max_seq_length=384)(2)[1].saved_bytes for rate in (0.1, 0.0))
    assert with_it - without == 2 * 12 * 384 * 384 * 2


@pytest.mark.slow
def test_offchip_state_leaves_memory_and_takes_time(runs):
    job = job_named(runs, "roberta-base SQuAD v1, 16 Mk2")
    onchip, offchip = make_plan(job), make_plan(job.changed(optimizer_state_offchip=True))
    assert all(offchip.memory[ipu]["optimizer_state"] == 0 for ipu in offchip.memory)
    # The state of IPU 0, the one with most parameters, is read and written by a quarter of the
    # machine's streaming memory.
    seconds = 2 * 39000576 * 8 / 4 / 5e9
    assert offchip.weight_update_seconds == pytest.approx(seconds, rel=0.01)
    assert onchip.windows_per_second > offchip.windows_per_second


@pytest.mark.slow
def test_parts_of_the_time_add_up(runs):
    for run in runs:
        plan = make_plan(run.job)
        assert sum(plan.parts().values()) == pytest.approx(plan.update_seconds)


@pytest.mark.slow
def test_own_measurement_is_reproduced_saved_and_used(runs, tmp_path, capsys):
    file = tmp_path / "mine.json"
    flags = ["--config", "squad_base_384", "--calibration", str(file)]
    assert main(["calibrate", "--measured", "windows_per_second=300", *flags]) == 0
    assert str(file) in capsys.readouterr().out
    assert main(["plan", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["windows_per_second"] == pytest.approx(300, rel=0.02)
    assert str(file) in plan["efficiencies"]["source"]
    assert calibrate.load(None) == Efficiencies()


@pytest.mark.slow
def test_a_measured_sweep_is_reproduced(tmp_path, capsys):
    table, mine, true = (tmp_path / name for name in ("sweep.csv", "mine.json", "true.json"))
    common = ["--config", "squad_base_384"]

    def planned(calibration, setting):
        capsys.readouterr()
        assert main(["plan", "--json", "--calibration", str(calibration), *common,
                     *setting.split()]) in (0, DOES_NOT_FIT)
        return json.loads(capsys.readouterr().out)["windows_per_second"]

    assert run_sweep(["--layers_per_ipu", "0 4 4 4", "3 3 3 3", "--micro_batch_size", "1", "4",
                      "--output", str(table), "--", *common]) == 0
    with pytest.raises(UsageError, match="no row of its 4 was measured on an IPU"):
        main(["calibrate", "--measured", str(table), *common])
    # As if IPUs with other efficiencies had run the sweep.
    now = Efficiencies()
    calibrate.save(replace(now, peak_utilisation=0.8 * now.peak_utilisation,
                           matmul_cycles=1.3 * now.matmul_cycles), true)
    rows = [{**row, "measured_on": "IPU",
             "measured_windows_per_second": f"{planned(true, row['setting']):.1f}"}
            for row in read_rows(table)]
    write_rows(table, [*rows, {**rows[0], "setting": "--micro_batch_size 2",
                               "measured_on": "this host", "measured_windows_per_second": "1.0"}])
    assert main(["calibrate", "--measured", str(table), "--calibration", str(mine), *common]) == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()[-5:]
    assert all("measured" in line for line in lines) and str(mine) in last
    assert "your 4 runs" in calibrate.load(str(mine)).source
    for row in rows:
        assert planned(mine, row["setting"]) == pytest.approx(
            float(row["measured_windows_per_second"]), rel=0.02)


@pytest.mark.parametrize("flags, message", [
    (["--layers_per_ipu", "3", "3", "3", "4"], "the sum must be 12"),
    (["--gradient_accumulation_steps", "6"], "needs at least 7"),
    (["--layers_per_ipu", "1", "1", "1", "1", "2", "2", "2", "2", "--replication_factor", "2",
      "--pod_type", "pod8"], "pod8 has 8: use at most 1"),
    (["--hidden_size", "100", "--num_attention_heads", "12"], "the nearest is 96"),
    (["--pod_type", "pod5"], "pod4"),
    (["--plot", "plan.bmp"], ".png"),
    (["--config_json", "nowhere.json"], "nowhere.json"),
])
def test_what_cannot_be_is_refused_with_what_would_work(flags, message):
    with pytest.raises(UsageError) as refusal:
        main(["plan", *flags])
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("command", [
    "plan --plot {0}/plan.png", "plan --html {0}/plan.html", "plan --write {0}/ipu_config.json",
    "search --write {0}/ipu_config.json", "explore --write {0}/ipu_config.json",
    "sweep --micro_batch_size 1 --output {0}/sweep.csv",
    "compare A B --plot {0}/sides.png",
    "calibrate --measured windows_per_second=300 --calibration {0}/mine.json"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(command, tmp_path, monkeypatch):
    monkeypatch.setattr("planner.from_settings.make_job", None)
    for place in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match=f"^--.* {place}/.*: there is no folder {place};"):
            main(command.format(place).split())


@pytest.mark.parametrize("words, message", [
    (["--micro_batch_size", "1", "2", "--", "--nosuch"], "--nosuch: there is no such flag"),
    (["--micro_batch_size", "1", "2", "--", "--config", "nosuch"], "--config nosuch: no such conf"),
    (["--nosuch", "1", "2"], "--nosuch: there is no such flag"),
    (["--micro_batch_size", "many", "more"], "--micro_batch_size more: it should be a whole")])
def test_a_sweep_that_no_flags_of_it_can_plan_is_refused_and_writes_nothing(
        words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        main(["sweep", *words])
    assert not list(tmp_path.glob("*.csv"))


DISTANCES = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}


@pytest.mark.parametrize("kind, sizes", [
    ("bert", {}), ("electra", {"embedding_size": 32}), ("deberta", DISTANCES),
    ("deberta-v2", {**DISTANCES, "share_att_key": True, "position_buckets": 64,
                    "norm_rel_ebd": "layer_norm"}),
    ("distilbert", {"dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 96})])
def test_every_family_is_planned_from_its_config_json(tmp_path, capsys, kind, sizes):
    """The parameters that the plan counts are those of transformers' own model."""
    config = AutoConfig.for_model(kind, **(sizes if kind == "distilbert" else {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 96, **sizes}), vocab_size=300, max_position_embeddings=384)
    config.save_pretrained(tmp_path)
    assert main(["plan", "--json", "--config_json", str(tmp_path / "config.json"),
                 "--layers_per_ipu", "0", "1", "1", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"] == {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
                             "intermediate_size": 96, "vocab_size": 300}
    with torch.device("meta"):
        model = AutoModelForQuestionAnswering.from_config(config)
    assert sum(block["parameters"] for block in plan["blocks"]) == sum(
        parameter.numel() for parameter in model.parameters())


def test_advice_has_the_best_split_and_two_changes_that_beat_any_one(capsys):
    """Each as `plan` plans it: six layers on each IPU fit with the embedding in two parts."""
    large = ["--config", "squad_large_384", "--pod_type", "pod16", "--json"]

    def planned(*flags):
        assert main(["plan", *large, *flags]) == 0
        return json.loads(capsys.readouterr().out)

    for flags in ([], ["--embedding_serialization_factor", "1"]):
        pair, *single = planned(*flags)["suggestions"]
        speeds = [change["windows_per_second"] for change in single]
        assert len(pair["settings"]) == 2 and pair["windows_per_second"] > max(speeds)
        again = planned(*flags, *flag_words(pair["settings"]))
        assert again["fits"] and again["windows_per_second"] == pair["windows_per_second"]
    split = next(change for change in planned()["suggestions"][:4]
                 if "layers_per_ipu" in change["settings"])
    assert split["settings"] == {"layers_per_ipu": [6, 6, 6, 6]}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["demo", "squad_base_384", "squad_distilbert_384"])
@pytest.mark.parametrize("phase", [[], ["--inference"]])
def test_advice_is_what_plan_and_search_say(config, phase, capsys):
    """No change makes an update larger unless it says so, or pays only with calls that are full."""
    def planned(*flags):
        main(["plan", "--config", config, *phase, *flags, "--json"])
        return json.loads(capsys.readouterr().out)

    def seconds(plan):
        return plan["run_seconds"] if phase else 1 / plan["windows_per_second"]

    now = planned()
    for change in now["suggestions"]:
        again = planned(*flag_words(change["settings"]))
        assert again["fits"] == change["fits"] and seconds(again) < seconds(now)
        assert again["windows_per_second"] == pytest.approx(change["windows_per_second"], rel=1e-4)
        if not phase and "twice the batch size" not in change["text"]:
            assert again["rows_per_update"] * again["windows_per_row"] < 1.1 * (
                now["rows_per_update"] * now["windows_per_row"])
    assert main(["search", "--config", config, *phase, "--keep", "1", "--json"]) == 0
    best, = json.loads(capsys.readouterr().out)
    same = [change for change in now["suggestions"] if "twice the batch" not in change["text"]
            and not {"device_iterations", "inference_device_iterations"} & set(change["settings"])]
    for change in same:  # the rest is not searched
        assert seconds(best) < 1.02 * seconds(planned(*flag_words(change["settings"])))


@pytest.mark.parametrize("windows, epochs, in_call, updates", [
    (1, 1, 1, 1), (1, 3, 1, 3), (32, 1, 1, 1), (33, 1, 1, 2), (33, 2, 1, 4), (33, 2, 3, 6),
    (96, 1, 1, 3)])
def test_a_part_filled_update_takes_as_long_as_a_full_one(windows, epochs, in_call, updates,
                                                          capsys):
    assert main(["plan", *SMALL, "--train_windows", str(windows), "--num_train_epochs", str(epochs),
                 "--device_iterations", str(in_call), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rows_per_update"] == 32
    assert plan["run_seconds"] == pytest.approx(updates * plan["update_seconds"])


def test_shape_flags_change_the_configurations_own_model(capsys):
    flags = ["--config", "squad_large_384", "--num_hidden_layers", "6", "--layers_per_ipu", "3",
             "3"]
    assert main(["plan", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["title"] == "squad_large_384, roberta-large with 6 layers 1024 wide"
    large = MODELS["roberta-large"]
    assert plan["model"] == {**{name: large[name] for name in plan["model"]},
                             "num_hidden_layers": 6}
    assert plan["blocks"][1]["parameters"] == 12 * 1024 ** 2 + 13 * 1024
    # Of a width of one's own, the heads are 64 wide and the feed-forward layers four times as wide.
    assert main(["plan", "--json", *flags, "--hidden_size", "512", "--vocab_size", "99"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == {
        "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
        "intermediate_size": 2048, "vocab_size": 99}


@pytest.mark.parametrize("changed, message", [
    ({"num_hidden_layers": 10 ** 6}, "num_hidden_layers is 1000000 .* from 1 to 256"),
    ({"hidden_size": 10 ** 9}, "hidden_size is 1000000000 .* from 1 to 10,000,000"),
    ({"hidden_size": 100}, "hidden_size is 100 .* a multiple of the 12 attention heads"),
    ({"model_type": None}, "has no model_type; name the config.json of a checkpoint")])
def test_a_config_json_that_no_model_has_is_refused_by_name(changed, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value for name, value in {
        **MODELS["bert-base-uncased"], **changed}.items() if value is not None}))
    with pytest.raises(UsageError, match=f"^--config_json {path}:? {message}"):
        main(["plan", "--config_json", str(path)])


@pytest.mark.parametrize("command, message", [
    ("search --trace t.json", "--trace"),
    ("calibrate --show --trace t.json", "--trace"),
    ("report somewhere --trace t.json", "--trace"),
    ("calibrate --show --measured windows_per_second=3", "exclude each other"),
    ("calibrate --show --profile p", "--measured"),
    ("plan --fit --json", "calibrate --show --json"),
    ("search --inference --dataset_name squad --max_seq_length 256", "--eval_windows"),
    ("search --ipus 12", "--ipus 12: choose from 1 2 4 8 16 32 64 128 256"),
    ("calibrate", "--measured: give what the run reached"),
    ("calibrate --measured rows=3", "--measured rows=3: give what the run reached"),
    ("calibrate --measured windows_per_second=inf", "--measured windows_per_second=inf: give"),
    # As packed rows reach it, with the flag forgotten.
    ("calibrate --measured windows_per_second=2640 --config squad_large_384 --pod_type pod16",
     "--measured windows_per_second=2640: the plan of these flags expects 643 to 808"),
    ("calibrate --measured windows_per_second=2640 --config squad_base_384_pod16",
     "with multiplications beyond the peak rate"),
    ("plan --ipus 8", "--ipus: IPUs follow from --layers_per_ipu --replication_factor and --pod"),
    ("plan --hidden_size 1000000000", "65536"),
    ("plan --num_hidden_layers 100000", "256"),
    ("plan --micro_batch_size 99999999", "4096"),
    ("plan --num_train_epochs 1e300", "--num_train_epochs"),
    ("plan --embedding_serialization_factor 100000", "256"),
    ("plan --gradient_accumulation_steps 99999999999", "65536"),
])
def test_what_would_be_dropped_or_is_absurd_is_refused_in_one_line(command, message):
    with pytest.raises(UsageError) as refusal:
        main(command.split())
    text = str(refusal.value).replace(",", "")
    assert message in text and "\n" not in text


@pytest.mark.slow
def test_the_largest_sizes_are_planned_without_overflow(capsys):
    flags = ("--hidden_size 65536 --num_hidden_layers 256 --num_attention_heads 1024 "
             "--intermediate_size 262144 --vocab_size 10000000 --layers_per_ipu 64 64 64 64 "
             "--gradient_accumulation_steps 65536 --train_windows 1000000000000 "
             "--num_train_epochs 1000000 --micro_batch_size 4096").split()
    for more in ([], ["--inference", "--inference_layers_per_ipu", "-1", "-1"], ["--json"]):
        assert main(["plan", *flags, *more]) in (0, DOES_NOT_FIT)
        out = capsys.readouterr().out
        assert "inf" not in out.replace("inference", "") and "nan" not in out


@pytest.mark.parametrize("kind", ["albert", "modernbert", "longformer", "t5"])
def test_other_architectures_are_refused_by_name(kind, tmp_path):
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                 vocab_size=100, model_type=kind)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    for flag in (["--config_json", str(tmp_path / "config.json")],
                 ["--model_name_or_path", str(tmp_path)]):
        with pytest.raises((UsageError, RunError), match=kind):  # which transformers may not know
            main(["plan", *flag, "--layers_per_ipu", "1", "1"])


@pytest.mark.parametrize("layers", [[12], [6, 6], [4, 4, 4]])
def test_short_pipelines_are_planned(layers, capsys):
    flags = [*SMALL[:2], "--num_hidden_layers", "12", *SMALL[4:6], *SMALL[11:], "--layers_per_ipu",
             *map(str, layers), "--json"]
    assert main(["plan", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    stages = len(layers)
    assert len(plan["ipus"]) == stages and plan["pipeline_steps"] == 32 + 2 * (stages - 1)
    recomputed = [stage["recompute_seconds"] > 0 for stage in plan["stages"]]
    # A single IPU is no pipeline, in which PopTorch recomputes nothing.
    assert recomputed == [stages > 1] * stages
    assert (plan["ipus"][0]["stash_bytes"] > 0) == (stages > 1)


def test_an_embedding_beyond_ipu_0_costs_the_stage_that_poptorch_begins_with(capsys):
    flags = [*SMALL[:6], *SMALL[11:], "--layers_per_ipu", "2", "2", "--json"]
    steps = {}
    for embedding in ("0", "1"):
        assert main(["plan", *flags, "--embedding_ipu", embedding]) == 0
        steps[embedding] = json.loads(capsys.readouterr().out)["pipeline_steps"]
    # IPUs 0 and 1; IPUs 0, 1, 0 and 1.
    assert steps == {"0": 32 + 2 * 1, "1": 32 + 2 * 3}


@pytest.mark.slow
def test_a_plan_takes_the_pod_it_needs_and_says_what_a_run_needs(capsys):
    small = [*SMALL, "--replication_factor"]
    assert main(["plan", *small, "4"]) == 0
    assert "--pod_type pod16 --replication_factor 4" in capsys.readouterr().out
    assert main(["plan", *small, "64"]) == 0
    said = capsys.readouterr().out
    assert "pod256 and several hosts; a run needs --pod_type pod256" in said
    assert "poprun --num-instances 4 --num-replicas 64 --ipus-per-replica 4." in said
    with pytest.raises(UsageError, match="pod4 has 4"):
        main(["plan", *small, "4", "--pod_type", "pod4"])


def test_several_hosts_reduce_within_a_rack_and_between_racks_and_feed_their_own_replicas(capsys):
    """64 replicas of 4 IPUs on 4 hosts, by hand: 100 Gbit/s are 12.5e9 bytes/s."""
    flags = [*SMALL, "--replication_factor", "64", "--precision", "float16"]
    assert main(["plan", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["hosts"] == plan["instances"] == 4 and plan["pod_type"] == "pod256"
    parameters = Counter()
    for block in plan["blocks"]:
        parameters[block["ipu"]] += block["parameters"]
    most, parts = max(parameters.values()), plan["update_parts_seconds"]
    assert parts["gradient reduction"] == pytest.approx(2 * 15 / 16 * 2 * most / 160e9)
    assert parts["gradient reduction between hosts"] == pytest.approx(
        2 * 3 / 4 * 2 * most / 16 / (2 * 12.5e9 / 4))
    assert parts["host"] == pytest.approx(
        plan["efficiencies"]["call_seconds"] + plan["efficiencies"]["token_seconds"] *
        plan["rows_per_update"] / 4 * plan["max_seq_length"])
    assert sum(parts.values()) == pytest.approx(plan["update_seconds"])
    assert main(["search", *flags, "--ipus", "256", "--keep", "1"]) == 0
    assert "1 takes 4 hosts of 64 IPUs" in capsys.readouterr().out


def test_inference_is_planned_as_its_schedule_says(capsys):
    """Steps, time of a call and of one question from the plan's own stages, by hand."""
    flags = [*SMALL, "--inference_layers_per_ipu", "2", "2", "--inference_device_iterations", "6",
             "--eval_micro_batch_size", "3", "--eval_windows", "1000"]
    assert main(["plan", "--inference", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["phase"] == "inference" and plan["pipeline_steps"] == 6 + 1
    assert plan["replication_factor"] == 2 and plan["rows_per_update"] == 3 * 6 * 2
    assert all(ipu["gradients_bytes"] == ipu["stash_bytes"] == 0 for ipu in plan["ipus"])
    calls = math.ceil(1000 / 36)
    assert plan["run_seconds"] == pytest.approx(calls * plan["update_seconds"])
    assert plan["windows_per_second_low"] < plan["windows_per_second"] < plan[
        "windows_per_second_high"]
    one = sum(stage["forward_seconds"] for stage in plan["stages"])
    assert 0 < plan["one_question_seconds"] < plan["update_seconds"] and (
        plan["one_question_seconds"] < one + 0.01)


@pytest.mark.slow
def test_search_finds_inference_layouts_that_train_py_takes(tmp_path, capsys):
    """The file that is written plans as found, and keeps the training's own settings."""
    path = tmp_path / "ipu_config.json"
    flags = [*SMALL, "--matmul_proportion", "0.1", "0.2", "0.2", "0.2", "--eval_windows", "500"]
    assert main(["search", "--inference", "--ipus", "4", "--json", "--write", str(path),
                 *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    size = ["--eval_micro_batch_size", str(found[0]["micro_batch_size"])]
    assert main(["plan", "--inference", "--json", *SMALL[:6], *SMALL[11:], "--eval_windows", "500",
                 "--ipu_config", str(path), *size]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["windows_per_second"] == pytest.approx(found[0]["windows_per_second"])
    assert main(["plan", "--json", *SMALL[:6], *SMALL[11:], "--ipu_config", str(path)]) == 0
    training = json.loads(capsys.readouterr().out)
    assert training["ipu_config"]["matmul_proportion"] == [0.1, 0.2, 0.2, 0.2]
    assert all(plan["fits"] for plan in found)


@pytest.mark.slow
def test_search_prints_flags_that_train_py_takes(capsys):
    """Of settings whose pipelines have other lengths than matmul_proportion and iterations."""
    flags = [*SMALL, "--matmul_proportion", "0.1", "0.2", "0.2", "0.2",
             "--inference_device_iterations", "4", "--gradient_accumulation_steps", "64"]
    assert main(["search", "--ipus", "4", *flags]) == 0
    printed = re.findall(r"^\d+: (--.*)$", capsys.readouterr().out, re.M)
    assert printed
    for setting in printed:
        settings, config, _ = parse_train(
            [*SMALL[:6], *SMALL[11:], *flags[len(SMALL):], *setting.split()], JobSettings)
        assert inference_pipeline(config, 4, "pod4") and training_pipeline(config, 4, "pod4")


@pytest.mark.slow
def test_search_for_one_ipu_brings_an_evaluation_that_was_on_two_along(tmp_path):
    path = tmp_path / "ipu_config.json"
    flags = [*SMALL, "--gradient_accumulation_steps", "64", "--inference_layers_per_ipu", "2", "2"]
    assert main(["search", "--ipus", "1", "--write", str(path), *flags]) == 0
    _, config, _ = parse_train(
        [*SMALL[:6], *SMALL[11:], "--ipu_config", str(path), "--pod_type", "pod1"], JobSettings)
    assert training_pipeline(config, 4, "pod1").layout.stages()
    assert inference_pipeline(config, 4, "pod1").config.num_ipus() == 1


def test_search_begins_with_settings_that_the_pod_has_too_few_ipus_for(capsys):
    assert main(["search", *SMALL, "--gradient_accumulation_steps", "64", "--pod_type", "pod1",
                 "--keep", "1", "--json"]) == 0
    best, = json.loads(capsys.readouterr().out)
    assert best["layers_per_ipu"] == [4] and best["pod_type"] == "pod1"
    assert main(["search", *SMALL, "--gradient_accumulation_steps", "64", "--ipus", "1"]) == 0
    said = capsys.readouterr().out
    assert "\nnow takes 4 IPUs, more than the 1 searched for: it is shown to compare" in said
    assert "None" not in said and "--" not in re.search(r"(?m)^All have .*$", said)[0]


@pytest.mark.slow
def test_search_shows_nothing_slower_than_now_and_splits_in_layers(capsys):
    """With equal shares (-1) as layers, and from the best settings on, the fastest there are."""
    flags = [*SMALL[:6], *SMALL[11:], "--eval_windows", "500"]
    for phase in (["--inference", "--inference_layers_per_ipu", "-1", "-1"], []):
        assert main(["search", *flags, *phase]) == 0
        said = capsys.readouterr().out
        assert "-1" not in said and "not set" not in said
        times = re.findall(r"(?m)^  (\w+) +[\d,]+ +(\d\.\d\d) ", said)
        assert [name for name, _ in times][:2] == ["now", "1"]
        assert all(float(ratio) > 1 for name, ratio in times if name != "now")
        best = re.search(r"(?m)^1: (--.*)$", said)[1].split()
        assert main(["search", *flags, *phase[:1], *best]) == 0
        assert capsys.readouterr().out.startswith("1 is the settings now: they are the fastest of")


@pytest.mark.slow
def test_search_tries_packed_rows_where_it_knows_how_many_windows_they_hold(tmp_path, capsys):
    (tmp_path / "own.json").write_text("[]")
    own = [*SMALL, "--do_train", "--train_file", str(tmp_path / "own.json")]
    for flags, note in (
            ([*own, "--windows_per_row", "2"],
             "With --pack a row holds 2.00 windows, as --windows_per_row says."),
            (["--num_hidden_layers", "4", "--layers_per_ipu", "1", "1", "1", "1"],
             "assumed: a window of squad has 181 tokens on average, and rows are 97 % full."),
            (own, "--pack is not tried: how many windows share a row of your own data is not"),
            ([*own, "--windows_per_row", "2", "--pack", "false"], None)):
        assert main(["search", *flags]) == 0
        said = capsys.readouterr().out
        assert note in said if note else "With --pack" not in said
        best, words = re.search(r"(?m)^1: (--.*)$", said)[1].split(), flags[:]
        assert ("--pack" in best) == (note is not None and "not tried" not in note)
        if "--pack" in best:
            cut = flags.index("--layers_per_ipu")
            del words[cut:cut + 5]
            assert main(["plan", *words, *best]) == 0
            assert capsys.readouterr().out.split()[0] == said.splitlines()[1].split()[0]


@pytest.mark.slow
def test_search_says_why_another_number_of_replicas_has_another_best_split(capsys):
    flags = ["--config", "squad_large_384", "--pack", "false", "--matmul_proportion", "0.14"]
    assert main(["search", *flags]) == 0
    said = capsys.readouterr().out
    layers, *shares = re.search(
        r"With a replication factor of 4 in place of 1 the best split is ([\d ]+): .* is "
        r"(\d+) % of the time in place of (\d+) %", said).groups()
    best = re.search(r"(?m)^1: (--.*)$", said)[1].split()
    plans = {}
    for name, more in (("4", ["--layers_per_ipu", *layers.split(), "--replication_factor", "4"]),
                       ("1", []), ("4 as 1", ["--replication_factor", "4"])):
        assert main(["plan", *flags, *best, *more, "--json"]) in (0, DOES_NOT_FIT)
        plans[name] = json.loads(capsys.readouterr().out)
    assert shares == [
        f"{100 * plan['update_parts_seconds']['weight update'] / plan['update_seconds']:.0f}"
        for plan in (plans["4"], plans["1"])]
    assert plans["4"]["fits"]
    assert plans["4"]["windows_per_second"] > plans["4 as 1"]["windows_per_second"]


@pytest.mark.slow
def test_search_writes_a_configuration_that_plans_as_found(tmp_path, capsys):
    path = tmp_path / "ipu_config.json"
    flags = SMALL + ["--gradient_accumulation_steps", "64"]
    assert main(["search", "--ipus", "4", "--json", "--write", str(path), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["plan", "--json", *SMALL[:6], *SMALL[11:], "--ipu_config", str(path),
                 "--micro_batch_size", str(found[0]["micro_batch_size"])]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["windows_per_second"] == pytest.approx(found[0]["windows_per_second"])
    assert [plan["windows_per_second"] for plan in found] == sorted(
        (plan["windows_per_second"] for plan in found), reverse=True)


@pytest.mark.slow
def test_pictures_and_trace_are_written(tmp_path, capsys):
    for kind, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert main(["plan", *SMALL, "--plot", str(tmp_path / ("plan" + kind)),
                     "--trace", str(tmp_path / "plan.json")]) == 0
        assert (tmp_path / ("plan" + kind)).read_bytes().startswith(start)
    events = json.loads((tmp_path / "plan.json").read_text())["traceEvents"]
    # 4 stages with 32 micro-batches each.
    assert len([e for e in events if e["name"].startswith("forward")]) == 4 * 32
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == [
        f"IPU {i}" for i in range(4)]


def test_a_plan_writes_its_pipeline_and_the_command_that_runs_it(tmp_path, capsys):
    path = tmp_path / "my pipeline.json"
    flags = ["--config", "squad_large_384", "--micro_batch_size", "4", "--json",
             "--gradient_accumulation_steps", "32", "--pod_type", "pod16"]
    assert main(["plan", *flags, "--ipu", "bow", "--write", str(path)]) == 0
    out, said = capsys.readouterr()
    _, script, *words = shlex.split(said.partition("Train with it: ")[2])
    assert script == "train.py" and {"--json", "--ipu", "--write"}.isdisjoint(words)
    assert main(["plan", *words, "--json", "--ipu", "bow"]) == 0
    again, plan = json.loads(capsys.readouterr().out), json.loads(out)
    assert again["windows_per_second"] == plan["windows_per_second"]
    assert again["layers_per_ipu"] == [3, 7, 7, 7] and again["micro_batch_size"] == 4


def test_sweep_goes_on_where_it_was_for_the_same_job_alone(tmp_path, capsys):
    path = tmp_path / "sweep.csv"
    common = ["--output", str(path), "--", *SMALL[:6], *SMALL[11:]]
    assert run_sweep(["--layers_per_ipu", "1 1 1 1", "1 1 1 2", *common]) == 0
    rows = read_rows(path)
    assert [row["status"].split(":")[0] for row in rows] == ["planned", "refused"]
    # Marks by which it shows whether a row is taken for done.
    rows[0].update(measured_windows_per_second="12345.0", measured_on="IPU", status="measured")
    rows[1]["status"] = "refused: by an earlier version"
    write_rows(path, rows)
    capsys.readouterr()
    assert run_sweep(["--layers_per_ipu", "1 1 1 1", "1 1 1 2", *common]) == 0
    printed = capsys.readouterr().out
    assert "12,345 windows/s (measured on IPU)" in printed and "earlier version" not in printed
    for other in (["--ipu", "bow"], ["--max_seq_length", "32"]):
        assert run_sweep(["--layers_per_ipu", "1 1 1 1", *common, *other]) == 0
        assert "12,345" not in capsys.readouterr().out
    assert len(read_rows(path)) == 4


def test_a_sweep_measures_runs_without_the_flags_of_plans(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, **options: commands.append(command) or (
        SimpleNamespace(returncode=1, stderr="no IPU is free")))
    table = tmp_path / "sweep.csv"
    assert run_sweep(["--micro_batch_size", "2", "--run", "--output", str(table), "--", "--config",
                      "squad_base_384", "--ipu", "bow", "--eval_windows", "9"]) == 1
    (command,), (row,) = commands, read_rows(table)
    settings, _, planning = parse_train(command[2:], TrainPlanSettings)
    planning.refuse_without_plan(settings)  # as train.py does
    assert settings.micro_batch_size == 2 and settings.synthetic_data
    assert row["status"] == "failed (1): no IPU is free"


def recorded_profile(slow_ipu):
    """A profile as pva gives it, of 4 replicas on 4 IPUs each that have 4 tiles each.

    One IPU computes for longer.
    """
    def tile(size, code):
        return SimpleNamespace(memory=SimpleNamespace(
            total=SimpleNamespace(excludingGaps=size),
            category=SimpleNamespace(vertexCode=SimpleNamespace(total=code))))

    def step(kind, *cycles):
        return SimpleNamespace(program=SimpleNamespace(type=f"Type.{kind}"),
                               ipus=[SimpleNamespace(cycles=count) for count in cycles])

    compute = [1000, 1000, 1000, 1000]
    compute[slow_ipu] = 4000
    return SimpleNamespace(
        compilation=SimpleNamespace(
            target=SimpleNamespace(numIPUs=16, ipusPerReplica=4, tilesPerIpu=4,
                                   bytesPerTile=638976, clockFrequency=1.33e9),
            tiles=[tile(1000 * (1 + i // 4), 100) for i in range(16)]),
        execution=SimpleNamespace(steps=[
            step("OnTileExecute", *compute),
            step("DoExchange", 100, 100, 100, 100),
            step("Sync", *(5000 - c for c in compute))]))


@pytest.mark.slow
def test_a_profile_is_read_and_compared(runs):
    plan = make_plan(job_named(runs, "roberta-base SQuAD v1, 16 Mk2"))
    profile = read_profile(recorded_profile(slow_ipu=2))
    assert profile.total_bytes == [4000, 8000, 12000, 16000] and profile.code_bytes == 400
    assert profile.work_cycles(2) == 4100 and profile.cycles[2]["waiting"] == 1000
    # One of the slow IPU's layers moves to the IPU that waits longest.
    assert "--layers_per_ipu 1 4 3 4" in advice(profile, plan)


@pytest.mark.slow
def test_report_and_calibrate_read_the_training_profile_of_a_folder(tmp_path, monkeypatch, capsys):
    opened = []
    pva = SimpleNamespace(
        openReport=lambda path: opened.append(Path(path)) or recorded_profile(slow_ipu=2))
    monkeypatch.setitem(sys.modules, "pva", pva)
    for phase in ("training", "inference"):
        (tmp_path / phase).mkdir()
        (tmp_path / phase / "profile.pop").write_bytes(b"")
    # On one replica with large micro-batches IPU 0, which waits longest, has no room for a layer.
    full = ["--micro_batch_size", "5", "--gradient_accumulation_steps", "8"]
    assert main(["report", str(tmp_path), "--config", "squad_base_384", *full]) == 0
    assert "--layers_per_ipu 0 5 3 4, which fits" in capsys.readouterr().out
    for words, message in (
            (["nowhere"], "^nowhere: no such file or folder; name a profile.pop, or the folder"),
            ([str(tmp_path / "inference")], "profile.pop: this compares profiles of training"),
            ([str(tmp_path / "run")], "run: a run's folder, which has no profile.pop in it; name"),
            ([str(tmp_path), "--layers_per_ipu", "6", "6"],
             f"^{tmp_path}: its replica has 4 IPUs, the plan of these flags 2 .--layers_per_ipu 6 "
             "6.: give the flags that the profiled run was started with")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "run.json").write_text("{}")
        with pytest.raises(UsageError, match=message):
            main(["report", *words])
    assert main(["report", str(tmp_path), "--config", "squad_base_384", "--pod_type", "pod16"]) == 0
    assert "--layers_per_ipu 1 4 3 4, which fits" in capsys.readouterr().out
    # Of two slowest IPUs one remains, so no layer moves.
    tie = recorded_profile(slow_ipu=2)
    tie.execution.steps[0].ipus[3].cycles = 4000
    monkeypatch.setattr(pva, "openReport", lambda path: tie)
    assert main(["report", str(tmp_path), "--config", "squad_base_384"]) == 0
    said = capsys.readouterr().out
    assert "times the mean" not in said and "--pack" in said
    monkeypatch.setattr(pva, "openReport",
                        lambda path: opened.append(Path(path)) or recorded_profile(slow_ipu=2))
    opened.clear()
    assert main(["calibrate", "--measured", "windows_per_second=250", "--profile", str(tmp_path),
                 "--calibration", str(tmp_path / "mine.json"), "--config", "squad_base_384"]) == 0
    assert json.loads((tmp_path / "mine.json").read_text())["code_bytes"] == 400
    assert opened == [tmp_path / "training" / "profile.pop"]


@pytest.mark.slow
def test_report_says_in_one_line_that_pva_is_missing(tmp_path):
    (tmp_path / "profile.pop").write_bytes(b"")
    command = [sys.executable, "-m", "planner", "report", str(tmp_path), *SMALL]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "pva" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_bow_is_faster_by_less_than_its_clock(runs):
    job = job_named(runs, "roberta-base SQuAD v1, 16 Mk2")
    ratio = make_plan(replace(
        job, machine=MACHINES["bow"])).windows_per_second / make_plan(job).windows_per_second
    assert 1.1 < ratio < 1.85 / 1.33 * 1.01


def test_the_demo_is_planned_as_it_is_trained(tmp_path):
    from transformers import AutoConfig

    from planner.flags import PlanSettings
    from planner.from_settings import Request, planned_model
    from qa.data.demo import write_demo
    from qa.settings import TrainSettings

    write_demo(tmp_path, seed=1)
    trained = AutoConfig.from_pretrained(tmp_path / "model")
    planned = planned_model(Request(TrainSettings(demo_data=True), IPUConfig(), PlanSettings()))
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "intermediate_size"):
        assert getattr(planned, name) == getattr(trained, name), name


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(
    path.stem for path in (REPOSITORY / "qa" / "configs").glob("*.yaml")))
def test_every_configuration_fits_as_it_is(config, capsys):
    for phase in ([], ["--inference"]):
        assert main(["plan", "--config", config, *phase]) == 0
        assert "Fits, with a margin of" in capsys.readouterr().out


def test_a_plan_fits_a_screen_and_begins_with_the_answer(capsys):
    """The terms of a stage's time and the groups of an update's add up; the fixed part is exact."""
    flags, kinds = ["--config", "squad_large_384", "--pod_type", "pod16"], (
        "forward", "recompute", "backward")
    assert main(["plan", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and "windows/s" in lines[0] and "Fits, with a margin" in lines[0]
    assert lines[1].startswith("Bound by") and "Encoder 3-9" in "\n".join(lines)
    host = re.search(r"Host: (\d+) for its call .*, (\d+) for its rows, .* 90 % sure: (\d+) to "
                     r"(\d+)\.", "\n".join(lines)).groups()
    fitted = Efficiencies()
    assert [int(part) for part in host[:2]] == [
        round(1e3 * fitted.call_seconds), round(1e3 * fitted.token_seconds * 512 * 384)]
    assert int(host[2]) < int(host[0]) + int(host[1]) < int(host[3])
    steps = {}
    for size in (1, 2, 4):
        assert main(["plan", *flags, "--micro_batch_size", str(size), "--json",
                     "--matmul_proportion", "1"]) in (0, DOES_NOT_FIT)
        plan = json.loads(capsys.readouterr().out)
        work = [sum(stage[f"{kind}_seconds"] for kind in kinds) for stage in plan["stages"]]
        terms = [sum(stage[f"{term}_seconds"] for term in (
            "multiplications", "fixed_cost", "element_wise")) for stage in plan["stages"]]
        assert terms == pytest.approx(work)
        assert sum(plan["group_seconds"].values()) == pytest.approx(plan["update_seconds"])
        flops = sum(block["forward_flops"] + block["backward_flops"] for block in plan["blocks"])
        assert plan["flops_per_second_per_ipu"] == pytest.approx(
            flops / size * plan["rows_per_second"] / 16)
        steps[size], fixed = max(work), plan["step_fixed_seconds"]
    # The line through two sizes meets the axis at the part that depends on neither.
    assert fixed == pytest.approx(2 * steps[1] - steps[2]) == pytest.approx(
        2 * steps[2] - steps[4])


def test_a_plan_that_does_not_fit_and_a_sweep_of_nothing_have_a_status(
        tmp_path, capsys, monkeypatch):
    tight = ["--config", "squad_large_384", "--layers_per_ipu", "6", "6", "6", "6",
             "--embedding_serialization_factor", "1"]
    assert main(["plan", *tight]) == DOES_NOT_FIT == 3
    assert capsys.readouterr().out.startswith("Does not fit: IPU 0 is over by")
    monkeypatch.setattr("planner.sweep.measure_run", None)  # what does not fit is not run
    table = ["--output", str(tmp_path / "sweep.csv"), "--"]
    assert main(["sweep", "--embedding_serialization_factor", "1", "--run", *table,
                 *tight[:-2]]) == 0
    assert main(["sweep", "--layers_per_ipu", "1 1 1 2", "9 9", *table, *SMALL[:6]]) == 1
    lines = capsys.readouterr().out.splitlines()
    refusals = [line for line in lines if re.match(r"\d+: refused", line)]
    others = {line.replace(str(tmp_path), "") for line in lines} - set(refusals)
    assert len(refusals) == 2 and max(map(len, others)) <= 100


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the page is written on the host stack")
def test_the_page_on_the_planner_shows_what_its_commands_print():
    page = planner_walk.PAGE.read_text(encoding="utf-8")
    assert planner_walk.written(page) == page
