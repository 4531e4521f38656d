"""The page of `python -m planner explore`: change a plan, and see at once what that does.

All state is in the browser: the values of the fields, which also stand in the page's address, and
the flags of the pinned plan as JSON. assets/ has the page's style and what the browser does itself.
"""
from __future__ import annotations

import json
import re
import shlex
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional
from urllib.parse import parse_qsl, urlencode

from dash import ALL, ClientsideFunction, Input, Output, State, ctx, dcc, html, set_props
from dash.exceptions import PreventUpdate

from ipu_options.config import POD_IPUS, pod_of
from planner.flags import ExploreSettings, JobSettings, Request, flags_text, value_text
from planner.from_settings import planned, request_of, run_command, write_pipeline
from planner.page import PLOT_CONFIG, figure
from planner.phase import INFERENCE, TRAINING, Phase
from planner.plan import Plan
from planner.search import search, settings_in
from planner.sides import Side
from planner.text import comparison_text, heading, verdict
from planner.views import views_of
from qa.settings import train_flags
from qa.web.server import new_page, serve
from runtime.errors import RunError, UsageError


class Form(NamedTuple):
    """The flags that have a field, and the field's label."""

    texts: Dict[str, str]
    numbers: Dict[str, str]
    switches: Dict[str, str]

    @property
    def names(self) -> List[str]:
        return [*self.texts, *self.numbers, *self.switches, "ipu", "further"]


_TEXTS = {"layers_per_ipu": "Encoder layers on each IPU",
          "matmul_proportion": "Memory proportion of multiplications"}
_NUMBERS = {"micro_batch_size": "Micro-batch size", "replication_factor": "Replicas",
            "embedding_serialization_factor": "Embedding parts"}
_PACK = {"pack": "Pack several windows into a row"}
FORMS = {
    TRAINING: Form(_TEXTS, {**_NUMBERS, "gradient_accumulation_steps": "Accumulation"}, {
        **_PACK, "recompute_checkpoint_every_layer": "Recompute layer by layer",
        "optimizer_state_offchip": "Optimizer state off chip"}),
    INFERENCE: Form(INFERENCE.flags(_TEXTS),
                    INFERENCE.flags({**_NUMBERS, "device_iterations": "Iterations"}), _PACK)}
VIEWS = ("timeline", "memory", "stages", "parts", "throughput", "split")
COUNTED_AHEAD = (1, 2, 4, 8, 16)  # parts of the embedding; others take a moment once


class Planned(NamedTuple):
    request: Request
    plan: Plan


def plan_of(flags: Dict[str, Any], phase: Phase) -> Planned:
    """Return the plan of these flags."""
    request = request_of(flags, phase)
    return Planned(request, planned(request))


def texts_of(base: Planned) -> Dict[str, str]:
    """Return the text of each field for a plan, with the split and by-pod values as they result."""
    job, request = base.plan.job, base.request
    known = {**request.settings.values(), **job.phase.flags(job.config.values()),
             **request.planning.values()}
    names = FORMS[job.phase].names
    return {**{name: value_text(known[name]) for name in names if name in known},
            "further": flags_text({name: value for name, value in request.flags.items()
                                   if name not in names})}


def with_fields(texts: Dict[str, Any], phase: Phase) -> Dict[str, Any]:
    """Return the flags that the fields stand for: the further ones, and what differs from these.

    texts: the fields' contents. Raises UsageError for further flags that are none or have a field.
    """
    form, further, known = FORMS[phase], _further(texts.get("further") or ""), {}
    for name in set(further) & set(form.names):
        raise UsageError(f"further flags: --{name} has a field of its own")
    with suppress(UsageError):  # flags that only go together with a field's
        known = {name: value for group in request_of(further)[:3]
                 for name, value in group.values().items()}
    values = {
        **{name: [_number(word) for word in str(texts[name] or "").split()] for name in form.texts},
        **{name: _number(texts[name]) for name in (*form.numbers, "ipu")},
        **{name: bool(texts[name]) for name in form.switches}}
    return {**further, **{name: value for name, value in values.items()
                          if name not in known or value not in (known[name], [known[name]])}}


def in_address(texts: Dict[str, Any], phase: Phase) -> str:
    """Return the fields' contents as the query of the page's address."""
    return "?" + urlencode({name: value_text(bool(text)) if name in FORMS[phase].switches else text
                            for name, text in texts.items()})


def from_address(query: str, texts: Dict[str, Any], phase: Phase) -> Dict[str, Any]:
    """Return the fields' contents with a query's in their place; other flags go to the further."""
    given, form = dict(parse_qsl(query[1:], keep_blank_values=True)), FORMS[phase]
    contents = {name: ["true"] * (given.pop(name) == "true") for name in form.switches
                if given.get(name) in ("true", "false")}
    contents.update({name: given.pop(name) for name in form.names
                     if name in given and name not in form.switches})
    further = [contents.get("further", texts["further"])]
    further += [f"--{name} {value}" for name, value in given.items()]
    return {**texts, **contents, "further": " ".join(further)}


@lru_cache(maxsize=32)
def _further(text: str) -> Dict[str, Any]:
    try:
        return train_flags(shlex.split(text), JobSettings, program="explore", description="")
    except ValueError as error:
        raise UsageError(f"further flags: {error}") from error
    except SystemExit:
        raise UsageError("--help: `python train.py --help` lists the flags") from None


def _number(word: Any) -> Any:
    # What is no number stays, to be refused by its flag.
    for kind in (int, float) if isinstance(word, str) else ():
        with suppress(ValueError):
            return kind(word)
    return word


def filled(texts: Dict[str, Any], flags: Dict[str, Any], phase: Phase) -> Dict[str, Any]:
    """Return the fields' contents with some flags entered, each into its field or the further."""
    form = FORMS[phase]
    further = {**_further(texts["further"] or ""),
               **{name: value for name, value in flags.items() if name not in form.names}}
    return {**texts, **{name: ["true"] * value if name in form.switches else value_text(value)
                        for name, value in flags.items() if name in form.names},
            "further": flags_text(further)}


def flags_of_best(base: Planned) -> Dict[str, Any]:
    """Return the flags of the best plan on the pod, or on as many IPUs as this one if more."""
    plan, config = base.plan, base.request.ipu_config
    ipus = max(POD_IPUS[pod_of(plan.job.ipus)], POD_IPUS[base.request.settings.pod_type])
    (best, *_), _ = search(plan, ipus, config, 1)
    return settings_in(best, config, best.job.ipus)


def serve_planner(request: Request, exploring: ExploreSettings) -> None:
    """Serve the page until a signal ends the process. request: of the plan to begin with."""
    base = Planned(request, planned(request))
    count_ahead(base)
    serve(make_app(base, exploring.write), "127.0.0.1", exploring.port)
    threading.Event().wait()


def count_ahead(base: Planned) -> None:
    """Count the model for what the fields may ask for: a change need not wait for it."""
    phase = base.request.phase
    for pack in (True, False):
        with suppress(UsageError):  # of one's own data it is not known how well they pack
            for parts in COUNTED_AHEAD:
                shown(plan_of({**base.request.flags, "pack": pack,
                               **phase.flags({"embedding_serialization_factor": parts})}, phase))


def make_app(base: Planned, file: str) -> Any:
    """Return the page. base: the plan to begin with. file: what Save writes."""
    phase = base.request.phase
    form = FORMS[phase]
    app = new_page("Explore a plan", _layout(base), on_error=lambda error: _show_error(error, form),
                   assets_folder=str(Path(__file__).with_name("assets")))
    inputs = {name: Input(name, "value") for name in form.names}

    @app.callback(
        output={**{name: Output(name, "children") for name in (
            "verdict", "heading", "error", "advice", "command", "text")},
            **{name: Output(name, "figure") for name in VIEWS},
            **{f"{name}-style": Output(name, "style") for name in VIEWS},
            "flags": Output("flags", "data"), "query": Output("query", "data")},
        inputs={"texts": inputs, "pinned": Input("pinned", "data")})
    def show(texts: Dict[str, Any], pinned: Optional[str]) -> Dict[str, Any]:
        now = plan_of(with_fields(texts, phase), phase)
        parts = shown(now, pinned)
        styles = {f"{name}-style": {"height": parts[name]["layout"]["height"]} for name in VIEWS}
        return {**parts, **styles, "error": "", "flags": json.dumps(now.request.flags),
                "query": in_address(texts, phase)}

    for function, *changed in (("share", Input("query", "data")),
                               ("copy", Input("copy", "n_clicks")),
                               ("mark", Input("error", "children"), State("error", "title"))):
        app.clientside_callback(ClientsideFunction("explore", function), *changed,
                                prevent_initial_call=True)

    @app.callback(Output("moves", "children"), Input(next(iter(form.texts)), "value"),
                  State({"from": ALL, "to": ALL}, "id"))
    def offer_moves(layers: str, old: List[Any]) -> List[Any]:
        ipus = len(layers.split())
        if len(old) == 2 * (ipus - 1):
            raise PreventUpdate  # a button that was pressed keeps the keyboard's focus
        return _moves(ipus)

    _add_actions(app, phase, file)
    return app


def _add_actions(app: Any, phase: Phase, file: str) -> None:
    """Add what the buttons do, and what the page's address says when it is opened."""
    names, layers = FORMS[phase].names, next(iter(FORMS[phase].texts))
    states = {name: State(name, "value") for name in names}
    into_fields = {name: Output(name, "value", allow_duplicate=True) for name in names}

    @app.callback(output=into_fields, inputs={
        "query": Input("address", "search"), "texts": states},
        prevent_initial_call="initial_duplicate")
    def open_address(query: Optional[str], texts: Dict[str, Any]) -> Dict[str, Any]:
        if not query:
            raise PreventUpdate
        return from_address(query, texts, phase)

    @app.callback(output=into_fields, inputs={
        "moves": Input({"from": ALL, "to": ALL}, "n_clicks"),
        "offers": Input({"flags": ALL}, "n_clicks"), "texts": states}, prevent_initial_call=True)
    def enter(moves: Any, offers: Any, texts: Dict[str, Any]) -> Dict[str, Any]:
        if not ctx.triggered[0]["value"]:
            raise PreventUpdate  # the button is new
        pressed = ctx.triggered_id
        if "flags" in pressed:
            return filled(texts, json.loads(pressed["flags"]), phase)
        return {**texts, layers: moved(texts[layers], pressed["from"], pressed["to"])}

    @app.callback(output=into_fields, inputs={"clicks": Input("search", "n_clicks"),
                                              "texts": states}, prevent_initial_call=True,
                  running=[(Output("search", "disabled"), True, False),
                           (Output("said", "children"), "Searching ...", "")])
    def fill_in_best(clicks: int, texts: Dict[str, Any]) -> Dict[str, Any]:
        now = plan_of(with_fields(texts, phase), phase)
        return filled(texts, flags_of_best(now), phase)

    @app.callback(Output("pinned", "data"), Input("pin", "n_clicks"), Input("unpin", "n_clicks"),
                  State("flags", "data"), prevent_initial_call=True)
    def pin(pins: Any, unpins: Any, flags: str) -> Optional[str]:
        return flags if ctx.triggered_id == "pin" else None

    @app.callback(Output("said", "children", allow_duplicate=True), Input("save", "n_clicks"),
                  states, prevent_initial_call=True)
    def save(clicks: int, texts: Dict[str, Any]) -> str:
        now = plan_of(with_fields(texts, phase), phase)
        return write_pipeline(now.plan, now.request, file)


def moved(layers_per_ipu: str, start: int, end: int) -> str:
    """Return a split with a layer moved from IPU `start` to IPU `end`. Raises UsageError."""
    layers = {place: int(text) for place, text in enumerate(layers_per_ipu.split())
              if text.isdigit()}
    if not layers.get(start) or end not in layers:
        raise UsageError(f"IPU {start} has no layer to move")
    layers[start] -= 1
    layers[end] += 1
    return value_text(list(layers.values()))


def shown(now: Planned, pinned: Optional[str] = None) -> Dict[str, Any]:
    """Return what the page shows of a plan, by the id of its element. pinned: flags as JSON."""
    sides = [pinned_side(pinned, now.request.phase), _side("now", now)] if pinned else [
        _side("", now)]
    plan, (fits, bound) = sides[-1].plan, verdict(sides[-1:])
    offers = [html.Li([change["text"], " ", html.Button(
        "Try", id={"flags": json.dumps(change["settings"])},
        **{"aria-label": f"Try {flags_text(change['settings'])}"})])
        for change in plan["suggestions"][:4]]
    return {
        "verdict": html.Span(fits, className="no" * (not plan["fits"])),
        "heading": "\n".join([bound, *(verdict(sides) if pinned else []), heading(plan)]),
        "text": comparison_text(sides), "command": run_command(now.plan, now.request),
        "advice": offers or [html.Li(plan["suggestion"])],
        **{view.name: figure(view) for view in views_of(sides, VIEWS)}}


@lru_cache(maxsize=32)
def pinned_side(flags: str, phase: Phase) -> Side:
    return _side("pinned", plan_of(json.loads(flags), phase))


def _side(name: str, now: Planned) -> Side:
    return Side.from_plan(name, now.plan, now.request, flags_text(now.request.flags))


def _show_error(error: Exception, form: Form) -> None:
    """Show why there is no plan, at the field that is named first; what was shown last stays."""
    kind = "Error" if isinstance(error, (UsageError, RunError)) else type(error).__name__
    text = " ".join(str(error).split())
    named = [name for name in re.findall(r"\w+", text) if name in form.names]
    set_props("error", {"children": f"{kind}: {text}", "title": (*named, "further")[0]})


def _moves(ipus: int) -> List[Any]:
    def button(arrow: str, start: int, end: int) -> Any:
        return html.Button(arrow, id={"from": start, "to": end}, **{
            "aria-label": f"Move a layer from IPU {start} to IPU {end}"})

    return ["IPU\u00a00", *(html.Span([
        button("\u25c0", ipu, ipu - 1), button("\u25b6", ipu - 1, ipu), f"IPU\u00a0{ipu}"],
        className="nowrap") for ipu in range(1, ipus))]


def _layout(base: Planned) -> Any:
    form, texts = FORMS[base.request.phase], texts_of(base)

    def labelled(name: str, label: str, kind: str = "", **options: Any) -> Any:
        field = dcc.Input(id=name, value=texts[name], autoComplete="off", **{
            "debounce": 0.5, "style": {"width": "100%", "boxSizing": "border-box"}, **options})
        return html.Div([html.Label(label, htmlFor=name), field], className=kind)

    (layers, layers_label), (matmul, matmul_label) = form.texts.items()
    controls = [
        labelled(layers, layers_label),
        html.Div(id="moves", role="group", **{"aria-label": "Move layers"}),
        *(labelled(name, label, "half", type="number", step=1, debounce=0.3)
          for name, label in form.numbers.items()),
        labelled(matmul, matmul_label),
        *(dcc.Checklist([{"label": label, "value": "true"}], ["true"] * (texts[name] == "true"),
                        id=name) for name, label in form.switches.items()),
        html.Fieldset([html.Legend("IPU"), dcc.RadioItems(["mk2", "bow"], texts["ipu"], id="ipu",
                                                          inline=True)]),
        labelled("further", "Further flags (Enter)", debounce=True),
        html.Div([html.Button(label, id=name) for name, label in (
            ("pin", "Pin this plan"), ("unpin", "Unpin"), ("search", "Search the best"),
            ("save", "Save"))]),
        html.P(id="said", role="status"), html.P(id="error", role="alert")]
    return html.Main([
        dcc.Location(id="address", refresh=False),
        *(dcc.Store(id=name) for name in ("flags", "pinned", "query")),
        html.H1("Explore a plan"), html.Div(controls, id="controls"),
        html.Div([
            html.P(id="verdict", role="status"), html.P(id="heading"),
            html.H2("What would help most"), html.Ul(id="advice"),
            html.H2(["Run it ", html.Button("Copy", id="copy")]), html.Pre(id="command"),
            *(dcc.Graph(id=name, config={**PLOT_CONFIG, "displayModeBar": False},
                        style={"display": "none"}) for name in VIEWS),
            html.H2("In words and numbers"), html.Pre(id="text", tabIndex=0)], id="effect")])
