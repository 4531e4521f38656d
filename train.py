#!/usr/bin/env python3
"""Fine-tune RoBERTa for extractive question answering on Graphcore IPUs, or on this host.

    python train.py --config demo      a whole run in two minutes; it needs no download
    python train.py                    roberta-base on SQuAD v1, on 4 IPUs
    python train.py --plan             what that would take: memory, balance and speed

`fine_tune` is the whole job, from top to bottom. Its parts are in qa/ (data, model, answers, run),
and ipu_options/ says how the job is mapped to IPUs.
"""
import sys
import time
from functools import partial

from ipu_options.config import inference_pipeline, training_pipeline
from ipu_options.errors import run_script
from ipu_options.popvision import Spans, profiling_environment
from qa.planning.flags import TrainPlanSettings
from qa.settings import check_row_length, parse_train


def main(argv=None):
    """Run the command line `argv`, by default the process's own; returns the exit status."""
    settings, ipu_config, planning = parse_train(argv, TrainPlanSettings)
    if planning.plan:
        from qa.planning.commands import show_plan
        return show_plan(settings, ipu_config, planning)
    planning.refuse_without_plan(settings)
    profiling_environment(settings, ipu_config, "training", "inference")

    from qa.run.process import StopSignals, output_lock
    with output_lock(settings.output_dir), StopSignals() as stop, Spans("train", settings) as spans:
        return fine_tune(settings, ipu_config, stop, spans)


def fine_tune(settings, ipu_config, stop, spans):
    """Train, evaluate and save one model; returns the exit status.

    stop: the signals that ask the run to save and end.  spans: names its phases for PopVision.
    """
    # 0. Imports, here because every process of the data loader imports this file once more.
    import torch
    from transformers import set_seed

    from ipu_options import poptorch
    from ipu_options.options import mean_loss, training_options, watched_gradient
    from qa.answers.evaluation import Evaluation
    from qa.data.demo import use_demo_data
    from qa.data.loader import open_loader
    from qa.data.packing import for_packed_rows
    from qa.data.rows import TrainingRows
    from qa.data.windows import load_questions
    from qa.model.optimizer import make_optimizer, make_schedule
    from qa.model.parallelize import LAST_GRADIENT, parallelize, weights_of
    from qa.model.pretrained import load_config, load_model, load_tokenizer, write_checkpoint_files
    from qa.run import hub
    from qa.run.checkpoint import Checkpoints, Training, restore
    from qa.run.nonfinite import NonfiniteGuard
    from qa.run.progress import Progress, describe_rows
    from qa.run.record import write_run_record

    # 1. What is trained, and where: the model, and its blocks on the IPUs of both pipelines.
    begin = time.perf_counter()
    print(f"PopTorch: {poptorch.__name__} {poptorch.__version__}, torch {torch.__version__}")
    if settings.push_to_hub:
        hub.check_login(settings.hub_token)
    if settings.demo_data:
        settings = use_demo_data(settings)
    model_config = load_config(settings.model_name_or_path, settings.hub_token)
    check_row_length(settings, model_config)
    layers = model_config.num_hidden_layers
    pipeline = training_pipeline(ipu_config, layers, settings.pod_type)
    evaluation_pipeline = inference_pipeline(ipu_config, layers, settings.pod_type)
    tokenizer = load_tokenizer(settings.tokenizer_name or settings.model_name_or_path,
                               settings.hub_token)
    print(pipeline.layout.table())

    # 2. Questions -> windows -> rows. A packed row holds several windows, so fewer micro-batches
    # give an update its number of windows. The rows of all epochs are one data set.
    questions, eval_questions = load_questions(settings, tokenizer)
    pipeline = for_packed_rows(pipeline, questions.windows.lengths, settings)
    rows = TrainingRows.of_run(settings, pipeline.config, model_config, questions.windows)
    print(describe_rows(rows, len(questions.examples), settings, pipeline.config))

    # 3. From the beginning, or from a checkpoint of a run that was stopped.
    checkpoints = Checkpoints.of_run(settings, rows)
    saved = checkpoints.open(settings.resume_from_checkpoint, settings.overwrite_output_dir)
    step = saved.step if saved else 0
    rows = rows.starting_at(step)
    write_run_record(settings, pipeline.config, rows, saved)

    # 4. The model on the IPUs: annotated, in its precision, compiled for one combined batch.
    set_seed(settings.seed)
    model = load_model(saved.folder if saved else settings.model_name_or_path, model_config,
                       settings.hub_token).train()
    parallelize(
        model, pipeline.layout,
        recompute_checkpoint_every_layer=pipeline.config.recompute_checkpoint_every_layer,
        embedding_serialization_factor=pipeline.config.embedding_serialization_factor)
    if settings.precision == "float16":
        model.half()
    optimizer = make_optimizer(model, settings, pipeline.config)
    schedule = make_schedule(optimizer, settings, rows.total_steps, steps_done=step)
    options = training_options(pipeline.config, settings, seed=settings.seed,
                               watched=LAST_GRADIENT, watch=settings.watch_gradients)
    training_model = poptorch.trainingModel(model, options, optimizer)
    training_model.compile(**rows.first_batch())
    evaluation = Evaluation(settings, model_config, evaluation_pipeline, eval_questions)
    if settings.compile_only:
        evaluation.compile()
        print(f"compiled in {time.perf_counter() - begin:.0f} s; nothing was run")
        return 0
    if saved:
        restore(saved, training_model, optimizer)

    # 5. The loop. A step is one call of the device: one combined batch, device_iterations updates.
    write_files = partial(write_checkpoint_files, model, tokenizer, ipu_config, settings)
    training = Training(model, optimizer, training_model, write_files)
    guard = NonfiniteGuard(settings, checkpoints, training)
    progress = Progress(rows, settings.logging_steps, saved)
    loader = open_loader(options, rows, settings.micro_batch_size, settings.dataloader_num_workers)
    stopping = stop.requested
    with loader as batches, progress:
        while step < rows.total_steps and not stopping:
            learning_rate = schedule.get_last_lr()[0]
            with spans("data"):
                batch = next(batches)
            with spans("step"):
                loss = mean_loss(training_model(**batch), pipeline.config)
            step += 1
            saving = settings.save_steps and step % settings.save_steps == 0
            stopping = stop.requested
            # What is saved is finite. Reading weights costs a transfer from the device.
            look_at_weights = saving or stopping or step == rows.total_steps
            finite = guard.passes(step, loss, learning_rate, progress.losses,
                                  watched_gradient(options, training_model),
                                  weights_of(model) if look_at_weights else {})
            with spans("schedule"):
                schedule.step()
                training_model.setOptimizer(optimizer)  # before this, the device sees no change
            progress.update(step, loss if finite else None, learning_rate)
            if saving:
                with spans("save"):
                    checkpoints.save_or_warn(training, step, progress.losses)
            epoch_ends = step % rows.steps_per_epoch == 0 and step < rows.total_steps
            if settings.evaluate_every_epoch and epoch_ends:
                with spans("evaluate"):
                    evaluation.run(training, step, step / rows.steps_per_epoch)
    if stopping:
        with spans("save"):
            checkpoints.save(training, step, progress.losses)
        print(f"stopped by {stopping.name} after step {step}; "
              "the same command with --resume_from_checkpoint auto goes on")
        return stop.exit_status

    # 6. The end: the model is saved, evaluated, shown and shared.
    with spans("save"):
        checkpoints.save_final(training)
    with spans("evaluate"):
        predictions = evaluation.run(training, step, step / rows.steps_per_epoch)
    print(evaluation.samples(predictions, settings.show_predictions, settings.seed))
    print(f"saved to {settings.output_dir} after {time.perf_counter() - begin:.0f} s; "
          f"ask it: python infer.py --checkpoint {settings.output_dir}")
    if settings.push_to_hub:
        print(f"shared: {hub.push(settings)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
