"""The page of infer.py --web: a text, a question, and the answer marked in the text."""
from __future__ import annotations

import base64
import queue
from concurrent.futures import Future
from typing import Any, Callable, Dict, Iterable, List, Optional

import flask
from dash import Input, Output, State, dcc, html

from qa.data.windows import FewQuestions, one_question
from qa.settings import InferSettings
from qa.web.server import new_page, serve
from runtime.errors import RunError, UsageError

NBEST = 5  # answers shown, unless --n_best says otherwise
_WIDE = {"width": "100%", "boxSizing": "border-box", "font": "inherit"}


def serve_answers(settings: InferSettings,
                  answer: Callable[[FewQuestions], Iterable[Dict[str, Any]]]) -> None:
    """Serve the page, and /api/answer for programs, until a signal ends the process.

    answer: of infer.py, a data set of questions -> their answers, as printed_answer gives them. It
    is called here, in the main thread, for all browsers, one question after the other: there is one
    device, and the loader's worker can be started from no other thread. The first question, which
    compiles the model, is asked before the page is there.
    """
    if "n_best" not in settings.sources:
        settings.n_best = NBEST
    questions: queue.Queue = queue.Queue()  # of (the data set of one, the Future of its answer)

    def ask(question: Any, context: Any) -> Dict[str, Any]:
        """Return the answer. Raises UsageError for a question or a text that is none."""
        for name, value in (("question", question), ("context", context)):
            if not isinstance(value, str) or not value.strip():
                raise UsageError(f"{name} is missing: give its text")
        # What a browser sends may hold half a character (a surrogate), which no tokenizer takes.
        texts = (value.encode("utf-8", "replace").decode("utf-8") for value in (question, context))
        future: Future = Future()
        questions.put((one_question(*texts), future))
        return future.result()

    list(answer(one_question("Ready?", "Ready.")))
    serve(_app(settings, ask), settings.host, settings.port)
    while True:
        asked, future = questions.get()
        try:
            future.set_result(list(answer(asked))[0])
        except Exception as error:
            future.set_exception(error)


def _app(settings: InferSettings, ask: Callable[[Any, Any], Dict[str, Any]]) -> Any:
    """Return the page and the interface for programs as one app."""
    app = new_page("Ask", html.Main([
        html.H1("Ask a text"),
        html.P(f"Model: {settings.checkpoint}"),
        html.Label("Text", htmlFor="context"),
        dcc.Textarea(id="context", value=settings.context or "", rows=5, style=_WIDE),
        dcc.Upload(html.Button("Open a text file"), id="file", accept="text/*"),
        html.Label("Question", htmlFor="question", style={"display": "block", "marginTop": "1em"}),
        dcc.Input(id="question", type="text", style=_WIDE, autoComplete="off"),
        html.Button("Ask", id="ask", style={"margin": "0.5em 0"}),
        dcc.Loading(html.Div(id="answer", role="status", **{"aria-live": "polite"}))],
        style={"maxWidth": "50em", "margin": "auto", "fontFamily": "sans-serif"}))

    @app.callback(Output("context", "value"), Input("file", "contents"), prevent_initial_call=True)
    def open_file(contents: str) -> str:
        return base64.b64decode(contents.partition(",")[2]).decode("utf-8", "replace")

    @app.callback(Output("answer", "children"), Input("ask", "n_clicks"),
                  Input("question", "n_submit"), State("question", "value"),
                  State("context", "value"), prevent_initial_call=True)
    def show_answer(clicks: Optional[int], submits: Optional[int], question: str,
                    context: str) -> List[Any]:
        try:
            return marked(ask(question, context), context)
        except (UsageError, RunError) as error:
            return [html.P(f"Error: {error}")]

    @app.server.route("/api/answer", methods=["POST"])
    def answer_program() -> Any:
        given = flask.request.get_json(silent=True)
        if not isinstance(given, dict):
            return {"error": 'send JSON: {"question": "...", "context": "..."}'}, 400
        try:
            return ask(given.get("question"), given.get("context"))
        except (UsageError, RunError) as error:
            return {"error": str(error)}, 400

    return app


def marked(answer: Dict[str, Any], context: str) -> List[Any]:
    """Return the elements that show an answer: itself, where it stands in the text, the n-best.

    answer: of `qa.answers.printing.printed_answer`.
    """
    start, end = (answer["start"], answer["end"]) if answer["answer"] else (0, 0)
    rows = [html.Tr([html.Td(entry["text"] or "(no answer)"),
                     html.Td(f"{entry['probability']:.3f}"),
                     html.Td(f"{entry['start']}-{entry['end']}" if entry["text"] else "")])
            for entry in answer["nbest"]]
    return [
        html.H2(answer["answer"] or "(no answer)", id="best"),
        html.P(f"probability {answer['score']:.3f}"),
        html.Div([context[:start], *([html.Mark(context[start:end], style={
            "fontWeight": "bold", "outline": "2px solid"})] if end else []), context[end:]],
            id="marked", style={"whiteSpace": "pre-wrap"}),
        html.Table([html.Caption("The best answers"),
                    html.Thead(html.Tr([html.Th(name, scope="col") for name in (
                        "answer", "probability", "characters")])), html.Tbody(rows)],
                   id="nbest", style={"marginTop": "1em", "textAlign": "left"})]
