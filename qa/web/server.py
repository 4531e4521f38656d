"""Serves a page made with Dash."""
from __future__ import annotations

import logging
import threading
from typing import Any

import dash
import flask
from werkzeug.sansio.utils import host_is_trusted
from werkzeug.serving import make_server

from qa.settings import listen

_THIS_MACHINE = ("127.0.0.1", "localhost")


def new_page(title: str, layout: Any, **options: Any) -> dash.Dash:
    """Return an app whose page asks nothing of any other machine. options: Dash's."""
    app = dash.Dash(__name__, title=title, update_title=None, serve_locally=True, **options)
    app.index_string = app.index_string.replace("<html>", '<html lang="en">')
    app.layout = layout
    return app


def serve(app: dash.Dash, host: str, port: int) -> None:
    """Serve `app` on host:port (0: any free port) in a thread that ends with the process.

    Prints the address. Raises UsageError if the port cannot be had.
    """
    # The name of another site may lead to 127.0.0.1, too (DNS rebinding).
    if host in _THIS_MACHINE:
        @app.server.before_request
        def refuse_other_names() -> None:
            if not host_is_trusted(flask.request.host, _THIS_MACHINE):
                flask.abort(400)

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # no line for each request
    with listen(host, port) as listener:
        server = make_server(host, port, app.server, threaded=True, fd=listener.fileno())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"ready: http://{host}:{server.port}/ (Ctrl-C ends it)", flush=True)
