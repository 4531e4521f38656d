#!/usr/bin/env python3
"""Fine-tune RoBERTa for extractive question answering on Graphcore IPUs, or on this host.

    python train.py --config demo      a whole run in two minutes; it needs no download
    python train.py                    roberta-base on SQuAD v1, on 4 IPUs
    python train.py --plan             what that would take: memory, balance and speed

`fine_tune` is the whole job. Its parts are in qa/, and how it is mapped to IPUs in ipu_options/.
"""
import sys
from functools import partial

from ipu_options.config import inference_pipeline, training_pipeline
from ipu_options.popvision import PhaseTimer, profiling_environment
from planner.flags import TrainPlanSettings
from qa.families import refuse_early
from qa.settings import parse_train
from runtime import processes
from runtime.errors import counted, keep_running_without_reader, run_script


def main(argv=None):
    """Run the command line `argv`, by default the process's own; returns the exit status."""
    settings, ipu_config, planning = parse_train(argv, TrainPlanSettings)
    if planning.plan:
        from planner.commands import show_plan
        return show_plan(settings, ipu_config, planning)
    planning.refuse_without_plan(settings)
    processes.join(settings, ipu_config)
    profiling_environment(settings, ipu_config, "training", "inference")
    keep_running_without_reader()
    refuse_early(settings)
    from qa.run.log import RunLog
    from runtime.signals import StopSignals, output_lock
    with output_lock(settings.output_dir), StopSignals() as stop, \
            PhaseTimer("train", settings) as timer, RunLog(settings) as log:
        return fine_tune(settings, ipu_config, stop, timer, log)


def fine_tune(settings, ipu_config, stop, timer, log):
    """Train, evaluate and save one model; returns the exit status.

    stop: signals that ask it to save and end.  timer: times its phases.  log: its log.jsonl.
    """
    # 0. Imports: here, because a process of the data loader imports this file and needs none.
    from transformers import set_seed

    from ipu_options import device, poptorch
    from ipu_options.options import attach, compile_model, describe_poptorch, training_options
    from qa.answers.evaluation import Evaluation
    from qa.data.demo import use_demo_data
    from qa.data.loader import first_batch, open_loader
    from qa.data.packing import with_packed_accumulation
    from qa.data.rows import TrainingRows
    from qa.data.windows import load_questions
    from qa.families import row_kind
    from qa.model.optimizer import make_optimizer, make_schedule
    from qa.model.parallelize import parallelize, parameter_to_watch, weights_of
    from qa.model.pretrained import load_config, load_model, load_tokenizer, write_checkpoint_files
    from qa.run import hub
    from qa.run.checkpoint import Checkpoints, check_output_folder
    from qa.run.nonfinite import NonfiniteGuard
    from qa.run.progress import Progress, describe_compiled, describe_end, describe_rows, mean_loss
    from qa.run.state import TrainingState

    # 1. What is trained, and where: --layers_per_ipu becomes the layout, an IPU for each block.
    print(describe_poptorch(settings))
    check_output_folder(settings)
    hub.check_push(settings)
    settings = use_demo_data(settings)
    model_config = load_config(settings)
    tokenizer = load_tokenizer(settings, model_config)
    layers = model_config.num_hidden_layers
    pipeline = training_pipeline(ipu_config, layers, settings.pod_type) if settings.trains else None
    inference = inference_pipeline(ipu_config, layers, settings.pod_type)
    print((pipeline or inference).layout.table())

    # 2. Questions -> windows -> rows. With packed rows, an update takes fewer micro-batches.
    questions, *to_evaluate = load_questions(settings, tokenizer)
    evaluation = Evaluation(settings, model_config, inference, to_evaluate, timer, log)
    if not settings.trains:
        evaluation.finish(weights_of(load_model(settings, model_config)))
        hub.push(settings)
        return 0
    pipeline = with_packed_accumulation(pipeline, questions.windows.lengths, settings)
    rows = TrainingRows.of_run(settings, pipeline.config, row_kind(model_config), questions.windows)
    print(describe_rows(rows, len(questions.examples), settings, pipeline.config))

    # 3. From the beginning, or from a checkpoint of a run that was stopped.
    write_files = partial(write_checkpoint_files, tokenizer=tokenizer, ipu_config=ipu_config,
                          settings=settings)
    checkpoints = Checkpoints.of_run(settings, pipeline.config, rows, write_files, timer, log)
    saved = checkpoints.start_or_resume(settings)
    steps_done = saved.step if saved else 0
    rows = rows.starting_at(steps_done)
    log.begin(pipeline.config, rows, saved)

    # 4. The model on the IPUs: split into blocks, in its precision, compiled for a combined batch.
    set_seed(settings.seed)
    model = load_model(settings, model_config, saved and saved.folder).train()
    parallelize(model, pipeline.layout,
                recompute_checkpoint_every_layer=pipeline.config.recompute_checkpoint_every_layer,
                embedding_serialization_factor=pipeline.config.embedding_serialization_factor)
    if settings.precision == "float16":
        model.half()
    optimizer = make_optimizer(model, settings, pipeline.config)
    schedule = make_schedule(optimizer, settings, rows.total_steps, steps_done)
    options = training_options(pipeline.config, settings, seed=settings.seed,
                               watched=parameter_to_watch(model), watch=settings.watch_gradients)
    training_model = poptorch.trainingModel(model, options, optimizer)
    with timer("compile"):
        if settings.evaluates and not settings.synthetic_data:  # what does not fit is found early
            evaluation.compile(questions.windows)
        compile_model(training_model, first_batch(options, rows, settings.micro_batch_size))
    if settings.compile_only:
        print(describe_compiled(timer.total(), pipeline.config, settings))
        return 0
    state = TrainingState(model, optimizer, training_model)
    state.restore(saved)  # load_model has loaded the weights

    # 5. The loop. A step is one call of the device: one combined batch, device_iterations updates.
    def evaluate():
        return evaluation.validate(state.weights(), state.step, rows.epoch_after(state.step))

    guard = NonfiniteGuard(settings, checkpoints, state, options)
    progress = Progress(rows, settings, state, timer, log)
    loader = open_loader(options, rows, settings.micro_batch_size, settings.dataloader_num_workers)
    with stop.deferred(), loader as batches, progress:
        while state.step < rows.total_steps and not stop.requested:
            learning_rate = schedule.get_last_lr()[0]
            with timer("data"):
                batch = next(batches)  # the arguments of the model, which returns the loss
            with timer("step"):
                attach(training_model)  # again, after an evaluation
                losses = training_model(**batch)
                loss, windows = mean_loss(losses, batch["loss_weights"], pipeline.config)
            state.step += 1
            last = stop.poll() or state.step == rows.total_steps  # all processes know of a signal
            evaluating = progress.evaluation_is_due() and not stop.requested
            # While an IPU's evaluation runs, others may take the IPUs that the training gives up.
            saving = evaluating and device == "IPU" or (
                settings.save_steps and state.step % settings.save_steps == 0)
            # If a number is not finite, the guard puts the last checkpoint's weights back.
            if guard.check_or_go_back(loss, learning_rate,
                                      look_at_weights=saving or evaluating or last):
                state.add_loss(loss, windows)
            with timer("schedule"):
                schedule.step()
                training_model.setOptimizer(optimizer)  # before this, the device sees no change
            progress.update(learning_rate)
            if saving:
                checkpoints.save_or_warn(state)
            if evaluating:
                with stop.immediate():  # a signal ends the evaluation, and then the loop
                    checkpoints.save_if_best(state, evaluate())
        if settings.synthetic_data:
            print(f"timed on synthetic data: {counted(state.step, 'step')}; nothing was saved")
            return stop.exit_status
        if stop.poll():
            checkpoints.save_stopped(state, stop.requested)
            return stop.exit_status

    # 6. The end: the last model, or the best if asked for, is saved, evaluated and shared.
    step = checkpoints.load_best(state, evaluate)
    checkpoints.save_final(state)
    progress.write_summary()
    evaluation.finish(state.weights(), step, rows.epoch_after(step))
    print(describe_end(timer.total(), settings))
    hub.push(settings)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(processes.together(main)))
