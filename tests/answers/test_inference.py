"""The inference loop is compared with Hugging Face's model run on each window alone.

It runs packed and unpacked, with and without a worker process.
"""
import pytest
import torch
from datasets import Dataset
from transformers import RobertaConfig, RobertaForQuestionAnswering

from ipu_options.config import IPUConfig, inference_pipeline
from qa.answers import inference
from qa.answers.inference import InferencePipeline
from qa.model.roberta import RobertaForSpans
from qa.settings import InferSettings
from tests.on_ipu.variants import make_answering
from tests.reference.answers import plain_answers
from tests.reference.synthetic_windows import SyntheticWindows

CONFIG = RobertaConfig(vocab_size=1000, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                       intermediate_size=64, max_position_embeddings=100, type_vocab_size=1,
                       pad_token_id=1, initializer_range=0.5)


@pytest.mark.parametrize("most, rows_worth_a_worker", [
    (1, 10_000), (4, 10_000), pytest.param(4, 0, marks=pytest.mark.slow)])
def test_answers_are_those_of_each_window_alone(monkeypatch, most, rows_worth_a_worker):
    monkeypatch.setattr(inference, "_ROWS_WORTH_A_WORKER", rows_worth_a_worker)
    torch.manual_seed(0)
    windows = SyntheticWindows(torch.randint(12, 64, (150,)), windows_per_example=2)
    count = int(windows.example[-1]) + 1
    examples = Dataset.from_dict({
        "id": [str(i) for i in range(count)], "context": ["0123456789" * 30] * count})
    model = RobertaForSpans(CONFIG).eval()
    plain = RobertaForQuestionAnswering(CONFIG).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = [
            plain(torch.from_numpy(windows.input_ids(i).astype("int64")).unsqueeze(0))
            for i in range(len(windows))]
    logits = [torch.cat((output.start_logits, output.end_logits)).numpy() for output in outputs]
    expected = list(plain_answers(windows, examples, logits, 5, 30, True, 0.0))

    config = IPUConfig(layers_per_ipu=[1], inference_layers_per_ipu=[1],
                       inference_device_iterations=3, inference_replication_factor=2)
    settings = InferSettings(max_seq_length=64, max_windows_per_row=most, n_best_size=5,
                             version_2_with_negative=True, precision="float32",
                             eval_micro_batch_size=2)
    pipeline = InferencePipeline(model, inference_pipeline(config, 1, "pod4"), settings)
    assert pipeline.rows_per_step == 12
    answers = list(pipeline.answers(windows, examples, progress=False))
    assert [answer["id"] for answer in answers] == [answer["id"] for answer in expected]
    assert [answer["text"] for answer in answers] == [answer["text"] for answer in expected]
    for answer, wanted in zip(answers, expected):
        assert answer["null_odds"] == pytest.approx(wanted["null_odds"], abs=1e-4)
        assert answer["score"] == pytest.approx(wanted["score"], abs=1e-4)
        assert [entry["probability"] for entry in answer["nbest"]] == pytest.approx(
            [entry["probability"] for entry in wanted["nbest"]], abs=1e-4)


def test_questions_are_answered_in_packed_rows_after_an_unpacked_training():
    rows = make_answering(pack=False)._rows(SyntheticWindows([20, 20, 20, 30]))
    assert [len(rows.slices(row)) for row in range(2)] == [2, 2]
