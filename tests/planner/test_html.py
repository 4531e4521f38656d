"""--html: plans, searches, sweeps and comparisons as a page, in a real browser, without network."""
from __future__ import annotations

import json

import pytest

from planner.commands import main
from planner.sides import Side
from planner.text import SHORT
from planner.views import parts
from runtime.errors import UsageError
from tests.planner.test_compare import write_run
from tests.planner.test_planner import SMALL, no_calibration  # noqa: F401
from tests.web.test_ask import browser  # noqa: F401

pytestmark = pytest.mark.slow


def bars(browser, view):  # noqa: F811
    """Return the traces of the page's view of that name, as Plotly holds them."""
    return browser.execute_script(
        "return document.getElementById(arguments[0]).data"
        ".filter(trace => trace.type == 'bar').map("
        "trace => ({name: trace.name, x: Array.from(trace.x), y: trace.y}))", view)


def requests(browser):  # noqa: F811
    """Return the addresses that the browser has asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {entry["params"]["request"]["url"] for entry in messages
            if entry["method"] == "Network.requestWillBeSent"}


@pytest.mark.parametrize("command", ["plan", "search", "compare", "sweep"])
def test_a_page_shows_the_planned_figures_and_asks_no_one(
        command, tmp_path, capsys, browser):  # noqa: F811
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    assert main(["plan", *SMALL, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    if command == "compare":
        write_run(tmp_path / "run", "host")
        words = [" ".join(SMALL), str(tmp_path / "run")]
    elif command == "sweep":
        words = ["--layers_per_ipu", "1 1 1 2", "1 1 1 1", "--output", str(tmp_path / "sweep.csv"),
                 "--html", str(page), "--", *SMALL[:6], *SMALL[11:]]
    else:
        words = SMALL
    assert main([command, *words, *([] if "--" in words else ["--html", str(page)])]) == 0
    browser.get(page.as_uri())
    assert len(browser.find_elements("css selector", ".main-svg .bglayer")) >= 6
    buttons = browser.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map(button => button.outerHTML)")
    assert buttons and not any("Share" in button or "Cloud" in button for button in buttons)
    memory, where, stages, throughput = (
        bars(browser, view) for view in ("memory", "parts", "stages", "throughput"))
    shares = {trace["name"]: trace["x"][0] / 1e3 for trace in where}
    seconds = {SHORT.get(name, name): time for name, time in plan["update_parts_seconds"].items()}
    assert shares == pytest.approx({name: seconds[name] for name in shares})
    assert sum(shares.values()) == pytest.approx(plan["update_seconds"])
    weights = next(trace["x"] for trace in memory if trace["name"] == "weights")
    found = [round(size * 2**20) for size in weights]
    assert {ipu["weights_bytes"] for ipu in plan["ipus"]} <= set(found)
    assert throughput[0]["x"][0] == pytest.approx(plan["windows_per_second"])
    forward = next(trace["x"] for trace in stages if trace["name"] == "forward")
    assert forward[0] == pytest.approx(1e3 * plan["stages"][0]["forward_seconds"])
    splits = {"plan": " ", "search": "1: ", "compare": "A: 1 1 1 1", "sweep": "1: 1 1 1 1"}
    assert any(name.startswith(splits[command]) for name in throughput[0]["y"])
    if command == "compare":
        assert len(weights) == 2 * 4
        assert "windows/s, measured on a host without IPUs" in browser.page_source
        assert all(trace["name"] != "measured on IPUs" for trace in throughput)
    if command == "sweep":
        assert len(weights) == 4 and "refused: --layers_per_ipu 1 1 1 2" in browser.page_source
    addresses = requests(browser)
    assert addresses and all(url.startswith(("file:", "data:", "blob:")) for url in addresses)


@pytest.mark.parametrize("pod, hosts", [("pod4", 1), ("pod256", 4)])
def test_every_part_of_an_update_is_shown(pod, hosts):
    """Also what only several hosts have."""
    side = Side.from_flags("A", ["--config", "squad_large_384", "--pod_type", pod])
    seconds = {name: 1e3 * seconds for name, seconds in side.plan["update_parts_seconds"].items()
             if seconds}
    assert side.plan["hosts"] == hosts
    assert ("gradient reduction between hosts" in seconds) == (hosts > 1)
    (row,) = parts([side]).rows
    assert {piece.part: piece.length for piece in row.segments if piece.length} == seconds


def test_another_ending_is_refused(tmp_path):
    pytest.importorskip("plotly")
    table = tmp_path / "sweep.csv"
    for words in (["plan", *SMALL], ["sweep", "--micro_batch_size", "1", "--output", str(table)]):
        with pytest.raises(UsageError, match="--html page.txt: name a .html or .htm file"):
            main([*words, "--html", "page.txt"])
    assert not table.exists()  # nothing is measured first
