"""Packing is compared with a plain best-fit algorithm, and a run's rows with brute force."""
import pickle

import numpy
import pytest
import torch

from ipu_options.config import IPUConfig, packed_accumulation
from qa.data.loader import collate
from qa.data.packing import pack, windows_per_row
from qa.data.rows import InferenceRows, TrainingRows
from qa.settings import TrainSettings
from runtime.errors import UsageError
from tests.reference.synthetic_windows import SyntheticWindows

PAD = 1


def best_fit_decreasing(lengths, row_length, most):
    """Pack the windows one by one, from long to short; returns the lengths in each row.

    Each goes into the row with the least room that still takes it; among several such rows, into
    the one with the fewest windows.
    """
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= row_length and len(row) < most]
        if fitting:
            min(fitting, key=lambda row: (row_length - sum(row), len(row))).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100])
def test_pack_is_best_fit_decreasing(most):
    random = numpy.random.default_rng(most)
    for _ in range(20):
        lengths = random.integers(1, 61, random.integers(1, 250))
        packing = pack(lengths, 60, most)
        rows = numpy.split(packing.slot_length, packing.row_slots[1:-1])
        assert sorted(packing.slot_length) == sorted(lengths)
        assert max(row.sum() for row in rows) <= 60 and max(map(len, rows)) <= most
        assert sorted(row.sum() for row in rows) == sorted(
            sum(row) for row in best_fit_decreasing(lengths, 60, most))


def test_packed_rows_are_full():
    # The mean is 180 tokens, the 95th percentile 300.
    lengths = numpy.random.default_rng(0).gamma(7.5, 24, 100_000).clip(20, 384).astype(int)
    packing = pack(lengths, 384, 8)
    assert lengths.sum() / (384 * (len(packing.row_slots) - 1)) >= 0.98


@pytest.mark.parametrize("lengths", [[], [0, 3], [385, 2]])
def test_pack_refuses_what_no_row_can_take(lengths):
    with pytest.raises(ValueError, match="1..384"):
        pack(numpy.array(lengths, int), 384, 8)


def training_rows(windows, **changes):
    arguments = dict(row_length=64, max_windows_per_row=4, pad_token_id=PAD, micro_batch_size=2,
                     micro_batches_per_update=4, updates_per_step=2, epochs=2.5, seed=3)
    return TrainingRows(windows, **{**arguments, **changes})


def windows_of(row):
    """Check a row's format; returns (tokens, start label, end label, weight) of each window."""
    found = []
    for number, weight in enumerate(row["loss_weights"].tolist(), 1):
        places = (row["window_ids"] == number).nonzero().flatten()
        if weight == 0:
            assert not len(places)
            continue
        first = int(places[0])
        assert places.tolist() == list(range(first, first + len(places)))
        assert row["position_ids"][places].tolist() == list(range(PAD + 1, PAD + 1 + len(places)))
        labels = (int(row["start_positions"][number - 1]) - first,
                  int(row["end_positions"][number - 1]) - first)
        found.append((tuple(row["input_ids"][places].tolist()), *labels, weight))
    padding = row["window_ids"] == 0
    assert (row["input_ids"][padding] == PAD).all() and (row["position_ids"][padding] == PAD).all()
    return found


@pytest.mark.parametrize("most", [1, 4])
def test_every_window_once_an_epoch_and_the_weighted_loss_is_the_mean(most):
    windows = SyntheticWindows(numpy.random.default_rng(1).integers(8, 40, 211))
    expected = sorted((tuple(windows.input_ids(i).tolist()), int(windows.start_position[i]),
                       int(windows.end_position[i])) for i in range(len(windows)))
    rows = training_rows(windows, max_windows_per_row=most)
    updates = rows.updates_per_epoch
    assert rows.total_steps == numpy.ceil(numpy.ceil(2.5 * updates) / 2)
    assert len(rows) == rows.total_steps * 16
    epochs, windows_in_update = [], []
    for epoch in range(2):
        seen = []
        for update in range(epoch * updates, (epoch + 1) * updates):
            found = [windows_of(rows[index]) for index in range(8 * update, 8 * update + 8)]
            # Any function of a window serves as its loss: here the sum of its tokens.
            losses = [[sum(tokens) * weight for tokens, _, _, weight in row] for row in found]
            micro_batches = [sum(losses[2 * i]) + sum(losses[2 * i + 1]) for i in range(4)]
            update_windows = [window for row in found for window in row]
            mean = sum(sum(tokens) for tokens, *_ in update_windows) / len(update_windows)
            assert sum(micro_batches) / 4 == pytest.approx(mean, rel=1e-6)
            assert micro_batches[-1]  # the one whose loss the output mode "final" returns
            seen += [window[:3] for window in update_windows]
            windows_in_update.append(len(update_windows))
        assert sorted(seen) == expected
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert [rows.windows_in_step(step) for step in range(updates)] == [
        sum(windows_in_update[2 * step:2 * step + 2]) for step in range(updates)]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 50])
def test_updates_are_the_same_however_many_make_a_step_and_none_is_without_a_window(count):
    windows = SyntheticWindows(numpy.random.default_rng(count).integers(8, 40, count))
    plain = training_rows(windows, updates_per_step=1, max_windows_per_row=1, epochs=40)
    for updates_per_step in (2, 3, 8):
        rows = training_rows(windows, updates_per_step=updates_per_step, max_windows_per_row=1,
                             max_steps=4)
        assert all(same(rows[index], plain[index]) for index in range(32 * updates_per_step))
        assert rows.epoch_after(4) == plain.epoch_after(4 * updates_per_step)
        resumed = training_rows(windows, updates_per_step=updates_per_step, max_windows_per_row=1,
                                max_steps=4, first_step=3)
        assert same(resumed[0], rows[24 * updates_per_step])
    for first in range(0, 32 * 8, 8):
        assert any(map(windows_of, (plain[index] for index in range(first, first + 8))))


def test_a_call_of_more_updates_than_the_run_has_is_refused():
    windows, config = SyntheticWindows([20] * 9), IPUConfig(
        gradient_accumulation_steps=4, replication_factor=1, device_iterations=8)
    settings = TrainSettings(num_train_epochs=2)
    with pytest.raises(UsageError, match=(
            r"device_iterations.* 8: an epoch of 9 windows has 3 weight updates, the run 6, "
            "fewer than one call of the device has: use at most 6")):
        TrainingRows.of_run(settings, config, {"pad_token_id": PAD}, windows)
    settings.max_steps = 1
    assert TrainingRows.of_run(settings, config, {"pad_token_id": PAD}, windows).total_steps == 1


def test_epochs_pack_other_windows_together():
    windows = SyntheticWindows(numpy.full(200, 20))
    rows = training_rows(windows, max_windows_per_row=3, updates_per_step=1)
    epoch_rows = rows.updates_per_epoch * 8
    together = [{
        frozenset(window[0] for window in windows_of(rows[i]))
        for i in range(first, first + epoch_rows)} for first in (0, epoch_rows)]
    assert len(together[0] & together[1]) < 5


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def test_resume_and_workers_give_the_same_rows():
    windows = SyntheticWindows(numpy.random.default_rng(1).integers(8, 40, 2000))
    rows = training_rows(windows)
    steps = rows.updates_per_epoch // 2
    for first_step in (1, steps - 1, steps, steps + 1, steps + 3):
        resumed = training_rows(windows, first_step=first_step)
        assert len(resumed) == len(rows) - 16 * first_step
        assert all(same(resumed[index], rows[index + 16 * first_step]) for index in range(40))
    state = pickle.dumps(rows)
    assert len(state) < len(pickle.dumps(windows)) + 1000
    assert same(collate(pickle.loads(state).__getitems__([5, 900])), collate([rows[5], rows[900]]))
    assert not same(rows[0], training_rows(windows, seed=4)[0])
    assert training_rows(windows, max_steps=7).total_steps == 7


@pytest.mark.parametrize("most", [1, 4])
def test_inference_rows_hold_every_window_once(most):
    windows = SyntheticWindows(numpy.random.default_rng(2).integers(1, 60, 9001))
    rows = InferenceRows(windows, row_length=64, max_windows_per_row=most, pad_token_id=PAD,
                         rows_per_step=48)
    assert len(rows) % 48 == 0
    seen = []
    for index in range(len(rows)):
        row, slices = rows[index], rows.slices(index)
        assert int((row["window_ids"] > 0).sum()) == sum(length for _, _, length in slices)
        for number, (window, first, length) in enumerate(slices, 1):
            seen.append(window)
            assert torch.equal(row["input_ids"][first:first + length],
                               torch.from_numpy(windows.input_ids(window).astype("int32")))
            assert (row["window_ids"][first:first + length] == number).all()
    assert sorted(seen) == list(range(len(windows)))
    # Windows stay near their place, so that answers are complete long before the last row.
    assert max(abs(window - place) for place, window in enumerate(seen)) <= 4096
    assert same(pickle.loads(pickle.dumps(rows))[7], rows[7])


@pytest.mark.parametrize("rows", ["training", "inference"])
def test_positions_from_zero_and_token_types_are_of_each_window(rows):
    """As BERT wants them, by brute force from the windows; RoBERTa's rows lack the types."""
    windows = SyntheticWindows(numpy.random.default_rng(2).integers(8, 30, 50), seed=5)
    windows.second_text = windows.context_start
    own = {tuple(windows.input_ids(i).tolist()): int(windows.second_text[i]) for i in range(50)}
    bert = dict(first_position=0, token_types=True, pad_token_id=0)
    made = {"training": training_rows(windows, **bert),
            "inference": InferenceRows(windows, row_length=64, max_windows_per_row=4,
                                       rows_per_step=8, **bert)}[rows]
    seen = 0
    for row in (made[index] for index in range(len(made))):
        for number in range(1, int(row["window_ids"].max()) + 1):
            places = row["window_ids"] == number
            second = own[tuple(row["input_ids"][places].tolist())]
            assert row["position_ids"][places].tolist() == list(range(int(places.sum())))
            assert row["token_type_ids"][places].tolist() == [
                int(place >= second) for place in range(int(places.sum()))]
            seen += 1
        assert not row["position_ids"][row["window_ids"] == 0].any()
        assert not row["token_type_ids"][row["window_ids"] == 0].any()
    assert seen >= 50 and same(pickle.loads(pickle.dumps(made))[3], made[3])
    assert "token_type_ids" not in training_rows(windows)[0]
    windows.second_text = None
    assert "token_type_ids" not in training_rows(windows, **bert)[0]


def test_packed_accumulation_keeps_the_windows_of_an_update():
    lengths = numpy.full(100, 90)
    factor = windows_per_row(lengths, 384, 8)
    assert factor == 4 and packed_accumulation(32, factor) == 8 and packed_accumulation(
        32, factor, minimum=9) == 9


def test_a_padding_token_in_a_text_takes_no_position_as_in_transformers():
    from transformers.models.roberta import modeling_roberta

    windows = SyntheticWindows([9, 7])
    tokens = [numpy.array(ids, windows.input_ids(0).dtype) for ids in (
        [0, 7, PAD, PAD, 8, 2, 9, PAD, 2], [0, PAD, 5, 2, 2, 6, 2])]
    windows.input_ids = tokens.__getitem__
    rows = InferenceRows(windows, row_length=20, max_windows_per_row=2, pad_token_id=PAD,
                         rows_per_step=1)
    row = rows[0]
    # transformers 5 has it as a static method, with the same first two arguments
    count = getattr(modeling_roberta, "create_position_ids_from_input_ids", None) or getattr(
        modeling_roberta.RobertaEmbeddings, "create_position_ids_from_input_ids")
    for number in (1, 2):
        of_window = row["window_ids"] == number
        ids = row["input_ids"][of_window][None]
        assert row["position_ids"][of_window].tolist() == count(ids, PAD)[0].tolist()
    bert = InferenceRows(windows, row_length=20, max_windows_per_row=2, pad_token_id=PAD,
                         rows_per_step=1, first_position=0)[0]
    assert bert["position_ids"][bert["window_ids"] == 1].tolist() in ([*range(9)], [*range(7)])
