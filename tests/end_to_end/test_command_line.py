"""Wrong command lines end with exit status 2 and one line.

The line names the flag and says what would be right.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import infer
import train
from ipu_options.config import inference_pipeline, training_pipeline
from planner.flags import TrainPlanSettings
from qa.settings import HINTS, named_configs, parse_infer, parse_train
from runtime.errors import UsageError, run_script

ROOT = Path(__file__).resolve().parents[2]
MODEL = [
    "--model_name_or_path", "{tmp}/model", "--train_file", "{tmp}/train.json", "--validation_file",
    "{tmp}/train.json", "--output_dir", "{tmp}/out"]

# (arguments, what names the flag in the line, part of what the line says would be right)
TRAIN = [
    ("--epochs 3", "--epochs", "--num_train_epochs"),
    ("--max_seq_lenght 128", "--max_seq_lenght", "did you mean --max_seq_length"),
    ("--learning_rates 1", "--learning_rates", "did you mean --learning_rate"),
    ("extra", "extra", "--help lists"),
    ("--config squad_base", "--config squad_base", "squad_base_384"),
    ("--config missing.yaml", "--config missing.yaml", "choose from"),
    ("--config {tmp}/list.yaml", "list.yaml", "should map setting names"),
    ("--config {tmp}/broken.yaml", "broken.yaml", "not readable as YAML"),
    ("--config {tmp}/unknown.yaml", "learning_rat", "did you mean learning_rate"),
    ("--config {tmp}/wrong_type.yaml", "wrong_type.yaml: num_train_epochs 'three'", "a number"),
    ("--config {tmp}/python_object.yaml", "python_object.yaml", "not readable as YAML"),
    ("--seed abc", "--seed abc", "a whole number"),
    ("--seed -1", "--seed -1", "at least 0"),
    ("--seed 1.5", "--seed 1.5", "a whole number"),
    ("--seed", "--seed", "expected one argument"),
    ("--micro_batch_size 0", "--micro_batch_size 0", "at least 1"),
    ("--eval_micro_batch_size -3", "--eval_micro_batch_size -3", "at least 1"),
    ("--micro_batch_size 1000000000", "--micro_batch_size 1000000000", "at most 4096"),
    ("--dataloader_num_workers 1000000", "--dataloader_num_workers 1000000", "at most 256"),
    ("--config {tmp}/aliases.yaml", "aliases.yaml: learning_rate is a list", "a number"),
    ("--config {tmp}/aliases.yaml --learning_rate 1", "aliases.yaml: optimizer is a list",
     "adamw, lamb"),
    ("--max_seq_length 8", "--max_seq_length 8", "at least 16"),
    ("--max_seq_length 100000", "--max_seq_length 100000", "at most 4096"),
    ("--doc_stride 384", "--doc_stride 384", "at most 192"),
    ("--doc_stride -1", "--doc_stride -1", "at least 0"),
    ("--doc_stride 200 --max_seq_length 128", "--doc_stride 200", "at most 64"),
    ("--learning_rate 0", "--learning_rate 0", "more than 0"),
    ("--learning_rate -2e-5", "--learning_rate -2e-05", "more than 0"),
    ("--learning_rate nan", "--learning_rate nan", "finite"),
    ("--learning_rate inf", "--learning_rate inf", "finite"),
    ("--learning_rate fast", "--learning_rate fast", "a number"),
    ("--warmup_ratio 1.5", "--warmup_ratio 1.5", "at most 1"),
    ("--warmup_steps 1000000000000", "--warmup_steps 1000000000000", "at most 1000000000"),
    ("--weight_decay 1e308", "--weight_decay 1e+308", "at most 100"),
    ("--config {tmp}/twice.yaml", "twice.yaml", "seed is given twice"),
    ("--warmup_ratio -0.1", "--warmup_ratio -0.1", "at least 0"),
    ("--weight_decay -0.01", "--weight_decay -0.01", "at least 0"),
    ("--loss_scaling 0", "--loss_scaling 0", "more than 0"),
    ("--num_train_epochs 0", "--num_train_epochs 0", "more than 0"),
    ("--max_steps 0", "--max_steps 0", "at least 1"),
    ("--adam_beta1 1", "--adam_beta1 1", "less than 1"),
    ("--adam_beta2 -0.5", "--adam_beta2 -0.5", "at least 0"),
    ("--adam_epsilon 1e-300", "--adam_epsilon 1e-300", "at least 1e-30"),
    ("--max_grad_norm 0", "--max_grad_norm 0", "more than 0"),
    ("--max_grad_norm 1 --optimizer lamb", "--max_grad_norm 1.0: PopTorch's LAMB",
     "--optimizer adamw"),
    ("--auto_loss_scaling --precision float32", "--auto_loss_scaling", "add --precision float16"),
    ("--max_grad_norm 1 --enable_half_first_order_momentum", "--max_grad_norm 1.0",
     "--enable_half_first_order_momentum false"),
    ("--logging_steps 0", "--logging_steps 0", "at least 1"),
    ("--save_steps 0", "--save_steps 0", "at least 1"),
    ("--save_total_limit 0", "--save_total_limit 0", "at least 1"),
    ("--n_best_size 0", "--n_best_size 0", "at least 1"),
    ("--max_answer_length 0", "--max_answer_length 0", "at least 1"),
    ("--max_windows_per_row 0", "--max_windows_per_row 0", "at least 1"),
    ("--max_train_samples 0", "--max_train_samples 0", "at least 1"),
    ("--max_eval_samples few", "--max_eval_samples few", "a whole number"),
    ("--preprocessing_num_workers 0", "--preprocessing_num_workers 0", "at least 1"),
    ("--precision bfloat16", "--precision bfloat16", "float16, float32"),
    ("--optimizer sgd", "--optimizer sgd", "adamw, lamb"),
    ("--lr_scheduler_type steps", "--lr_scheduler_type steps", "linear"),
    ("--on_bad_row ignore", "--on_bad_row ignore", "refuse, skip"),
    ("--on_nonfinite go", "--on_nonfinite go", "stop, skip"),
    ("--output_mode last", "--output_mode last", "final"),
    ("--pod_type pod5", "--pod_type pod5", "pod4, pod8"),
    ("--pack maybe", "--pack maybe", "true or false"),
    ("--matmul_proportion 1.5", "--matmul_proportion 1.5", "at most 1"),
    ("--layers_per_ipu", "--layers_per_ipu", "at least one argument"),
    ("--layers_per_ipu 0 four", "--layers_per_ipu four", "a whole number"),
    ("--layers_per_ipu 0 -4 4", "--layers_per_ipu -4", "at least -1"),
    ("--replication_factor 0", "--replication_factor 0", "at least 1"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0", "at least 1"),
    ("--gradient_accumulation_steps 1000000000000", "--gradient_accumulation_steps 1000000000000",
     "at most 65536"),
    ("--device_iterations 0", "--device_iterations 0", "at least 1"),
    ("--embedding_serialization_factor 0", "--embedding_serialization_factor 0", "at least 1"),
    ("--ipu_config {tmp}/none.json", "--ipu_config", "name a local ipu_config.json"),
    ("--ipu_config {tmp}/broken.json", "--ipu_config", "not readable as JSON"),
    ("--ipu_config {tmp}/list.json", "--ipu_config", "should be a JSON object"),
    ("--train_file {tmp}/none.json --validation_file {tmp}/train.json", "--train_file",
     "does not exist"),
    ("--train_file {tmp} --validation_file {tmp}/train.json", "--train_file", "is a folder"),
    ("--train_file {tmp}/train.json", "--train_file", "--validation_file"),
    ("--validation_file {tmp}/train.json", "--validation_file", "--train_file"),
    ("--demo_data --train_file {tmp}/train.json --validation_file {tmp}/train.json", "--demo_data",
     "exclude each other"),
    ("--demo_data --model_name_or_path {tmp}", "--model_name_or_path", "makes its own model"),
    ("--demo_data --dataset_name squad_v2", "--dataset_name", "makes its own questions"),
    ("--output_dir {tmp}/train.json", "--output_dir", "name a folder"),
    ("--resume_from_checkpoint {tmp}/none", "--resume_from_checkpoint", "no such folder"),
    ("--trace {tmp}/none/trace.json", "--trace", "make it"),
    ("--compile_only --synthetic_data", "--compile_only", "leave one out"),
    ("--compile_only --ipu_model", "--ipu_model", "leave one out"),
    ("--compile_only --executable_cache_dir ''", "--executable_cache_dir", "name a folder"),
    ("--compile_only --layers_per_ipu 4 4 4", "--layers_per_ipu 4 4 4", "use a power of two"),
    ("--compile_only --inference_layers_per_ipu 4 4 4", "--inference_layers_per_ipu 4 4 4",
     "use a power of two"),
    ("--compile_only --pod_type pod16 --replication_factor 3", "replication 3",
     "use a power of two"),
    ("--synthetic_data --resume_from_checkpoint auto", "--synthetic_data", "leave one out"),
    ("--compile_only --push_to_hub", "--compile_only", "leave one out"),
    ("--synthetic_data --do_eval", "--synthetic_data", "add --do_train"),
    ("--hub_model_id me/model", "--hub_model_id", "--push_to_hub"),
    ("--hub_private_repo", "--hub_private_repo", "--push_to_hub"),
    ("--save_total_limit 2", "--save_total_limit", "--save_steps or --load_best_model_at_end"),
    ("--null_score_diff_threshold 0.5", "--null_score_diff_threshold", "--version_2_with_negative"),
    ("--on_nonfinite skip", "--on_nonfinite", "--save_steps"),
    ("--load_best_model_at_end", "--load_best_model_at_end", "--eval_steps"),
    ("--do_train false --do_eval false", "--do_train false and --do_eval false", "leave one of"),
    ("--do_eval false --eval_steps 5", "--eval_steps", "add --do_eval"),
    ("--do_train --eval_steps 5", "--eval_steps", "add --do_eval"),
    ("--dataset_name x --train_file {tmp}/train.json --validation_file {tmp}/train.json",
     "--dataset_name", "leave it out"),
    ("--lr 1e-5", "--lr", "--learning_rate"), ("--fp16", "--fp16", "--precision float16"),
    ("--max_sequence_length 3", "--max_sequence_length", "did you mean"), ]
# The same for refusals that depend on the model: a folder with a tokenizer and a config.json of 3
# layers.
TRAIN_WITH_MODEL = [
    ("--layers_per_ipu 1 1 2", "--layers_per_ipu 1 1 2", "the sum must be 3"),
    ("--layers_per_ipu 3 --ipus_per_replica 2", "--ipus_per_replica is 2", "must agree"),
    ("--layers_per_ipu 1 0 2 --embedding_ipu 0", "--layers_per_ipu 1 0 2",
     "IPU 1 without any block"),
    # IPU 0, where PopTorch begins, then 1, 0 and 1: four stages.
    ("--layers_per_ipu 2 1 --embedding_ipu 1 --gradient_accumulation_steps 6",
     "--gradient_accumulation_steps 6", "needs at least 7"),
    ("--layers_per_ipu 1 1 1 --gradient_accumulation_steps 4", "--gradient_accumulation_steps 4",
     "at least 5"),
    ("--layers_per_ipu 1 1 1 --inference_layers_per_ipu 1 1 1 --inference_device_iterations 2",
     "--inference_device_iterations 2", "at least 3"),
    ("--layers_per_ipu 1 1 1 --replication_factor 2", "--replication_factor 2", "at most 1"),
    ("--layers_per_ipu 2 1 --pod_type pod1", "takes 2 IPUs, pod1 has 1: name no more than that",
     "as in -1 (equal shares)"),
    ("--layers_per_ipu 3 --pod_type pod1 --matmul_proportion 0.1 0.2", "0.1 0.2 has 2",
     "replica's IPUs, 1"),
    ("--layers_per_ipu 1 1 1 --head_ipu 3", "--head_ipu 3", "0 to 2"),
    ("--layers_per_ipu 1 1 1 --matmul_proportion 0.1 0.2", "--matmul_proportion 0.1 0.2",
     "replica's IPUs, 3"),
    ("--layers_per_ipu 1 1 1 --inference_layers_per_ipu 2 2", "--inference_layers_per_ipu 2 2",
     "the sum must be 3"),
    ("--layers_per_ipu 1 1 1 --max_seq_length 512", "--max_seq_length 512", "at most 64"), ]
INFER = [("--question Who?", "--checkpoint", "is missing"),
         ("--checkpoint {tmp}/none --question Who? --context Me.", "--checkpoint", "config.json"),
         ("--checkpoint {tmp}/model --question Who?", "--question", "--context"),
         ("--checkpoint {tmp}/model --question Who? --context A --context_file {tmp}/train.json",
          "--context", "leave one out"),
         ("--checkpoint {tmp}/model --question Who? --input_file {tmp}/train.json", "--question",
          "leave one out"),
         ("--checkpoint {tmp}/model --input_file {tmp}/none.json", "--input_file", "no such file"),
         ("--checkpoint {tmp}/model --output_file x.json --question Who? --context A",
          "--output_file", "--input_file"),
         ("--checkpoint {tmp}/model --output_file {tmp} --input_file {tmp}/train.json",
          "--output_file", "name another"),
         ("--checkpoint {tmp}/model --output_file {tmp}/none/x.json --input_file {tmp}/train.json",
          "--output_file", "make it"),
         ("--checkpoint {tmp}/model --question Who? --context ' '", "--context", "give its text"),
         ("--checkpoint {tmp}/model --question Who\udcff --context Ann", "--question",
          "give its text in that encoding"),
         ("--checkpoint {tmp}/model --n_best 0", "--n_best 0", "at least 1"),
         ("--checkpoint {tmp}/model --compile_only", "--compile_only", "no such flag"),
         ("--checkpoint {tmp}/model --synthetic_data", "--synthetic_data", "no such flag"),
         ("--checkpoint {tmp}/model --nbest 3", "--nbest", "did you mean --n_best"), ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import RobertaConfig, RobertaTokenizerFast

    tmp = tmp_path_factory.mktemp("command_line")
    (tmp / "list.yaml").write_text("- a\n- b\n")
    (tmp / "broken.yaml").write_text("a: [1\n")
    (tmp / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp / "unknown.yaml").write_text("learning_rat: 1\n")
    (tmp / "wrong_type.yaml").write_text("num_train_epochs: three\n")
    (tmp / "python_object.yaml").write_text(
        "seed: !!python/object/apply:os.system ['touch owned']\n")
    # With every alias written out these are 2 x 9^11 numbers.
    nested = ["&a0 [1, 1]",
              *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    (tmp / "aliases.yaml").write_text(f"learning_rate: [{', '.join(nested)}]\noptimizer: *a11\n")
    (tmp / "broken.json").write_text("{")
    (tmp / "list.json").write_text("[1]")
    text = "Ann lives in Oslo."
    qas = [{
        "id": "1", "question": "Where does Ann live?", "answers": [{
            "text": "Oslo", "answer_start": 13}]}]
    (tmp / "train.json").write_text(
        json.dumps({
            "version": "1.1", "data": [{
                "title": "t", "paragraphs": [{"context": text, "qas": qas}]}]}))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=270,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    RobertaTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(tmp / "model")
    RobertaConfig(vocab_size=270, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                  intermediate_size=32, max_position_embeddings=66).save_pretrained(tmp / "model")
    return tmp


def refusal(main, arguments, folder, monkeypatch, capsys):
    import shlex
    monkeypatch.setattr(sys, "argv",
                        ["script", *shlex.split(arguments.replace("{tmp}", str(folder)))])
    monkeypatch.delenv("NUM_AVAILABLE_IPU", raising=False)
    assert run_script(main) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0] == lines[-1], lines
    return errors[0]


@pytest.mark.parametrize("arguments, names, remedy", TRAIN, ids=[case[0] for case in TRAIN])
def test_train_refuses(arguments, names, remedy, folder, monkeypatch, capsys):
    message = refusal(train.main, arguments, folder, monkeypatch, capsys)
    assert names in message and remedy in message


@pytest.mark.parametrize("arguments, names, remedy", TRAIN_WITH_MODEL, ids=[
    case[0] for case in TRAIN_WITH_MODEL])
def test_train_refuses_once_it_knows_the_model(arguments, names, remedy, folder, monkeypatch,
                                               capsys):
    short = "" if "--max_seq_length" in arguments else " --max_seq_length 64 --doc_stride 16"
    message = refusal(train.main, " ".join(MODEL) + short + " " + arguments, folder, monkeypatch,
                      capsys)
    assert names in message and remedy in message
    assert not (folder / "out").exists()


@pytest.mark.parametrize("arguments, names, remedy", INFER, ids=[case[0] for case in INFER])
def test_infer_refuses(arguments, names, remedy, folder, monkeypatch, capsys):
    message = refusal(infer.main, arguments, folder, monkeypatch, capsys)
    assert names in message and remedy in message


# A value by pod, a list in a list, a number of 5,000 digits and a value nested 100,000 deep.
ODD_VALUES = [
    ("yaml", "precision: {pod4: float16}", "precision is a dictionary"),
    ("yaml", "pack: {pod4: true}", "pack is a dictionary"),
    ("yaml", "learning_rate: [[1]]", "learning_rate is a list"),
    ("yaml", "layers_per_ipu: [[3], 3]", "layers_per_ipu holds a list"),
    ("yaml", "gradient_accumulation_steps: {pod4: {a: 1}}", "a whole number for each of pod4"),
    ("yaml", "gradient_accumulation_steps: {pod5: 3}", "a whole number for each of pod4"),
    ("yaml", "seed: " + "9" * 5000,
     "not readable" if hasattr(sys, "set_int_max_str_digits") else "seed"),
    ("json", "[" * 100_000, "nested too deep"),
    ("json", '{"a":' * 100_000, "nested too deep"),
    ("json", '{"embedding_ipu": {"pod4": 1}}', "embedding_ipu is a dictionary"), ]


@pytest.mark.parametrize("kind, text, says", ODD_VALUES,
                         ids=[text[:30] for _, text, _ in ODD_VALUES])
def test_odd_values_in_files_are_one_line(folder, tmp_path, monkeypatch, capsys, kind, text, says):
    path = tmp_path / f"odd.{kind}"
    path.write_text(text)
    flag = "--config" if kind == "yaml" else "--ipu_config"
    message = refusal(train.main, f"{flag} {path}", folder, monkeypatch, capsys)
    assert str(path) in message and says in message and len(message) < 1000


def test_the_flags_that_people_come_with_say_what_does_their_work_here(monkeypatch, capsys):
    """Every flag that a hint names exists, no hint is of a flag that exists."""
    for script, parse in (("train.py", parse_train), ("infer.py", parse_infer)):
        with pytest.raises(SystemExit):
            parse(["--help"])
        flags = set(re.findall(r"(?m)^  --(\w+)", capsys.readouterr().out))
        for hint, names in HINTS[script].items():
            assert not set(names) & flags and len(names) == len(set(names)), hint
            if "planner" not in hint:
                assert set(re.findall(r"--(\w+)", hint)) <= flags, hint
            for name in names:
                with pytest.raises(UsageError, match=f"^--{name}: {re.escape(hint)}$"):
                    parse([f"--{name}", "1"])


def test_values_and_flags_are_taken_as_people_write_them(tmp_path, caplog):
    """YAML 1.1 reads 1e-5 as text, users of run_qa write its names, and others write dashes."""
    (tmp_path / "mine.yaml").write_text("learning_rate: 1e-5\nseed: 1_000\n", encoding="utf-16")
    settings, _ = parse_train(["--config", str(tmp_path / "mine.yaml"),
                               "--per_device_train_batch_size", "3", "--max-eval-samples=7"])
    assert (settings.learning_rate, settings.seed) == (1e-5, 1000)
    assert (settings.micro_batch_size, settings.max_eval_samples) == (3, 7)
    # A published file of optimum-graphcore: what means something here is read, the rest is named.
    (tmp_path / "ipu_config.json").write_text(json.dumps({
        "optimum_version": "1.6", "training_layers_per_ipu": [5, 7], "ipus_per_replica": None,
        "wibble": 3}), encoding="utf-8-sig")
    _, ipu_config = parse_train(["--ipu_config", str(tmp_path)])
    assert ipu_config.layers_per_ipu == [5, 7] and ipu_config.ipus_per_replica is None
    assert "wibble" in caplog.text and "optimum_version" not in caplog.text


@pytest.mark.parametrize("flags, trains, evaluates", [
    ("", True, True), ("--do_train", True, False), ("--do_eval", False, True),
    ("--do_train --do_eval", True, True), ("--do_eval false", True, False),
    ("--do_train false", False, True), ("--do_train --do_eval false", True, False)])
def test_a_false_do_train_or_do_eval_counts(tmp_path, flags, trains, evaluates):
    (tmp_path / "my.csv").write_text("question,context,answer\n")
    files = [word for name, needed in (("train", trains), ("validation", evaluates)) if needed
             for word in (f"--{name}_file", str(tmp_path / "my.csv"))]
    settings, *_ = parse_train([*flags.split(), *files, "--output_dir", str(tmp_path)])
    assert (settings.trains, settings.evaluates) == (trains, evaluates)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_hides_what_is_printed_and_no_more(closed):
    code = "import os, sys; from runtime.errors import UsageError, run_script; " \
        "run_script(lambda: print('out') or print('err', file=sys.stderr)); " \
        "sys.exit(run_script(lambda: 3))"
    done = subprocess.run(f'"{sys.executable}" -c "{code}" {closed}', shell=True, cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert done.stdout == "out\n" * (">&-" not in closed.split())
    assert done.stderr == "err\n" * ("2>&-" not in closed)


def test_a_learning_rate_that_destroys_a_model_is_named_once_with_the_usual_range(caplog):
    parse_train(["--learning_rate", "0.01", "--optimizer", "lamb"])
    assert not caplog.records
    parse_train(["--learning_rate", "10"])
    (line,) = caplog.records
    assert line.getMessage() == (
        "warning: --learning_rate 10 destroys a model: fine-tuning takes 1e-05 to 0.0001")


def test_the_scripts_themselves_end_with_status_2_and_show_a_traceback_only_when_asked():
    def run(*arguments):
        return subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    refused = run("--seed", "-1")
    assert refused.returncode == 2 and refused.stderr.count(
        "\n") == 1 and "Traceback" not in refused.stderr
    for debug, shown in ((["--debug"], True), (["--debug=true"], True),
                         (["--debug", "false"], False), (["--debug=maybe"], False)):
        refused = run("--seed", "-1", *debug)
        assert refused.returncode == 2 and ("Traceback" in refused.stderr) == shown


@pytest.mark.parametrize("cache, used", [("./exe_cache", "./exe_cache"), ("/etc/cron.d", None),
                                         ("exe/../../.ssh", None), (None, None)])
def test_an_ipu_config_chooses_no_folder_outside_the_working_directory(
        folder, tmp_path, caplog, cache, used):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "ipu_config.json").write_text(json.dumps({"executable_cache_dir": cache}))
    _, read_by_infer = parse_infer(["--checkpoint", str(tmp_path)])
    assert read_by_infer.executable_cache_dir == used and ("is not used"
                                                           in caplog.text) == (cache != used)
    flags = [
        "--ipu_config",
        str(tmp_path), "--train_file",
        str(folder / "train.json"), "--validation_file",
        str(folder / "train.json")]
    assert parse_train(flags)[1].executable_cache_dir == used
    assert parse_train([*flags, "--executable_cache_dir",
                        "/scratch"])[1].executable_cache_dir == "/scratch"


def test_a_flag_of_infer_wins_over_the_checkpoints_inference_pipeline(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "ipu_config.json").write_text(json.dumps({
        "layers_per_ipu": [1, 1, 1], "replication_factor": 1, "inference_layers_per_ipu": [2, 1]}))
    (tmp_path / "model" / "qa_settings.json").write_text(json.dumps({"eval_micro_batch_size": 5}))
    flags = ["--checkpoint", str(tmp_path / "model")]
    settings, ipu_config = parse_infer(flags)
    assert settings.eval_micro_batch_size == 5  # that of the run: its executable is found again
    assert (ipu_config.inference().layers_per_ipu, ipu_config.inference().replication_factor) == (
        [2, 1], 2)
    _, ipu_config = parse_infer([*flags, "--layers_per_ipu", "3", "--replication_factor", "1"])
    assert (ipu_config.inference().layers_per_ipu, ipu_config.inference().replication_factor) == (
        [3], 1)


def test_a_single_question_runs_as_one_row_and_a_file_fills_the_pipeline(folder, tmp_path,
                                                                         monkeypatch):
    from transformers import RobertaConfig, RobertaForQuestionAnswering

    from qa.answers import inference
    from qa.answers.answerer import Answerer
    shutil.copytree(folder / "model", tmp_path / "model")
    RobertaForQuestionAnswering(RobertaConfig.from_pretrained(folder / "model")).save_pretrained(
        tmp_path / "model")
    made, real = [], inference.inference_options
    monkeypatch.setattr(inference, "inference_options",
                        lambda *given: made.append(real(*given)) or made[-1])
    flags = ["--checkpoint", str(tmp_path / "model"), "--max_seq_length", "64",
             "--layers_per_ipu", "2", "1", "--inference_device_iterations", "6",
             "--replication_factor", "2", "--doc_stride", "16"]
    for more in (["--question", "Where?", "--context", "Here."],
                 ["--input_file", str(folder / "train.json")]):
        settings, ipu_config = parse_infer([*flags, *more])
        Answerer(settings, ipu_config)
    single, of_file = (options.toDict() for options in made)
    names = ("execution_mode", "device_iterations", "replication_factor")
    assert [single[name] for name in names] == [1, 1, 1]  # sharded: one stage after the other
    assert [of_file[name] for name in names] == [0, 6, 2]  # pipelined


@pytest.mark.parametrize("name", named_configs())
def test_a_named_configuration_evaluates_on_all_its_ipus_with_a_full_pipeline(name):
    settings, ipu_config = parse_train(["--config", name])
    layers = next((number for part, number in (("demo", 4), ("large", 24), ("distil", 6))
                   if part in name), 12)
    training, inference = (pipeline(ipu_config, layers, settings.pod_type)
                           for pipeline in (training_pipeline, inference_pipeline))
    used = [made.config.num_ipus() * made.config.replication_factor
            for made in (training, inference)]
    stages, iterations = len(inference.layout.stages()), inference.config.device_iterations
    assert used[0] == used[1] and stages == 2
    assert iterations / (iterations + stages - 1) >= 0.8  # the rest is ramp
    assert settings.eval_micro_batch_size >= 4 * settings.micro_batch_size


def test_help_answers_without_importing_torch_or_transformers():
    code = ("import sys, train\ntry:\n    train.main()\nexcept SystemExit as end:\n"
            "    print(end.code, 'torch' in sys.modules, 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, stdout=subprocess.PIPE,
                          text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False"
    assert "--layers_per_ipu" in done.stdout and "--max_seq_length" in done.stdout


def test_help_is_in_sections_of_which_the_planners_come_last(capsys):
    with pytest.raises(SystemExit):
        parse_train(["--help"], TrainPlanSettings)
    sections = [
        line for line in capsys.readouterr().out.splitlines()
        if line.endswith(":") and not line.startswith(" ")]
    assert sections[1:] == [
        "Which questions to train on and to evaluate:",
        "Which model, and how its answers are read off:", "The fine-tuning run:",
        "How and where it runs:", "How the job is mapped to IPUs:", "Planning, with --plan:"]


@pytest.mark.parametrize("file, content, message", [
    ("qa_settings.json", {"max_seq_length": 8},
     "error: {file}: max_seq_length 8 is too small: it should be at least 16"),
    ("qa_settings.json", {"doc_stride": 100, "max_seq_length": 64},
     "error: {file}: doc_stride 100 leaves a window of {file}: max_seq_length 64"),
    ("ipu_config.json", {"device_iterations": "two"
                         }, "error: {file}: device_iterations 'two': it should be a whole number"),
    ("ipu_config.json", {"layers_per_ipu": [1, 1]
                         }, "error: {file}: layers_per_ipu 1 1 adds up to 2 layers"),
    ("ipu_config.json", [], "error: {file}: holds a list, it should be a JSON object"),
    ("config.json", {"model_type": "roberta", "hidden_size": 0}, "error: --checkpoint "), ])
def test_a_value_from_a_checkpoints_file_is_refused_by_that_file(folder, tmp_path, monkeypatch,
                                                                 capsys, file, content, message):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / file).write_text(json.dumps(content))
    row = "" if file == "qa_settings.json" else "--max_seq_length 64 --doc_stride 16"
    said = refusal(infer.main, f"--checkpoint {tmp_path}/model --question Who? --context Ann {row}",
                   folder, monkeypatch, capsys)
    assert said.startswith(message.format(file=tmp_path / "model" / file))


def test_a_value_from_a_configuration_is_refused_by_its_file_and_key(folder, tmp_path, monkeypatch,
                                                                     capsys):
    (tmp_path / "mine.yaml").write_text(
        "layers_per_ipu: [1, 1, 1]\ngradient_accumulation_steps: 4\nreplication_factor: 2\n")
    (tmp_path / "other.json").write_text(json.dumps({"layers_per_ipu": [2, 2]}))
    model = " ".join(MODEL) + f" --max_seq_length 64 --doc_stride 16 --config {tmp_path}/mine.yaml"
    for flags, message in (
        ("", f"error: {tmp_path}/mine.yaml: gradient_accumulation_steps 4 is too small"),
        ("--gradient_accumulation_steps 8",
         f"error: {tmp_path}/mine.yaml: replication_factor 2 takes 8 IPUs"),
        ("--gradient_accumulation_steps 3", "error: --gradient_accumulation_steps 3 is too small"),
        (f"--ipu_config {tmp_path}/other.json",
         f"error: --ipu_config {tmp_path}/other.json: layers_per_ipu 2 2 adds up to 4 layers")):
        assert refusal(train.main, f"{model} {flags}", folder, monkeypatch,
                       capsys).startswith(message)
