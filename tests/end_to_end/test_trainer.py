"""train.py's losses step by step, against Trainer's definition of the same fine-tuning.

Trainer itself needs a package that the project does not. What it does is written out here, on
transformers' own model with run_qa's labels: AdamW whose decay spares biases and LayerNorm, a
linear schedule with the warm-up rounded up, the mean loss of an update's windows, and torch's
clipping. Windows are computed one by one, because in a padded batch transformers' loss counts the
padding among the places where an answer may be.
"""
import math

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, get_scheduler

import train
from qa.data.dataset import load_examples
from qa.data.rows import TrainingRows
from qa.data.tokenizer import QATokenizer
from qa.data.windows import make_windows
from qa.run.log import read_log
from qa.settings import ModelSettings
from tests.end_to_end.test_train import run
from tests.reference.small_demo import write_small_demo
from tests.reference.windows import plain_windows
from tests.tools.families import texts_of, write_model

LENGTH, STRIDE, SEED, EPOCHS, WARMUP, DECAY, RATE = 128, 32, 7, 2, 0.27, 0.1, 1e-3
UPDATE = {False: (4, 2), True: (1, 3)}  # packed: micro-batch size, micro-batches of an update


def windows_by_update(examples, tokenizer, pack):
    """The windows of each update in the order of a run of train.py, as run_qa makes them."""
    micro_batch, accumulation = UPDATE[pack]
    rows = TrainingRows(
        make_windows(examples, QATokenizer.of(tokenizer),
                     ModelSettings(max_seq_length=LENGTH, doc_stride=STRIDE), labels=True,
                     offsets=False),
        row_length=LENGTH, max_windows_per_row=8 if pack else 1, pad_token_id=0, seed=SEED,
        micro_batch_size=micro_batch, micro_batches_per_update=accumulation, epochs=EPOCHS)
    plain = {tuple(window["input_ids"]): window
             for window in plain_windows(examples, tokenizer, LENGTH, STRIDE)}
    for step in range(rows.total_steps):
        batch = rows.__getitems__(range(step * rows.rows_per_step, (step + 1) * rows.rows_per_step))
        yield [plain[tuple(ids[numbers == number].tolist())]
               for ids, numbers in zip(batch["input_ids"], batch["window_ids"])
               for number in range(1, int(numbers.max()) + 1)]


def trainer_losses(folder, updates, max_grad_norm):
    """The loss of each update by plain PyTorch and transformers' model."""
    model = AutoModelForQuestionAnswering.from_pretrained(folder).train()
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm)
             for p in m.parameters()}
    decayed = {name for name, p in model.named_parameters()
               if id(p) not in norms and not name.endswith("bias")}
    optimizer = torch.optim.AdamW([
        {"params": [p for name, p in model.named_parameters() if (name in decayed) == decays],
         "weight_decay": DECAY if decays else 0.0} for decays in (True, False)],
        lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    schedule = get_scheduler("linear", optimizer, math.ceil(WARMUP * len(updates)), len(updates))
    for update in updates:
        losses = []
        for window in update:
            inputs = {name: torch.tensor([window[name]]) for name in (
                "input_ids", "token_type_ids", "start_position", "end_position")}
            losses.append(model(inputs["input_ids"], token_type_ids=inputs["token_type_ids"],
                                start_positions=inputs["start_position"],
                                end_positions=inputs["end_position"]).loss / len(update))
            losses[-1].backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield sum(losses).item()


@pytest.mark.slow
@pytest.mark.parametrize("pack, max_grad_norm", [(False, None), (False, 0.5), (True, 0.5)])
def test_losses_are_trainers_step_by_step(tmp_path, pack, max_grad_norm):
    write_small_demo(tmp_path, train=19, validation=1)  # the last of 10 updates has 4 of 8 windows
    write_model(tmp_path / "bert", "bert", texts_of(tmp_path / "train.json"))
    micro_batch, accumulation = UPDATE[pack]
    arguments = {
        "model_name_or_path": tmp_path / "bert", "train_file": tmp_path / "train.json",
        "validation_file": tmp_path / "validation.json", "output_dir": tmp_path / "out",
        "precision": "float32", "layers_per_ipu": -1, "ipus_per_replica": 1,
        "max_seq_length": LENGTH, "doc_stride": STRIDE, "seed": SEED, "num_train_epochs": EPOCHS,
        "micro_batch_size": micro_batch, "warmup_ratio": WARMUP, "weight_decay": DECAY,
        "learning_rate": RATE, "logging_steps": 1, "do_train": True, "pack": pack,
        # --pack makes as many micro-batches of packed rows as hold that many windows.
        "gradient_accumulation_steps": accumulation * (2 if pack else 1), "loss_scaling": 1}
    if max_grad_norm:
        arguments["max_grad_norm"] = max_grad_norm
    assert run(train, *(word for name, value in arguments.items()
                        for word in (f"--{name}", value))) == 0
    losses = [line["loss"] for line in read_log(tmp_path / "out" / "log.jsonl")
              if line["event"] == "log"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    examples = load_examples(split="train", file=str(tmp_path / "train.json"))
    updates = list(windows_by_update(examples, tokenizer, pack))
    expected = list(trainer_losses(tmp_path / "bert", updates, max_grad_norm))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
