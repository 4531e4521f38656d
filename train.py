#!/usr/bin/env python3
"""Fine-tune RoBERTa for extractive question answering on Graphcore IPUs, or on this host where there is none.

    python train.py --config demo      a whole run in two minutes: its own data, tokenizer and model, nothing to download
    python train.py                    roberta-base on SQuAD v1 on 4 IPUs
    python train.py --plan             what that would take: memory, balance and speed, with no IPU booked

The job stands here from top to bottom: qa/ holds its parts, ipu_options/ says how it is mapped to IPUs. torch and all that
builds on it is imported after the flags are checked, so that --help and a refusal take no time.
"""
import math
import sys
import time
from dataclasses import asdict, replace
from functools import partial

from ipu_options.config import inference_pipeline, training_pipeline
from ipu_options.errors import RunError, run_script
from ipu_options.plan.flags import add_plan_flags, check_plan_flags
from ipu_options.popvision import Spans, profiling_environment
from qa.settings import MUST_MATCH, Parser, check_row_length, parse_train, write_qa_settings


def main():
    parser = Parser("train.py", "Fine-tune RoBERTa for extractive question answering on Graphcore IPUs, or on this host.")
    parser.add_argument("--plan", action="store_true", help="print what the run would take on IPUs, and do nothing else")
    add_plan_flags(parser)
    s, ipu_config, given = parse_train(parser=parser)
    check_plan_flags(given)
    if hasattr(given, "plan"):
        from qa.plan import show_plan
        return show_plan(s, ipu_config, given)
    for phase in ("training", "inference"):  # PopVision's environment must stand before PopTorch is imported
        profiling_environment(s.profile_dir, phase, {**asdict(s), **ipu_config.to_dict()})
    import torch

    from ipu_options import poptorch
    from qa.demo import use_demo_data
    from qa.hub import check_login
    from qa.model import load_config, load_tokenizer
    from qa.run import StopSignals, output_lock

    print(f"PopTorch: {poptorch.__name__} {poptorch.__version__}, torch {torch.__version__}")
    if s.push_to_hub:
        check_login(s.hub_token)
    s = use_demo_data(s) if s.demo_data else s
    config = load_config(s.model_name_or_path, s.hub_token)
    check_row_length(s, config)
    training = training_pipeline(ipu_config, config.num_hidden_layers, s.pod_type)
    inference = inference_pipeline(ipu_config, config.num_hidden_layers, s.pod_type)
    tokenizer = load_tokenizer(s.tokenizer_name or s.model_name_or_path, s.hub_token)
    with output_lock(s.output_dir), StopSignals() as stop, Spans("train", s.trace, s.profile_dir is not None) as spans:
        return fine_tune(s, ipu_config, config, tokenizer, training, inference, stop, spans)


def fine_tune(s, ipu_config, config, tokenizer, training, inference, stop, spans):
    from tqdm import tqdm
    from transformers import set_seed

    from ipu_options import poptorch
    from ipu_options.options import training_options, watched_gradient
    from qa import checkpoint, hub
    from qa.inference import InferencePipeline
    from qa.model import LAST_GRADIENT, RobertaForSpans, save_model, set_weights, weights_of
    from qa.optimizer import make_schedule
    from qa.report import describe_rows, log_line, show_predictions
    from qa.rows import TrainingRows, collate, packed_accumulation, windows_per_row
    from qa.run import explain_nonfinite, find_nonfinite, workers_ignore_interrupt, write_run_record
    from qa.training import evaluate_answers, model_and_optimizer, questions_and_windows

    begin = time.perf_counter()
    print(training.layout.table())
    examples, eval_examples, windows, eval_windows = questions_and_windows(s, tokenizer)

    # Windows -> rows. A packed row holds several, so fewer micro-batches give an update the windows it is meant to have.
    # The rows of the whole run, epoch after epoch, are one data set; a resumed run starts in the middle of it.
    room = s.max_windows_per_row if s.pack else 1
    accumulation = packed_accumulation(training.config.gradient_accumulation_steps, minimum=training.layout.min_gradient_accumulation(),
                                       windows_per_row=windows_per_row(windows.lengths, s.max_seq_length, room))
    ipu = replace(training.config, gradient_accumulation_steps=accumulation)
    plan = dict(row_length=s.max_seq_length, max_windows_per_row=room, pad_token_id=config.pad_token_id, seed=s.seed,
                micro_batch_size=s.micro_batch_size, micro_batches_per_update=accumulation * ipu.replication_factor,
                updates_per_step=ipu.device_iterations, epochs=s.num_train_epochs, max_steps=s.max_steps or -1)
    same = {**plan, "data": windows.fingerprint, **{name: getattr(s, name) for name in MUST_MATCH}}
    saved = checkpoint.open_run(s.output_dir, s.resume_from_checkpoint, s.overwrite_output_dir, same)
    step, losses = (saved.step, saved.progress["losses"]) if saved else (0, [])
    rows = TrainingRows(windows, **plan, first_step=step)
    print(describe_rows(rows, len(examples), s.micro_batch_size, ipu))
    write_run_record(s.output_dir, settings=asdict(s), ipu_config=ipu.to_dict(), data_fingerprint=windows.fingerprint,
                     resumed_from=str(saved.folder) if saved else None)

    # PopTorch: the annotated model, its options and optimizer, compiled for one combined batch.
    set_seed(s.seed)
    model, optimizer = model_and_optimizer(s, config, replace(training, config=ipu), saved)
    schedule = make_schedule(optimizer, s.lr_scheduler_type, int(s.warmup_ratio * rows.total_steps), rows.total_steps, step)
    options = training_options(ipu, seed=s.seed, watched=LAST_GRADIENT, watch=s.watch_gradients, compile_only=s.compile_only,
                               synthetic_data=s.synthetic_data, ipu_model=s.ipu_model, profile_dir=s.profile_dir)
    training_model = poptorch.trainingModel(model, options, optimizer)
    training_model.compile(**rows.__getitems__(range(rows.rows_per_step)))
    evaluation = InferencePipeline(RobertaForSpans(config), inference, s)
    if s.compile_only:
        evaluation.compile(eval_windows)
        print(f"compiled for an offline target in {time.perf_counter() - begin:.0f} s; nothing was run")
        return 0
    if saved:
        optimizer.load_state_dict(saved.optimizer)
        training_model.setOptimizer(optimizer)
        training_model.rng_state = saved.rng_state
        checkpoint.set_random_state(saved.random_state)

    def write_model(folder):
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        ipu_config.write(folder)
        write_qa_settings(s, folder)

    def save():
        with spans("save"):
            training_model.copyWeightsToHost()
            checkpoint.save_checkpoint(s.output_dir, step, write_model, optimizer=optimizer.state_dict(),
                                       rng_state=training_model.rng_state, save_total_limit=s.save_total_limit,
                                       progress={"must_match": same, "losses": losses[-200:]})

    def evaluate():
        with spans("evaluate"):
            if training_model.isAttachedToDevice():
                training_model.detachFromDevice()  # frees the IPUs and brings the weights to the host
            set_weights(evaluation.model, weights_of(model))
            return evaluate_answers(evaluation, eval_windows, eval_examples, s.output_dir, step, step / rows.steps_per_epoch)

    # The loop. A step is one call of the device: one combined batch, device_iterations weight updates.
    loader = None
    if step < rows.total_steps:  # a run killed after its last step has nothing left to load
        with workers_ignore_interrupt():
            loader = poptorch.DataLoader(options, rows, batch_size=s.micro_batch_size, collate_fn=collate,
                                         num_workers=s.dataloader_num_workers, mode=poptorch.DataLoaderMode.Async)
    batches = iter(loader or ())
    bar = tqdm(total=rows.total_steps, initial=step, desc="Training", unit="step", dynamic_ncols=True)
    losses_in_a_sum = accumulation * ipu.device_iterations if ipu.output_mode == "sum" else 1
    clock, seen, went_back, stopping = time.perf_counter(), 0, None, stop.requested
    while step < rows.total_steps and not stopping:
        learning_rate = schedule.get_last_lr()[0]
        with spans("data"):
            batch = next(batches)
        with spans("step"):
            loss = training_model(**batch).float().mean().item() / losses_in_a_sum
        seen += rows.windows_in_step(step)
        step += 1
        saving, stopping = s.save_steps and step % s.save_steps == 0, stop.requested
        bad_tensor = find_nonfinite(watched_gradient(options, training_model).items())
        if saving or stopping or step == rows.total_steps:  # what is saved is finite; reading weights costs a transfer from the device
            bad_tensor = bad_tensor or find_nonfinite(weights_of(model).items())
        if bad_tensor or not math.isfinite(loss):
            why = explain_nonfinite(step=step, loss=loss, earlier_losses=losses, learning_rate=learning_rate,
                                    loss_scaling=s.loss_scaling, precision=s.precision, bad_tensor=bad_tensor)
            if s.on_nonfinite == "stop" or went_back == step - 1:  # twice in a row is not one bad batch
                bar.close()
                raise RunError(why)
            back, went_back = checkpoint.go_back(s.output_dir, training_model, optimizer, partial(set_weights, model)), step
            tqdm.write(f"warning: {why}; going on from the weights of step {back.step}")
        else:
            losses.append(loss)
        with spans("schedule"):
            schedule.step()
            training_model.setOptimizer(optimizer)  # on the device nothing changes before this call
        bar.update()
        if step % s.logging_steps == 0 or step == rows.total_steps:
            speed, clock, seen = seen / (time.perf_counter() - clock), time.perf_counter(), 0
            tqdm.write(log_line(step, rows, losses[-s.logging_steps:], learning_rate, speed))
            bar.set_postfix_str(f"loss {loss:.3f}, learning rate {learning_rate:.3g}, {speed:.0f} windows/s")
        if saving:
            try:
                save()
            except RunError as error:  # a full disk may have room again at the next save
                tqdm.write(f"warning: {error}; the run goes on")
        if s.evaluate_every_epoch and step % rows.steps_per_epoch == 0 and step < rows.total_steps:
            evaluate()
    bar.close()
    if loader:
        loader.terminate()
    if stopping:
        save()
        print(f"stopped by {stopping.name} after step {step}; the same command with --resume_from_checkpoint auto goes on")
        return stop.exit_status

    with spans("save"):
        training_model.copyWeightsToHost()
        checkpoint.save_final(s.output_dir, write_model)
    predictions = evaluate()
    print(show_predictions(eval_examples, predictions, s.show_predictions, s.seed))
    print(f"saved to {s.output_dir} after {time.perf_counter() - begin:.0f} s; ask it: python infer.py --checkpoint {s.output_dir}")
    if s.push_to_hub:
        print(f"shared: {hub.push(s.output_dir, s.hub_model_id, s.hub_token, s.hub_private_repo)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
