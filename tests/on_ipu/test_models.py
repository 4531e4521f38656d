"""What one small model gives on an IPU, in each variant, against plain PyTorch."""
import copy
import gc
import math
import subprocess
import sys
import threading
import time
from functools import lru_cache

import pytest
import torch

from ipu_options.config import OUTPUT_MODES
from ipu_options.options import attach, compile_model
from planner.profile import open_profile
from qa.model.parallelize import set_weights, weights_of
from qa.model.pretrained import save_model
from qa.run.checkpoint import Checkpoints
from qa.run.nonfinite import NonfiniteGuard
from qa.run.state import TrainingState
from tests.model.test_gradients import plain_model
from tests.on_ipu.variants import (
    CONFIG,
    HALF,
    TOLERANCE,
    VARIANTS,
    distance,
    initial_model,
    logits_of,
    make_answering,
    make_training,
    plain_logits,
    run,
    run_plainly,
    settings_of,
)

WITH_DROPOUT = copy.deepcopy(CONFIG)
WITH_DROPOUT.hidden_dropout_prob = WITH_DROPOUT.attention_probs_dropout_prob = 0.1
LARGE_VOCABULARY = copy.deepcopy(CONFIG)
LARGE_VOCABULARY.vocab_size = 250_000
RESULTS = {}


def result_of(variant):
    """Return what the device gave for a variant; it runs once, even if it fails."""
    if variant not in RESULTS:
        try:
            RESULTS[variant] = run(**VARIANTS[variant])
        except Exception as error:
            RESULTS[variant] = error
    if isinstance(RESULTS[variant], Exception):
        raise RESULTS[variant]
    return RESULTS[variant]


@lru_cache(maxsize=None)
def plainly(variant):
    return run_plainly(result_of(variant))


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request):
    return request.param


def test_it_compiles_and_runs(variant, seen):
    """Training and inference compile and run."""
    result = result_of(variant)
    seen(f"loss {result.loss:.4f}")
    assert math.isfinite(result.loss) and all(t.isfinite().all() for t in result.update.values())


def test_logits(variant, seen):
    """Logits are those of the CPU in float32."""
    result, plain = result_of(variant), plain_model(initial_model())
    windows = result.rows.windows
    found, exact, tanh = (sum(pairs, []) for pairs in (
        result.logits, plainly(variant).logits,
        plain_logits(plain, windows, range(len(windows)), "gelu_pytorch_tanh")))
    error, limit = distance(found, exact), TOLERANCE[result.settings.precision]
    seen(f"relative error {error:.1e}, allowed {limit}; {distance(found, tanh):.1e} from tanh GELU")
    assert error < limit


def test_mean_loss(variant, seen):
    """The loss is the mean over the real windows."""
    result, expected = result_of(variant), plainly(variant).loss
    seen(f"{result.loss:.6f}, in plain PyTorch {expected:.6f}")
    assert abs(result.loss / expected - 1) < TOLERANCE[result.settings.precision]


def test_weights_after_a_call(variant, seen):
    """The weights change as in plain PyTorch."""
    result, expected = result_of(variant), plainly(variant).update
    names = sorted(expected)
    assert names == sorted(result.update)
    error = distance([result.update[name] for name in names], [expected[name] for name in names])
    seen(f"relative error of the change {error:.1e}")
    assert error < TOLERANCE[result.settings.precision]


@pytest.mark.parametrize("variant", [name for name, changes in VARIANTS.items()
                                     if "output_mode" not in changes])
def test_watched_gradient(variant, seen):
    """The watched gradient is there, and right."""
    result = result_of(variant)
    config = result.ipu_config
    assert len(result.watched) == config.gradient_accumulation_steps * config.replication_factor
    error = distance([result.watched.mean(0)], [plainly(variant).watched])
    seen(f"relative error {error:.1e} over {len(result.watched)} micro-batches")
    assert error < TOLERANCE[result.settings.precision]


def test_every_option(seen):
    """The compiler accepts every option that options.py sets, on and off."""
    compiled = []
    for name in VARIANTS:
        try:
            compiled.append(result_of(name))
        except Exception:  # its own rows of the table say why
            continue
    values = [{**vars(result.settings), **vars(result.ipu_config)} for result in compiled]
    choices = {"output_mode": set(OUTPUT_MODES), "optimizer": {"adamw", "lamb"},
               "precision": {"float16", "float32"}, "replication_factor": {1, 2},
               "device_iterations": {1, 2}, "embedding_serialization_factor": {1, 2}}
    switches = [name for name, value in vars(settings_of()[1]).items() if isinstance(value, bool)]
    choices.update({name: {False, True} for name in [*switches, "pack"]})
    missing = {name: wanted - {each[name] for each in values} for name, wanted in choices.items()}
    assert not any(missing.values()), {name: left for name, left in missing.items() if left}
    seen(f"{len(choices)} settings in {len(compiled)} variants, "
         f"{len(set().union(*(result.compiled_with for result in compiled)))} options of PopTorch")


def test_automatic_loss_scaling(seen):
    """Hundreds of updates with automatic loss scaling stay finite."""
    made = make_training(auto_loss_scaling=True, device_iterations=10, num_train_epochs=50,
                         learning_rate=1e-3, **HALF)
    losses = [made.training_model(**made.rows.starting_at(step).first_batch()).float().mean()
              for step in range(20)]
    made.training_model.detachFromDevice()
    seen(f"after 200 updates the loss is {losses[-1]:.4f}")
    assert all(tensor.isfinite().all() for tensor in [*losses, *weights_of(made.model).values()])


HOLD_IPUS = """
import sys
from tests.on_ipu.variants import make_training
made = make_training(replication_factor=2)
made.training_model.compile(**made.rows.first_batch())
print("held", flush=True)
sys.stdin.readline()
"""


def test_waiting_for_ipus(seen, only_on_ipu):
    """A model waits for IPUs that another process has, and then runs."""
    made = make_training(replication_factor=2)
    batch = made.rows.first_batch()
    compile_model(made.training_model, batch)
    made.training_model.detachFromDevice()
    with subprocess.Popen([sys.executable, "-c", HOLD_IPUS], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, universal_newlines=True) as other:
        assert other.stdout.readline() == "held\n"
        threading.Timer(20, other.stdin.close).start()
        begin = time.monotonic()
        attach(made.training_model)
        seconds = time.monotonic() - begin
    made.training_model(**batch)
    made.training_model.detachFromDevice()
    only_on_ipu("nothing is attached")
    seen(f"attached after {seconds:.0f} s; with more than 4 IPUs there is nothing to wait for")


def test_ipu_model(seen):
    """The IPU Model compiles what the hardware runs."""
    made = make_training(ipu_model=True)
    made.training_model.compile(**made.rows.first_batch())
    assert made.training_model.isCompiled()


def test_embedding_memory(tmp_path, seen, only_on_ipu):
    """A serialised embedding takes less memory on IPU 0."""
    for parts in (1, 4):
        made = make_training(LARGE_VOCABULARY, watch=False, precision="float16",
                             embedding_serialization_factor=parts,
                             profile_dir=str(tmp_path / f"{parts}"))
        made.training_model(**made.rows.first_batch())
        made = None  # Poplar completes the profile when its engine is destroyed
        gc.collect()
    only_on_ipu("a host writes no profile; both ran")
    whole, serialised = (open_profile(str(tmp_path / parts)).total_bytes[0] for parts in "14")
    saved = 0.75 * 2 * LARGE_VOCABULARY.vocab_size * CONFIG.hidden_size  # of a float16 gradient
    seen(f"{whole / 2**20:.1f} MiB, in 4 parts {serialised / 2**20:.1f}; 3/4 of the gradient are "
         f"{saved / 2**20:.1f}")
    assert whole - serialised > saved / 2


def test_alternating(seen):
    """Detaching, evaluating and attaching again change nothing in the training."""
    ended, random_states = [], []
    for evaluating in (False, True):
        made = make_training(WITH_DROPOUT, num_train_epochs=3, **HALF)
        answering = make_answering(WITH_DROPOUT, **HALF)
        for step in range(3):
            made.training_model(**made.rows.starting_at(step).first_batch())
            if evaluating or step == 2:
                made.training_model.detachFromDevice()
                set_weights(answering.model, weights_of(made.model))
                logits_of(answering, made.rows.windows)
        ended.append({**weights_of(made.model), **made.optimizer.state_dict()["ipu_state"]})
        random_states.append(made.training_model.rng_state)
    one, other = ended
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    seen(f"{len(differing)} of {len(one)} tensors of weights and optimizer differ, random state "
         f"{'the same' if random_states[0] == random_states[1] else 'another'}")
    assert sorted(one) == sorted(other) and not differing
    assert random_states[0] == random_states[1]


def test_skipping(tmp_path, seen):
    """A run goes on after a step with NaN in all gradients, from its last checkpoint."""
    made = make_training(num_train_epochs=5, learning_rate=1e-3, on_nonfinite="skip", **HALF)
    state, passed = TrainingState(made.model, made.optimizer, made.training_model), []
    checkpoints = Checkpoints(tmp_path, {}, save_model)
    guard = NonfiniteGuard(made.settings, checkpoints, state, made.options)
    for state.step in range(1, 6):
        batch = made.rows.starting_at(state.step - 1).first_batch()
        if state.step == 3:
            batch["loss_weights"] *= math.inf
        loss = made.training_model(**batch).float().mean().item()
        passed.append(guard.check_or_go_back(loss, 1e-3, look_at_weights=True))
        if state.step == 2:
            checkpoints.save(state)
    state.weights()  # frees the IPUs
    seen(f"steps found finite: {passed}")
    assert passed == [True, True, False, True, True]
