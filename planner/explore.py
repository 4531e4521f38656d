"""The page of `python -m planner explore`: change a plan, and see at once what that does.

All state is in the browser: the values of the fields, and the flags of the pinned plan. What the
page shows is planned from flags, as `plan` does it from the same flags.
"""
from __future__ import annotations

import shlex
import threading
from dataclasses import fields
from functools import lru_cache
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from dash import ALL, Input, Output, State, ctx, dcc, html, set_props
from dash.exceptions import PreventUpdate

from ipu_options.config import POD_IPUS, IPUConfig, pod_of
from planner.advice import changes, describe
from planner.comparison import Side, comparison_text
from planner.flags import ExploreSettings, JobSettings
from planner.from_settings import planned, planned_name, pod_note
from planner.page import PLOT_CONFIG, timeline, views_of
from planner.plan import Plan
from planner.search import search, settings_of
from planner.sides import planned_side
from planner.text import heading, settings_text, throughput_text, value_text, verdict
from qa.settings import TrainSettings, parse_train
from qa.web.server import new_page, serve
from runtime.errors import RunError, UsageError
from runtime.files import writing

# The flags that have a field, and the field's label.
NUMBERS = {"micro_batch_size": "Micro-batch size",
           "gradient_accumulation_steps": "Accumulation",
           "replication_factor": "Replicas",
           "embedding_serialization_factor": "Embedding parts"}
TEXTS = {"layers_per_ipu": "Encoder layers on each IPU",
         "matmul_proportion": "Memory proportion of multiplications"}
SWITCHES = {"pack": "Pack several windows into a row",
            "recompute_checkpoint_every_layer": "Recompute layer by layer",
            "optimizer_state_offchip": "Optimizer state off chip"}
FIELDS = (*TEXTS, *NUMBERS, *SWITCHES, "ipu", "further")
VIEWS = ("timeline", "memory", "parts", "stages", "throughput")
COUNTED_AHEAD = (1, 2, 4, 8, 16)  # parts of the embedding; others take a moment once
# On a wide screen the fields stay in sight.
_STYLE = ("@media (min-width: 60em) {#controls {position: sticky; top: 0; align-self: flex-start;"
          " max-height: 100vh; overflow-y: auto}}")
_WRAPPED = {"whiteSpace": "pre-wrap", "overflowWrap": "anywhere", "userSelect": "all"}


class Planned(NamedTuple):
    """A plan and the settings that it is of."""

    words: List[str]
    settings: TrainSettings
    ipu_config: IPUConfig
    planning: JobSettings
    plan: Plan


def plan_of(words: Sequence[str]) -> Planned:
    """Return the plan of these flags. Raises UsageError or RunError where there is none."""
    try:
        settings, ipu_config, planning = parse_train(
            list(words), JobSettings, program="explore", description="")
    except SystemExit:
        raise UsageError("--help: `python train.py --help` lists the flags") from None
    return Planned(list(words), settings, ipu_config, planning,
                   planned(settings, ipu_config, planning))


def flags_of(words: Sequence[str]) -> Dict[str, List[str]]:
    """Return {name: values} of the flags in `words`. Raises UsageError for a value without flag."""
    found: Dict[str, List[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = values = [value] if equals else []
        elif not found:
            raise UsageError(f"{word}: flags begin with --")
        else:
            values.append(word)
    return found


def words_of(flags: Dict[str, List[str]]) -> List[str]:
    """Return {name: values} as words of a command line."""
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def values_of(made: Planned) -> Dict[str, str]:
    """Return the text of each field for a plan, with the split and by-pod values as they result."""
    job = made.plan.job
    known = {**made.settings.values(), **job.config.values(), **made.planning.values(),
             "layers_per_ipu": job.layout.layers_per_ipu(job.config.num_ipus())}
    return {name: value_text(known[name]) for name in FIELDS if name in known}


def with_values(base: Planned, values: Dict[str, Any]) -> List[str]:
    """Return the flags of `base` with those that the fields' `values` change, as words.

    Raises UsageError for further flags that are none, or that have a field.
    """
    given = {**base.settings.values(), **base.ipu_config.values(), **base.planning.values()}
    texts = {name: str("" if value is None else value) for name, value in values.items()}
    for name in SWITCHES:
        texts[name] = value_text(bool(values[name]) and values[name] != "false")
    try:
        further = flags_of(shlex.split(texts.pop("further", "")))
    except ValueError as error:
        raise UsageError(f"further flags: {error}") from error
    for name in set(further) & set(texts):
        raise UsageError(f"further flags: --{name} has a field of its own")
    changed = {name: text.split() for name, text in texts.items()
               if text.split() != value_text(given[name]).split()}
    return words_of({**flags_of(base.words), **changed, **further})


def filled(values: Dict[str, Any], flags: str) -> Dict[str, Any]:
    """Return the fields' `values` with some flags entered, each into its field or the further."""
    new = flags_of(flags.split())
    own = {name: " ".join(given or ["true"]) for name, given in new.items() if name in FIELDS}
    further = {**flags_of(shlex.split(values["further"] or "")),
               **{name: given for name, given in new.items() if name not in FIELDS}}
    return {**values, **{name: ["true"] * (text == "true") if name in SWITCHES else text
                         for name, text in own.items()}, "further": shlex.join(words_of(further))}


def found_flags(made: Planned, plan: Plan) -> str:
    """Return the flags that turn a plan into another one with the same model and data."""
    return settings_text(plan, settings_of(plan, made.ipu_config, plan.job.ipus), made.ipu_config)


def command(made: Planned, file: Optional[str] = None) -> str:
    """Return the command line that runs a plan; with `file`, its pipeline is read from there."""
    if made.planning.shape() or made.planning.config_json:
        return "(a model of given sizes has no checkpoint to train)"
    without = {f.name for f in fields(JobSettings)}
    flags = {**flags_of(made.words), **flags_of(found_flags(made, made.plan).split())}
    if file:
        without |= {f.name for f in fields(IPUConfig)}
        flags["ipu_config"] = [file]
    if made.plan.job.ipus > POD_IPUS[made.settings.pod_type]:
        flags["pod_type"] = [pod_of(made.plan.job.ipus)]
    return shlex.join(["python", "train.py", *words_of(
        {name: given for name, given in flags.items() if name not in without})])


def best(made: Planned) -> Plan:
    """Return the best plan on the pod, or on the IPUs that a plan takes if those are more."""
    ipus = max(POD_IPUS[pod_of(made.plan.job.ipus)], POD_IPUS[made.settings.pod_type])
    return search(made.plan.job, ipus, made.ipu_config, made.plan.efficiencies, 1)[0][0]


def save(made: Planned, file: str) -> str:
    """Write the pipeline of a plan to `file`, and return how to train with it.

    Raises RunError if it cannot be written.
    """
    found = settings_of(made.plan, made.ipu_config, made.plan.job.ipus)
    with writing(f"--write {file}"):
        found.write(file)
    return f"Wrote {file}. Train with it: {command(made, file)}"


def serve_planner(argv: List[str], exploring: ExploreSettings) -> None:
    """Serve the page until a signal ends the process. argv: the command's flags.

    Raises UsageError or RunError if they cannot be planned, or if the port cannot be had.
    """
    own = {f.name for f in fields(ExploreSettings)}
    base = plan_of(words_of({name: given for name, given in flags_of(argv).items()
                             if name not in own}))
    count_ahead(base)
    serve(make_app(base, exploring.write), "127.0.0.1", exploring.port)
    threading.Event().wait()


def count_ahead(base: Planned) -> None:
    """Count the model for what the fields may ask for, so that a change need not wait for it."""
    for pack in ("true", "false"):
        for parts in COUNTED_AHEAD:
            try:
                shown(plan_of([*base.words, "--pack", pack, "--embedding_serialization_factor",
                               str(parts)]))
            except UsageError:
                break  # of one's own data it is not known how well they pack


def make_app(base: Planned, file: str) -> Any:
    """Return the page. base: the plan to begin with. file: what Save writes."""
    app = new_page("Explore a plan", _layout(base), _STYLE, on_error=_show_error)
    inputs = {name: Input(name, "value") for name in FIELDS}

    @app.callback(
        output={**{name: Output(name, "children") for name in (
            "verdict", "error", "advice", "command", "text")},
            **{name: Output(name, "figure") for name in VIEWS},
            **{f"{name}-style": Output(name, "style") for name in VIEWS},
            "words": Output("words", "data")},
        inputs={"values": inputs, "pinned": Input("pinned", "data")})
    def show(values: Dict[str, Any], pinned: Optional[List[str]]) -> Dict[str, Any]:
        made = plan_of(with_values(base, values))
        parts = shown(made, pinned)
        styles = {f"{name}-style": _height(parts[name]) for name in VIEWS}
        return {**parts, **styles, "error": "", "words": made.words}

    @app.callback(Output("pinned-timeline", "figure"), Output("pinned-timeline", "style"),
                  Input("pinned", "data"))
    def show_pinned(words: Optional[List[str]]) -> Tuple[Any, Dict[str, Any]]:
        figure = pinned_plan(tuple(words))[1] if words else {}
        return figure, _height(figure) if figure else {"display": "none"}

    @app.callback(Output("moves", "children"), Input("layers_per_ipu", "value"),
                  State({"from": ALL, "to": ALL}, "id"))
    def offer_moves(layers: str, old: List[Any]) -> List[Any]:
        ipus = len(layers.split())
        if len(old) == 2 * (ipus - 1):
            raise PreventUpdate  # a button that was pressed keeps the keyboard's focus
        return _moves(ipus)

    _add_actions(app, base, file)
    return app


def _add_actions(app: Any, base: Planned, file: str) -> None:
    """Add what the buttons do. The arguments are those of `make_app`, and its page."""
    states = {name: State(name, "value") for name in FIELDS}
    into_fields = {name: Output(name, "value", allow_duplicate=True) for name in FIELDS}

    @app.callback(output=into_fields, inputs={
        "moves": Input({"from": ALL, "to": ALL}, "n_clicks"),
        "offers": Input({"flags": ALL}, "n_clicks"), "values": states}, prevent_initial_call=True)
    def enter(moves: Any, offers: Any, values: Dict[str, Any]) -> Dict[str, Any]:
        if not ctx.triggered[0]["value"]:
            raise PreventUpdate  # the button is new
        pressed = ctx.triggered_id
        if "flags" in pressed:
            return filled(values, pressed["flags"])
        return {**values, "layers_per_ipu": moved(values["layers_per_ipu"], pressed["from"],
                                                  pressed["to"])}

    @app.callback(output=into_fields, inputs={"clicks": Input("search", "n_clicks"),
                                              "values": states}, prevent_initial_call=True,
                  running=[(Output("search", "disabled"), True, False),
                           (Output("said", "children"), "Searching ...", "")])
    def fill_in_best(clicks: int, values: Dict[str, Any]) -> Dict[str, Any]:
        made = plan_of(with_values(base, values))
        return filled(values, found_flags(made, best(made)))

    @app.callback(Output("pinned", "data"), Input("pin", "n_clicks"), Input("unpin", "n_clicks"),
                  State("words", "data"), prevent_initial_call=True)
    def pin(pins: Any, unpins: Any, words: List[str]) -> Optional[List[str]]:
        return words if ctx.triggered_id == "pin" else None

    @app.callback(Output("said", "children", allow_duplicate=True), Input("save", "n_clicks"),
                  states, prevent_initial_call=True)
    def write_pipeline(clicks: int, values: Dict[str, Any]) -> str:
        return save(plan_of(with_values(base, values)), file)


def moved(layers_per_ipu: str, start: int, end: int) -> str:
    """Return a split with a layer moved from IPU `start` to IPU `end`. Raises UsageError."""
    layers = {place: int(text) for place, text in enumerate(layers_per_ipu.split())
              if text.isdigit()}
    if not layers.get(start) or end not in layers:
        raise UsageError(f"IPU {start} has no layer to move")
    layers[start] -= 1
    layers[end] += 1
    return value_text(list(layers.values()))


def shown(made: Planned, pinned: Optional[List[str]] = None) -> Dict[str, Any]:
    """Return what the page shows of a plan, by the id of its element. pinned: flags, or None."""
    plan = made.plan
    sides = [*([pinned_plan(tuple(pinned))[0]] if pinned else []), _side("now", made)]
    title, note = planned_name(made.settings, made.planning), pod_note(made.settings, plan.job)
    offers = changes(plan)[:4]
    return {
        "verdict": "\n".join([verdict(plan), throughput_text(plan), heading(plan, title),
                              *([note] if note else [])]),
        "text": comparison_text(sides), "command": command(made),
        "advice": [html.Li([describe(plan, change), " ", html.Button(
            "Try", id={"flags": change.flags}, **{"aria-label": f"Try {change.flags}"})])
                   for change in offers] or [html.Li("No single change of a setting " + (
                       "is faster and fits" if plan.fits else "makes it fit: search"))],
        **dict(zip(VIEWS, [timeline(plan), *views_of(sides)]))}


@lru_cache(maxsize=32)
def pinned_plan(words: Tuple[str, ...]) -> Tuple[Side, Any]:
    """Return the pinned plan of these flags as a side, and its timeline."""
    made = plan_of(words)
    drawn = timeline(made.plan)
    drawn["layout"]["title"]["text"] = "Pinned: " + drawn["layout"]["title"]["text"]
    return _side("pinned", made), drawn


def _side(name: str, made: Planned) -> Side:
    return planned_side(name, shlex.join(made.words), "flags", made.plan, made.settings,
                        made.planning)


def _height(figure: Dict[str, Any]) -> Dict[str, Any]:
    return {"height": figure["layout"]["height"]}


def _show_error(error: Exception) -> None:
    """Show why there is no plan; what was shown last stays."""
    kind = "Error" if isinstance(error, (UsageError, RunError)) else type(error).__name__
    set_props("error", {"children": f"{kind}: {' '.join(str(error).split())}"})


def _moves(ipus: int) -> List[Any]:
    """Return two buttons between neighbouring IPUs, each of which moves a layer."""
    parts: List[Any] = ["IPU\u00a00"]
    for ipu in range(1, ipus):
        parts += [html.Button(arrow, id={"from": start, "to": end}, style={"margin": "0 0.2em"}, **{
            "aria-label": f"Move a layer from IPU {start} to IPU {end}"})
            for start, end, arrow in ((ipu, ipu - 1, "\u25c0"), (ipu - 1, ipu, "\u25b6"))]
        parts.append(f"IPU\u00a0{ipu}")
    return parts


def _layout(base: Planned) -> Any:
    """Return the page's content."""
    values, block = values_of(base), {"display": "block", "marginTop": "0.6em"}

    def labelled(name: str, label: str, control: Any) -> Any:
        return html.Div([html.Label(label, htmlFor=name, style=block), control])

    def text(name: str, **options: Any) -> Any:
        return dcc.Input(id=name, value=values.get(name, ""), autoComplete="off",
                         style={"width": "100%", "boxSizing": "border-box"}, **options)

    controls = [
        labelled("layers_per_ipu", TEXTS["layers_per_ipu"], text("layers_per_ipu", debounce=0.5)),
        html.Div(id="moves", role="group", **{"aria-label": "Move layers"}),
        html.Div([labelled(name, label, text(name, type="number", step=1, debounce=0.3))
                  for name, label in NUMBERS.items()],
                 style={"display": "grid", "gridTemplateColumns": "1fr 1fr", "gap": "0 1em"}),
        labelled("matmul_proportion", TEXTS["matmul_proportion"],
                 text("matmul_proportion", debounce=0.5)),
        *(dcc.Checklist([{"label": label, "value": "true"}], ["true"] * (values[name] == "true"),
                        id=name, style=block) for name, label in SWITCHES.items()),
        html.Fieldset([html.Legend("IPU"), dcc.RadioItems(["mk2", "bow"], values["ipu"], id="ipu",
                                                          inline=True)], style=block),
        labelled("further", "Further flags (Enter)", text("further", debounce=True)),
        html.Div([html.Button(label, id=name, style={"marginRight": "0.5em"}) for name, label in (
            ("pin", "Pin this plan"), ("unpin", "Unpin"), ("search", "Search the best"),
            ("save", "Save"))], style=block),
        html.P(id="said", role="status", style=_WRAPPED),
        html.P(id="error", role="alert", style={"fontWeight": "bold"}),
        html.P(id="verdict", role="status", style={"whiteSpace": "pre-wrap"})]
    return html.Main([
        dcc.Store(id="words"), dcc.Store(id="pinned"),
        html.H1("Explore a plan"),
        html.Div([
            html.Div(controls, id="controls", style={"flex": "1 1 20em", "maxWidth": "28em"}),
            html.Div([
                html.H2("What would help most"), html.Ul(id="advice"),
                html.H2("Run it"), html.Pre(id="command", style=_WRAPPED),
                *(dcc.Graph(id=name, config={**PLOT_CONFIG, "displayModeBar": False},
                            style={"display": "none"})
                  for name in ("timeline", "pinned-timeline", *VIEWS[1:])),
                html.H2("In words and numbers"),
                html.Pre(id="text", tabIndex=0, style={"overflowX": "auto"})],
                style={"flex": "3 1 40em", "minWidth": 0})],
            style={"display": "flex", "flexWrap": "wrap", "gap": "2em"})],
        style={"fontFamily": "sans-serif", "margin": "1em"})
