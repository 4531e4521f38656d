"""Prints plans, comparisons and rankings for a terminal: the answer first, then the tables."""
from __future__ import annotations

import itertools
import textwrap
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from ipu_options.layout import in_ipus
from planner.confidence import CONFIDENCE, PUBLISHED_RMS
from planner.flags import value_text
from planner.from_settings import hosts_text
from planner.machine import MIB, Efficiencies
from planner.phase import PHASES
from planner.plan import Plan
from planner.search import best_plan, gain
from planner.sides import DEVICES, Side, differences, whole_plan
from planner.views import LEGEND, WORDS, View, count, duration, mib, percent, planned, views_of
from runtime.errors import UsageError, counted

SHORT, HEADINGS, GROUPS = (WORDS[name] for name in ("short", "headings", "groups"))
TIGHT = 0.05  # share of the memory that should stay free: the estimate is not better than this
WIDTH = 112
_signed = "{:+.1f} %".format
Ranking = Tuple[List[str], List[List[str]]]  # head and rows of a table


def comparison_text(sides: Sequence[Side]) -> str:
    """Return all that is known of `sides`, which may be one, as text."""
    alone = len(sides) == 1 and sides[0].plan
    names = ["memory", "stages", "parts", "profiled", "roofline"]
    if alone:
        sections = ["\n".join([*verdict(sides), *advice(alone), heading(alone)]), _blocks(alone)]
    else:
        names.append("throughput")
        titles = (line for side in sides for line in (side.label, side.note and f"   {side.note}"))
        sections = ["\n".join(lines) for lines in (verdict(sides), filter(None, titles))]
        sections.append(_differences(sides))
    sections += map(render, views_of(sides, names))
    return "\n\n".join(filter(None, sections))


def check_sides(sides: Sequence[Side]) -> None:
    """Raise UsageError for plans of training and of inference, and for a saved plan with holes."""
    for side in sides:
        if side.kind == "saved plan":
            with whole_plan(f"{side.name}, {side.item}: "):
                comparison_text([side])
    phases = {side.plan["phase"]: side for side in planned(sides)}
    if len(phases) > 1:
        raise UsageError(" and ".join(f"{side.name} is of {phase}" for phase, side in
                                      sorted(phases.items(), reverse=True)) +
                         ": compare plans of one kind (--inference plans all for inference)")


def render(view: View) -> str:
    if not any(row.group for row in view.rows):
        return f"{'. '.join(filter(None, (view.title, view.note)))}\n{_by_side(view)}"
    several = any(row.label for row in view.rows)
    names = view.parts()
    cells = list(dict.fromkeys(name for row in view.rows for name in row.cells))
    rows = []
    for row in view.rows:
        lengths = (sum(piece.length for piece in row.segments if piece.part == name)
                   for name in names)
        rows.append([row.group, *[row.label][:several],
                     *(f"{length:,.{view.digits}f}" for length in lengths),
                     *(row.cells.get(name, "") for name in cells)])
    inside = len(view.title) <= max(len(row[0]) for row in rows)  # the title is the first heading
    head = [view.title * inside, *[""][:several],
            *(SHORT.get(name, name) for name in names), *cells]
    lines = [*[view.title][inside:], table(head, rows, left=(0, 1) if several else (0,)), view.note]
    return "\n".join(filter(None, lines))


def _by_side(view: View) -> str:
    figures = list(dict.fromkeys(name for row in view.rows for name in row.cells))
    rows = [[SHORT.get(name, name), *(row.cells.get(name, "-") for row in view.rows)]
            for name in figures]
    if len(view.rows) > 1:
        return table(["", *(row.label for row in view.rows)], rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    columns = max(1, WIDTH // (sum(widths) + 6))
    height = -(-len(rows) // columns)
    cells = [f"  {name:<{widths[0]}}  {text:>{widths[1]}}" for name, text in rows]
    return "\n".join("  ".join(cells[line::height]) for line in range(height))


def profile_text(side: Side) -> str:
    """Return a profile beside the plan of its run. Raises UsageError if the IPUs differ."""
    ipus, of_plan = len(side.profile.total_bytes), len(side.plan["ipus"])
    if ipus != of_plan:
        raise UsageError(
            f"{side.item}: its replica has {in_ipus(ipus)}, the plan of these flags {of_plan} "
            f"(--layers_per_ipu {value_text(side.plan['layers_per_ipu'])}): give the flags that "
            "the profiled run was started with; framework.json beside the profile has them")
    return "\n\n".join(map(render, views_of([side], ("memory", "profiled"))))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a text table; headings may have several lines. left: columns aligned to the left."""
    titles = [cell.split("\n") for cell in head]
    height = max(map(len, titles))
    heads = zip(*([""] * (height - len(title)) + title for title in titles))
    cells = [list(map(str, row)) for row in [*heads, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  " + "  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                              for i, (cell, width) in enumerate(zip(row, widths))).rstrip()
             for row in cells]
    lines.insert(height, "  " + "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def verdict(sides: Sequence[Side]) -> List[str]:
    """Return the answer in sentences, the most important one first."""
    plans = planned(sides)
    if len(sides) == 1:
        return [fits_line(plans[0].plan), bound_line(plans[0].plan)] if plans else []
    lines = _winner(plans) if len(plans) > 1 else []
    for device, where in DEVICES.items():
        runs = sorted((side for side in sides if side.measured_on(device)),
                      key=lambda side: -side.measured_on(device))
        if len(runs) > 1:
            lines.append(f"Measured on {where}: " + ", ".join(
                f"{run.name} {count(run.measured_on(device))} windows/s" +
                (f" and F1 {run.measured['f1']:.2f} %" if "f1" in run.measured else "")
                for run in runs) + f"; {runs[0].name} is " + _faster(
                    runs[0].measured_on(device), runs[1].measured_on(device)) + ".")
    return lines


def fits_line(plan: Dict[str, Any]) -> str:
    """Return windows/s with their range, and the margin of memory or why a plan does not fit."""
    rows = plan["windows_per_row"] > 1
    speed = (f"{count(plan['windows_per_second'])} windows/s"
             f"{' in ' + count(plan['rows_per_second']) + ' rows/s' if rows else ''} "
             f"({percent(plan['confidence'])} sure: {count(plan['windows_per_second_low'])} to "
             f"{count(plan['windows_per_second_high'])}) on "
             f"{counted(plan['ipus_in_all'], plan['machine'] + ' IPU')}")
    if not plan["fits"]:
        return f"Does not fit: {'; '.join(plan['why_not'])}. If it did: {speed}."
    share = plan["free_bytes"] / plan["ipus"][0]["limit_bytes"]
    tight = "" if share >= TIGHT else f"; less than {percent(TIGHT)} is tight for an estimate"
    return (f"{speed}. Fits, with a margin of {mib(plan['free_bytes'])} MiB ({percent(share)}) on "
            f"IPU {plan['fullest_ipu']}, the fullest{tight}.")


def bound_line(plan: Dict[str, Any]) -> str:
    """Return what bounds a plan and what moves it."""
    lever = (f"{plan['lever'].partition(' (')[0]} lowers it by "
             f"{percent(1 - plan['lever_seconds_share'])}" if plan["lever"] else
             "no single change lowers it")
    return (f"Bound by {GROUPS[plan['bound']]}, {percent(plan['bound_share'])} of the time, at "
            f"{percent(plan['peak_share'])} of the peak rate: {lever}.")


def advice(plan: Dict[str, Any]) -> List[str]:
    """Return the changes that would help most, a line each."""
    texts = [change["text"] for change in plan["suggestions"]][:4] or [plan["suggestion"]]
    return [("What would help most: " if not place else "          or, instead: ") + text
            for place, text in enumerate(texts)]


def _winner(plans: Sequence[Side]) -> List[str]:
    """Return which plan is the fastest that fits, by how much, through what, at what price."""
    ranked = sorted(plans, key=lambda side: (not side.plan["fits"],
                                             -side.plan["windows_per_second"]))
    (best, a), (other, b) = ((side.name, side.plan) for side in ranked[:2])
    if not a["fits"]:
        return ["None of these plans fits."]
    lines = [f"{best} is {_faster(a['windows_per_second'], b['windows_per_second'])} than {other}"
             f": {_through(a, b)}" if b["fits"] else f"{best} fits"]
    more = {ipu["ipu"]: ipu["total_bytes"] - was["total_bytes"]
            for ipu, was in zip(a["ipus"], b["ipus"])}
    most = max(more, key=more.get)
    if a["ipus_in_all"] != b["ipus_in_all"]:
        lines[0] += f"; it takes {a['ipus_in_all']} IPUs in place of {b['ipus_in_all']}"
    elif more[most] > 0:
        lines[0] += (f"; it needs {mib(more[most])} MiB more than {other} on IPU {most}, and "
                     f"leaves {mib(a['free_bytes'])} MiB free on IPU {a['fullest_ipu']}, its "
                     "fullest")
    lines[0] += "."
    lines += [f"{side.name} does not fit: {'; '.join(side.plan['why_not'])}."
              for side in plans if not side.plan["fits"]]
    return lines


def _faster(one: float, other: float) -> str:
    gain = one / other - 1
    return f"{percent(gain)} faster" if gain >= 0.005 else "no faster"


def _through(a: Dict[str, Any], b: Dict[str, Any]) -> str:
    """Return where plan `a` saves most of the time against `b`."""
    one, two = ({name: 1e6 * seconds / (plan["rows_per_update"] * plan["windows_per_row"])
                 for name, seconds in plan["group_seconds"].items()} for plan in (a, b))
    saved = {name: two[name] - one[name] for name in one}
    name = max(saved, key=saved.get)
    if all(a[same] == b[same] for same in ("micro_batch_size", "windows_per_row")) and (
            name not in ("update", "host")):
        loads = [1e3 * max(ipu["busy_seconds"] for ipu in plan["ipus"]) / plan["micro_batches"]
                 for plan in (a, b)]
        return f"its slowest IPU takes {loads[0]:.2f} against {loads[1]:.2f} ms a micro-batch"
    return f"{GROUPS[name]} takes {one[name]:.0f} against {two[name]:.0f} ms for 1,000 windows"


def heading(plan: Dict[str, Any]) -> str:
    """Return what a plan is of: model, IPUs, batch and the whole run."""
    phase, replicas = PHASES[plan["phase"]], plan["replication_factor"]
    training, packed = plan["phase"] == "training", plan["windows_per_row"] > 1
    batches = f"{phase.iterations} {plan['micro_batches']}"
    if training and plan["micro_batches"] != plan["gradient_accumulation_steps"]:
        batches += f" (of {plan['gradient_accumulation_steps']}, since rows are packed)"
    lines = [
        f"Plan{'' if training else ' of inference'}: {plan['title']}, length "
        f"{plan['max_seq_length']}, {plan['precision']}, {counted(replicas, 'replica')} "
        f"of {counted(plan['ipus_per_replica'], 'IPU')}; a {phase.round} "
        f"every {1e3 * plan['update_seconds']:.1f} ms",
        f"{'Global batch size' if training else 'Rows of a call'}: micro-batch "
        f"{plan['micro_batch_size']} x {batches} x replicas {replicas} = "
        f"{plan['rows_per_update']} rows" +
        (f" of {plan['windows_per_row']:.2f} windows" if packed else "")]
    if plan["run_seconds"] is not None:
        lines[1] += (f"; {_amount(plan)}: {duration(plan['run_seconds'])} "
                     f"(without compilation{' and evaluation' * training})")
    if not training:
        lines.append(
            f"One question in one row: {1e3 * plan['one_question_seconds']:.1f} ms, through the "
            "stages one after the other; no published run tells how good this is")
    return "\n".join(filter(None, [*lines, plan["pod_note"]]))


def _amount(plan: Dict[str, Any]) -> str:
    if plan["updates"] is not None:
        return counted(f"{plan['updates']:,}", "weight update")
    windows = counted(f"{plan['windows']:,}", "window")
    if plan["phase"] != "training":
        return windows
    return f"{counted(format(plan['epochs'], 'g'), 'epoch')} of {windows}"


def _blocks(plan: Dict[str, Any]) -> str:
    rows = []  # equal layers that follow each other are one
    for _, group in itertools.groupby(plan["blocks"], lambda block: {**block, "name": ""}):
        first, *others = group
        times = 1 + len(others)
        rows.append([first["name"] + "".join(f"-{block['name'].split()[-1]}"
                                             for block in others[-1:]),
                     str(first["ipu"]), count(times * first["parameters"]),
                     f"{times * first['forward_flops'] / 1e9:.2f}",
                     f"{times * first['saved_bytes'] / MIB:.1f}",
                     f"{first['output_bytes'] / MIB:.2f}"])
    return table(
        ["block", "IPU", "parameters", "forward GFLOP", "saved MiB", "output MiB"], rows)


def _differences(sides: Sequence[Side]) -> str:
    different = differences(sides)
    if not different:
        return "Settings that differ: none of those that are known"
    rows = [[name, *(value_text(values[side.name]) if side.name in values else "not known"
                     for side in sides)] for name, values in different.items()]
    return "Settings that differ\n" + table(["", *(side.name for side in sides)], rows)


def ranking(entries: Sequence[Tuple[str, Dict[str, Any], Dict[str, str]]]) -> Ranking:
    """Return a table of (name, {setting: value}, {figure: text}) without settings all share."""
    figures = list(dict.fromkeys(name for _, _, cells in entries for name in cells))
    names = [name for name in dict.fromkeys(name for _, values, _ in entries for name in values)
             if len({value_text(values.get(name, "")) for _, values, _ in entries}) > 1]
    plain = [name.replace("inference_", "").replace("eval_", "") for name in names]
    head = ["", *figures, *(HEADINGS.get(name) or "\n".join(
        textwrap.wrap(name.replace("_", " "), 13)) for name in plain)]
    return head, [[name, *(cells.get(figure, "") for figure in figures),
                   *(_short(values.get(setting, "")) for setting in names)]
                  for name, values, cells in entries]


def _short(value: Any) -> str:
    """Return a setting's value; equal ones that follow each other in a long list as "3x6"."""
    if not isinstance(value, list) or len(value) <= 4:
        return value_text(value)
    runs = [(one, len(list(same))) for one, same in itertools.groupby(value)]
    return " ".join(f"{one}x{times}" if times > 1 else f"{one}" for one, times in runs)


def search_text(sides: Sequence[Side], changes: Sequence[Dict[str, Any]], plans: Sequence[Plan],
                tried: int) -> Tuple[str, Ranking]:
    """Return the answer of a search as text, and its ranking.

    sides, plans, changes (flags): the settings as they are, then what was found, the best first.
    """
    now, best, job = sides[0].plan, sides[1].plan, plans[1].job
    what = "the weight updates" if job.training else f"all {now['windows']:,} windows"
    names = [name for name in dict.fromkeys(name for flags in changes for name in flags)
             if not (job.training and name.startswith("inference_"))]
    known = [{**side.settings, **job.phase.flags({**side.plan["ipu_config"], **{
        name: side.plan[name] for name in ("micro_batch_size", "pack")}})} for side in sides]
    settings = [{name: values[name] for name in names} for values in known]
    shared = {name: value for name, value in settings[1].items()
              if all(values[name] == value for values in settings[1:])}
    tries = f"{tried} settings, each with its best split"
    lines = [f"1 does {what} {gain(plans[1], plans[0]):.2f} times as fast as the settings now; it "
             f"is the best of {tries}." if plans[1] is not plans[0] else
             f"1 is the settings now: they are the fastest of {tries}.",
             fits_line(best), bound_line(best)]
    if now["ipus_in_all"] > best["ipus_in_all"]:
        lines.append(f"now takes {in_ipus(now['ipus_in_all'])}, more than the "
                     f"{best['ipus_in_all']} searched for: it is shown to compare with.")
    if not now["fits"]:
        lines.append(f"now does not fit: {'; '.join(now['why_not'])}.")
    lines += _replicas_note(plans[1])
    lines.append(now["packing_note"])
    if job.hosts > 1:
        lines.append(f"1 takes {hosts_text(job)}")
    lines.append("All have " + ", ".join(
        f"{name} {value_text(value)}" for name, value in shared.items()) + "." if shared else "")
    entries = []
    for side, values, one in zip(sides, settings, plans):
        plan = side.plan
        waits = plan["update_parts_seconds"]["waiting for the slowest IPU"]
        speed = plan["windows_per_second"]
        if not job.training:
            speed = plan["windows"] / plan["run_seconds"]
        cells = {"windows/s": count(speed), "times": f"{gain(one, plans[0]):.2f}",
                 **({} if job.training else {"whole\nrun": duration(plan["run_seconds"])}),
                 "waits": percent(waits / plan["update_seconds"]),
                 "free\nMiB": mib(plan["free_bytes"])}
        differing = {name: value for name, value in values.items() if name not in shared}
        entries.append((side.name, differing, cells))
    return "\n".join(filter(None, lines)), ranking(entries)


def _replicas_note(plan: Plan) -> List[str]:
    """Return why another number of replicas has another best split, if it has."""
    now = plan.job.config.replication_factor
    replicated = plan.job.changed(replication_factor=1 if now > 1 else 4)
    other = best_plan(replicated, plan.efficiencies) if plan.job.training else None
    if other is None or other.job.config.layers_per_ipu == plan.job.config.layers_per_ipu:
        return []
    shares = [percent(one.weight_update_seconds / one.update_seconds) for one in (other, plan)]
    return [f"With a replication factor of {other.job.config.replication_factor} in place of {now} "
            f"the best split is {value_text(other.job.config.layers_per_ipu)}: the weight update, "
            "as long as the IPU with most parameters takes, is "
            f"{shares[0]} of the time in place of {shares[1]}."]


def legend(sides: Sequence[Side]) -> str:
    """Return what each column and bar means, and where a plan's numbers come from."""
    width = max(map(len, LEGEND))
    return "\n".join(["Legend", *(f"  {name:<{width}}  {text}" for name, text in LEGEND.items()),
                      *(_provenance(side.plan["efficiencies"]) for side in planned(sides)[:1])])


def _provenance(efficiencies: Dict[str, Any]) -> str:
    e = Efficiencies(**efficiencies)
    errors = " and ".join(percent(error, 1) for error in PUBLISHED_RMS)
    return "\n".join([
        "Counted from the model: parameters, FLOPs, elements, saved and output bytes. Documented: "
        "clock, peak, memory, links.",
        f"Estimated: code {mib(e.code_bytes)} MiB. Fitted ({e.source}): "
        f"{percent(e.peak_utilisation, 1)} of the peak rate at most,",
        f"{e.matmul_cycles:,.0f} cycles around each multiplication, {e.element_cycles:.2f} for "
        f"each other element, {1e3 * e.call_seconds:.0f} ms of host a call and "
        f"{1e9 * e.token_seconds:.0f} ns a token.",
        f"Against the published runs, the defaults are {errors} off (rms), as fitted and in "
        "cross-validation (`calibrate --show`)."])


def fit_text(records: Sequence[Dict[str, Any]], efficiencies: Efficiencies) -> str:
    """Return the table of published runs and predictions that `calibrate.compare` returns."""
    body = []
    for record in records:
        errors = [_signed(record["error_percent"]) if record["use"] == "measured" else "-",
                  _signed(record["cross_validated_error_percent"]),
                  f"{record['expected_low_percent']:+.0f} to "
                  f"{record['expected_high_percent']:+.0f} %" + " OUT" * (
                      not record["within_expected"])] if "error_percent" in record else ["-"] * 3
        published = record["published_rows_per_second"]
        body.append([record["name"], record["machine"], record["use"],
                     count(published) if published else "-",
                     count(record["planned_rows_per_second"]), *errors,
                     ("yes" if record["planned_fits"] else "no") + " WRONG" * (
                         not record["right"])])
    measured, held = ([record for record in records if record["use"] == use]
                      for use in ("measured", "held"))
    return "\n".join([
        f"Published runs (efficiencies: {efficiencies.source})",
        table(["run", "IPU", "use", "published\nrows/s", "planned\nrows/s", "error",
               "cross-\nvalidated", "expected\nwithin", "fits"], body),
        table(["", "runs", "rms", "at most", "cross-\nvalidated\nrms", "at most", "within"],
              [_measured_row(machine, [run for run in measured if machine in (
                  "both", run["machine"])]) for machine in ("Mk2", "Bow", "both")]),
        table(["held, by framework", "runs", "mean error", "from", "to", "within"],
              [_held_row(name, [run for run in held if run["framework"] == name])
               for name in dict.fromkeys(run["framework"] for run in held)]),
        f"verdicts: {sum(record['right'] for record in records)} of {len(records)} right",
        "measured: the efficiencies are fitted to it. cross-validated: the error if no run of the "
        "same publisher takes part in the fit;",
        f"the range is the one that such a plan expects in {percent(CONFIDENCE)} of all cases. "
        "held: not fitted, and its error a prediction. at least: the",
        "published time holds compilation and evaluation. fits, does not fit: published without a "
        "throughput. Sources: planner/published_runs.json."])


def _held_row(framework: str, runs: Sequence[Dict[str, Any]]) -> List[str]:
    errors = [run["error_percent"] for run in runs]
    return [framework, str(len(runs)),
            *map(_signed, (sum(errors) / len(errors), min(errors), max(errors))),
            str(sum(run["within_expected"] for run in runs))]


def _measured_row(machine: str, runs: Sequence[Dict[str, Any]]) -> List[str]:
    cells = []
    for name in ("error_percent", "cross_validated_error_percent"):
        errors = np.abs([run[name] for run in runs])
        cells += [f"{np.sqrt(np.mean(errors ** 2)):.1f} %", f"{errors.max():.1f} %"]
    return [machine, str(len(runs)), *cells, str(sum(run["within_expected"] for run in runs))]
