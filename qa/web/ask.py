"""The page of infer.py --web: a text, a question, and the answer marked in the text.

assets/ has its style.
"""
from __future__ import annotations

import base64
import json
import queue
from concurrent.futures import Future
from typing import Any, Callable, Dict, List, Optional

import flask
from dash import Input, Output, State, ctx, dcc, html, no_update

from qa.answers.answerer import Answerer, questions_about
from qa.answers.confidence import judgement
from qa.web.server import new_page, serve
from runtime.errors import RunError, UsageError

NBEST = 5  # answers shown, unless --n_best says otherwise
EXAMPLE = ("Ada was born in Oslo in 1888. She was afraid of geese. Her sister moved to Lisbon, "
           "where she played the tuba.", "What frightened Ada?")
SEND = ('send JSON by POST, with the header Content-Type: application/json: {"question": a text or '
        'a list of texts, "context": a text}, and "n_best" for the number of answers in each list')


def serve_answers(answerer: Answerer) -> None:
    """Serve the page, and /api/answer for programs, until a signal ends the process.

    The answerer is called here, in the main thread, one request after the other: there is one
    device, and the loader's worker can be started from no other thread.
    """
    settings, requests = answerer.settings, queue.Queue()

    def ask(question: Any, context: Any, n_best: Any = None) -> List[Dict[str, Any]]:
        if n_best is None:
            n_best = settings.n_best if "n_best" in settings.sources else NBEST
        answers: Future = Future()
        requests.put((questions_about(question, context), n_best, answers))
        return answers.result()

    answerer.ask("Ready?", "Ready.")  # compiles the model before the page is there
    serve(_app(settings.checkpoint, settings.context or "", ask), settings.host, settings.port)
    while True:
        questions, n_best, answers = requests.get()
        try:
            answers.set_result(list(answerer.answers(questions, n_best)))
        except Exception as error:
            answers.set_exception(error)


def _app(checkpoint: str, context: str, ask: Callable[..., List[Dict[str, Any]]]) -> Any:
    app = new_page("Ask", html.Main([
        html.H1("Ask a text"), html.P(f"Model: {checkpoint}"),
        html.Label("Text", htmlFor="context"),
        dcc.Textarea(id="context", value=context, rows=5),
        dcc.Upload(html.Button("Open a text file"), id="file", accept="text/*"),
        html.Label("Question", htmlFor="question"),
        dcc.Input(id="question", type="text", autoComplete="off"),
        html.Button("Ask", id="ask"), html.Button("Fill in an example", id="example"),
        html.Span(id="working", role="status"),
        html.Div(id="answer", role="status", **{"aria-live": "polite"})]))

    @app.callback(Output("context", "value"), Output("question", "value"),
                  Input("file", "contents"), Input("example", "n_clicks"),
                  prevent_initial_call=True)
    def fill_in(contents: Optional[str], clicks: Optional[int]) -> Any:
        if ctx.triggered_id == "example":
            return EXAMPLE
        data = base64.b64decode(contents.partition(",")[2])
        return data.decode(json.detect_encoding(data), "replace"), no_update

    @app.callback(Output("answer", "children"), Input("ask", "n_clicks"),
                  Input("question", "n_submit"), State("question", "value"),
                  State("context", "value"), prevent_initial_call=True,
                  running=[(Output("ask", "disabled"), True, False),
                           (Output("working", "children"), "Looking for the answer ...", "")])
    def show_answer(clicks: Optional[int], submits: Optional[int], question: str,
                    context: str) -> List[Any]:
        try:
            (answer,) = ask(question, context)
            return marked(answer, context)
        except (UsageError, RunError) as error:
            return [html.P(f"Error: {error}")]

    @app.server.route("/api/answer", methods=["POST", "GET", "PUT", "PATCH", "DELETE"])
    def answer_program() -> Any:
        if flask.request.method != "POST":
            return {"error": SEND}, 405, {"Allow": "POST"}
        try:
            body = flask.request.get_json(silent=True)
        except RecursionError:  # lists in lists in lists
            body = None
        if not isinstance(body, dict):
            return {"error": SEND}, 400
        try:
            answers = ask(body.get("question"), body.get("context"), body.get("n_best"))
        except (UsageError, RunError) as error:
            return {"error": str(error)}, 400
        return flask.jsonify(answers if isinstance(body["question"], list) else answers[0])

    return app


def marked(answer: Dict[str, Any], context: str) -> List[Any]:
    """Return the elements that show one of `Answerer.ask`'s answers, and where it stands."""
    start, end = (answer["start"], answer["end"]) if answer["answer"] else (0, 0)
    rows = [html.Tr([html.Td(entry["text"] or "(no answer)"),
                     html.Td(f"{entry['probability']:.3f}"),
                     html.Td(f"{entry['start']}-{entry['end']}" if entry["text"] else "")])
            for entry in answer["nbest"]]
    return [
        html.H2(answer["answer"] or "(no answer)", id="best"),
        html.P(judgement(answer) or f"score {answer['score']:.3f}", id="judgement"),
        html.Div([context[:start], *([html.Mark(context[start:end])] if end else []),
                  context[end:]], id="marked"),
        html.Table([html.Caption("The best answers"),
                    html.Thead(html.Tr([html.Th(name, scope="col") for name in (
                        "answer", "score", "characters")])), html.Tbody(rows)], id="nbest")]
