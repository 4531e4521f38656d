"""python -m planner explore: what its page computes, and the page in a real browser."""
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys

import pytest

import train
from planner import count
from planner.advice import changes
from planner.commands import DOES_NOT_FIT, main
from planner.flags import JobSettings, flag_words, flags_text
from planner.from_settings import run_command, write_pipeline
from planner.machine import MIB
from planner.phase import INFERENCE, TRAINING
from qa.settings import parse_train, train_flags
from runtime.errors import UsageError
from tests.planner.test_html import requests
from tests.planner.test_planner import SMALL, no_calibration  # noqa: F401
from tests.tools.kill_and_resume import ROOT
from tests.web.test_ask import browser  # noqa: F401

BASE = ["--config", "squad_base_384"]


@pytest.fixture(scope="module")
def explore():
    pytest.importorskip("dash")
    from planner import explore
    return explore


def printed(capsys, *words):
    """Return what a command of the planner prints as JSON."""
    capsys.readouterr()
    assert main([*words, "--json"]) in (0, DOES_NOT_FIT)
    return json.loads(capsys.readouterr().out)


def plan_of(explore, words):
    """Return the plan of the words of a command line, as the page begins with it."""
    return explore.plan_of(train_flags(words, JobSettings, program="", description=""), TRAINING)


def fields(explore, base, **changes):
    """Return the fields' contents as the browser sends them, with some of them changed."""
    texts = explore.texts_of(base)
    texts.update(changes, further=f"{texts['further']} {changes.get('further', '')}")
    return {**texts, **{name: texts[name] if isinstance(texts[name], list)
                        else ["true"] * (texts[name] == "true")
                        for name in explore.FORMS[TRAINING].switches}}


def changed(explore, base, **contents):
    """Return the plan after some fields have been changed."""
    texts = fields(explore, base, **contents)
    return explore.plan_of(explore.with_fields(texts, TRAINING), TRAINING)


def lengths(figure, name):
    """Return the lengths of a figure's bars of that name."""
    return [list(trace["x"]) for trace in figure["data"] if trace["name"] == name]


@pytest.mark.parametrize("changes, flags", [
    ({}, ""), ({"layers_per_ipu": "2 1 1"}, "--layers_per_ipu 2 1 1"),
    ({"micro_batch_size": 4, "gradient_accumulation_steps": 8, "replication_factor": 2,
      "ipu": "bow", "pack": ["true"]}, "--micro_batch_size 4 --gradient_accumulation_steps 8 "
     "--replication_factor 2 --ipu bow --pack"),
    ({"recompute_checkpoint_every_layer": [], "optimizer_state_offchip": ["true"],
      "embedding_serialization_factor": 16, "matmul_proportion": "0.1 0.2 0.3 0.4",
      "further": "--precision float32"}, "--recompute_checkpoint_every_layer false --precision "
     "float32 --optimizer_state_offchip true --embedding_serialization_factor 16 "
     "--matmul_proportion 0.1 0.2 0.3 0.4"),
    ({"micro_batch_size": 4000}, "--micro_batch_size 4000")])
def test_the_page_shows_what_plan_prints_for_the_same_flags(explore, changes, flags, capsys):
    base = plan_of(explore, SMALL)
    pin = json.dumps(base.request.flags)
    shown = explore.shown(changed(explore, base, **changes), pin)
    # --layers_per_ipu of SMALL ends with the next flag; a later one wins.
    plan, pinned = printed(capsys, "plan", *SMALL, *flags.split()), printed(capsys, "plan", *SMALL)
    for category in ("weights", "activations"):
        (bars,) = lengths(shown["memory"], category)
        both = [plan["ipus"], pinned["ipus"]]
        assert sorted(bars) == pytest.approx(sorted(
            ipu[f"{category}_bytes"] / MIB for ipus in both for ipu in ipus))
    for kind in ("forward", "backward"):
        (bars,) = lengths(shown["stages"], kind)
        assert sorted(bars) == pytest.approx(sorted(
            1e3 * stage[f"{kind}_seconds"] for stage in plan["stages"] + pinned["stages"]))
        (bars,) = lengths(shown["parts"], kind)
        assert bars == pytest.approx([1e3 * each["update_parts_seconds"][kind]
                                      for each in (pinned, plan)])
    assert lengths(shown["throughput"], "planned for IPUs")[0] == pytest.approx(
        [pinned["windows_per_second"], plan["windows_per_second"]])
    both = (("pinned", pinned), ("now", plan))
    ends = {}  # of the bars, by the name of the plan and the IPU
    for trace in shown["timeline"]["data"]:
        for *place, start, length in zip(*trace["y"], trace["base"], trace["x"]):
            ends[tuple(place)] = max(ends.get(tuple(place), 0.0), start + length)
    assert ends == pytest.approx({(name, f"IPU {ipu['ipu']}"): 1e3 * each["update_seconds"]
                                  for name, each in both for ipu in each["ipus"]})
    offers = [flags_text(json.loads(item.children[2].id["flags"]))
              for item in shown["advice"] if len(item.children) == 3]
    assert offers == [each["flags"].split(" (")[0] for each in plan["suggestions"][:4]]
    fits = shown["verdict"].children
    assert all(reason in fits for reason in plan["why_not"])
    assert ("Fits" if plan["fits"] else "Does not fit: IPU 0 is over by") in fits
    assert f"{plan['windows_per_second']:,.0f} windows/s (" in fits


@pytest.mark.slow
def test_inference_has_fields_of_its_own_and_is_planned_as_plan_does(explore, capsys):
    flags = train_flags(SMALL, JobSettings, program="", description="")
    base = explore.plan_of(flags, INFERENCE)
    with pytest.raises(UsageError, match="is not known: give --eval_windows"):
        explore.flags_of_best(base)
    texts = {**explore.texts_of(base), "pack": [],
             "inference_layers_per_ipu": "2 2", "eval_micro_batch_size": 3}
    texts["further"] += " --eval_windows 500"
    now = explore.plan_of(explore.with_fields(texts, INFERENCE), INFERENCE)
    plan = printed(capsys, "plan", "--inference", *SMALL, "--eval_windows", "500",
                   "--inference_layers_per_ipu", "2", "2", "--eval_micro_batch_size", "3")
    assert now.plan.windows_per_second == plan["windows_per_second"]
    best = explore.filled(texts, explore.flags_of_best(now), INFERENCE)
    now = explore.plan_of(explore.with_fields(best, INFERENCE), INFERENCE)
    assert now.plan.run_seconds <= plan["run_seconds"]
    assert explore._layout(now) and explore.shown(now)


@pytest.mark.slow
def test_a_change_waits_for_no_count_of_the_model(explore, monkeypatch):
    base = plan_of(explore, [*SMALL, "--intermediate_size", "96"])  # counted by no other test
    explore.count_ahead(base)
    monkeypatch.setattr(count, "count_model", None)
    for name, value in (("layers_per_ipu", "2 1 1"), ("micro_batch_size", 3), ("ipu", "bow"),
                        ("pack", ["true"]), ("embedding_serialization_factor", 4),
                        ("recompute_checkpoint_every_layer", [])):
        assert explore.shown(changed(explore, base, **{name: value}))["command"]
    with pytest.raises(TypeError):
        changed(explore, base, further="--max_seq_length 32")


@pytest.mark.parametrize("contents", [
    {"layers_per_ipu": "2 1 1", "pack": ["true"], "recompute_checkpoint_every_layer": []},
    {"further": "--label 'a & b=c?'"},  # what is wrong stays, to be told at its field
    {"layers_per_ipu": "x", "micro_batch_size": "y", "ipu": "z"}])
def test_the_address_of_the_page_holds_all_its_fields(explore, contents):
    texts = fields(explore, plan_of(explore, SMALL), **contents)
    others = fields(explore, plan_of(explore, BASE))
    found = explore.from_address(explore.in_address(texts, TRAINING) + "&seed=5", others, TRAINING)
    assert found == {**texts, "further": texts["further"] + " --seed 5"}
    with pytest.raises(UsageError, match="pack"):
        explore.with_fields(explore.from_address("?pack=maybe", others, TRAINING), TRAINING)


@pytest.mark.slow
def test_the_command_line_runs_what_is_shown_and_so_does_the_saved_file(
        explore, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = plan_of(explore, [*BASE, "--ipu", "bow"])
    made = changed(explore, base, layers_per_ipu="1 1 2 2 2 2 1 1", replication_factor=2,
                   gradient_accumulation_steps=64, further="--learning_rate 3e-5", pack=["true"])
    plan = printed(capsys, "plan", *flag_words(made.request.flags))
    said = write_pipeline(made.plan, made.request, "saved.json")
    for command in (run_command(made.plan, made.request), said.partition("Train with it: ")[2]):
        program, script, *words = shlex.split(command)
        assert (program, script) == ("python", "train.py") and "bow" not in words
        assert {"--pack", "--learning_rate", "--pod_type"} <= set(words)
        parse_train(words)  # a run takes them, for training and for the evaluation
        capsys.readouterr()
        assert train.main([*words, "--plan", "--json", "--ipu", "bow"]) == 0
        again = json.loads(capsys.readouterr().out)
        same = set(plan) - {"ipu_config", "pod_note"}
        assert {name: again[name] for name in same} == {name: plan[name] for name in same}
    assert "--layers_per_ipu" not in words and "--ipu_config" in words


@pytest.mark.slow
def test_the_best_and_what_would_help_are_entered_into_the_fields(explore, capsys):
    base = plan_of(explore, BASE)
    texts = fields(explore, base)

    def after(settings):
        """Return the plan with these settings entered into the fields."""
        filled = explore.filled(texts, settings, TRAINING)
        return explore.plan_of(explore.with_fields(filled, TRAINING), TRAINING)

    plan = printed(capsys, "plan", *BASE)
    for offer, change in zip(plan["suggestions"], changes(base.plan)):
        assert change.text == offer["flags"]
        assert after(change.flags).plan.windows_per_second == pytest.approx(
            offer["windows_per_second"])
    best, *_ = printed(capsys, "search", *BASE, "--keep", "1")
    found = after(explore.flags_of_best(base))
    # The search counts the head of rows that are not packed.
    assert found.plan.windows_per_second == pytest.approx(best["windows_per_second"], rel=1e-4)
    assert explore.texts_of(found)["layers_per_ipu"].split() == list(
        map(str, best["layers_per_ipu"]))


@pytest.mark.parametrize("changes, message", [
    ({"layers_per_ipu": "1 1 1 2"}, "adds up to 5 layers, but the model has 4: the sum must be 4"),
    ({"layers_per_ipu": ""}, "--layers_per_ipu is an empty list: give at least one value"),
    ({"layers_per_ipu": "\ud800"}, "it should be a whole number"),
    ({"micro_batch_size": None}, "--micro_batch_size has no value: give a whole number"),
    ({"gradient_accumulation_steps": 3}, "training over 4 pipeline stages needs at least 7"),
    ({"matmul_proportion": "0.1 0.2"}, "has 2 values"),
    ({"further": "--foo"}, "--foo: there is no such flag"),
    ({"further": "foo"}, "foo: there is no such flag"),
    ({"further": "--seed '"}, "further flags: No closing quotation"),
    ({"further": "--pack"}, "further flags: --pack has a field of its own"),
    ({"further": "--seed 1 -h"}, "--help: `python train.py --help`")])
def test_what_is_wrong_is_one_line_in_the_planners_words(explore, changes, message):
    base = plan_of(explore, SMALL)
    with pytest.raises(UsageError) as error:
        changed(explore, base, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_port_in_use_and_a_missing_package_are_one_line(monkeypatch):
    monkeypatch.setattr("qa.settings.find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UsageError, match=f"--port {port}: cannot listen there"):
            main(["explore", "--port", port])
    monkeypatch.setattr("qa.settings.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install -r requirements-pages.txt"):
        main(["explore"])


@pytest.fixture
def page(explore, tmp_path):
    """The address of a running page and the file that it saves; it ends as by Ctrl-C."""
    file = tmp_path / "saved.json"
    server = subprocess.Popen(
        [sys.executable, "-m", "planner", "explore", *SMALL, "--port", "0", "--write",
         str(file)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    address = re.search(r"ready: (http://127\.0\.0\.1:\d+/)", server.stdout.readline()).group(1)
    with server:
        yield address, file
        server.send_signal(signal.SIGINT)
        try:
            _, said = server.communicate(timeout=60)
        finally:
            server.kill()
        assert server.returncode == 128 + signal.SIGINT
        assert "Traceback" not in said


@pytest.mark.slow
def test_change_pin_search_and_save_in_a_browser(page, browser, capsys):  # noqa: F811
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    address, file = page

    def find(css):
        return browser.find_element("css selector", css)

    def wait_for(css, text):
        WebDriverWait(browser, 30).until(lambda _: text in find(css).text)

    def enter(name, text):
        find(f"#{name}").send_keys(Keys.CONTROL, "a")
        find(f"#{name}").send_keys(text, Keys.TAB)

    def press(css):
        browser.execute_script("arguments[0].scrollIntoView()", find(css))
        find(css).click()

    def speed(*flags):
        return f"{printed(capsys, 'plan', *SMALL, *flags)['windows_per_second']:,.0f} windows/s ("

    def bars(view):
        find(f"#{view} .bglayer")
        return browser.execute_script(
            "return document.querySelector('#' + arguments[0] + ' .js-plotly-plot').data"
            ".map(trace => trace.name)", view)

    browser.get(address)
    wait_for("#verdict", speed())
    assert set(bars("timeline")) >= {"forward", "backward"}
    for field in browser.find_elements("css selector", "input:not([type=radio], [type=checkbox])"):
        assert browser.find_elements("css selector", f"label[for={field.get_attribute('id')}]")

    press("#pin")
    wait_for("#timeline", "pinned")
    press("button[aria-label='Move a layer from IPU 1 to IPU 2']")
    wait_for("#error", "leaves IPU 1 without any block")
    assert find("[aria-invalid]").get_attribute("id") == "layers_per_ipu"
    below = find("#layers_per_ipu").rect
    assert 0 < find("#error").rect["y"] - below["y"] - below["height"] < below["height"]
    press("button[aria-label='Move a layer from IPU 2 to IPU 1']")
    WebDriverWait(browser, 30).until(lambda _: not find("#error").text)
    enter("layers_per_ipu", "2 1 1")
    wait_for("#verdict", speed("--layers_per_ipu", "2", "1", "1"))
    assert not find("#error").text
    # By keyboard alone: the button keeps the focus after it was pressed.
    find("button[aria-label='Move a layer from IPU 0 to IPU 1']").send_keys(Keys.ENTER)
    wait_for("#verdict", speed("--layers_per_ipu", "1", "2", "1"))
    assert browser.switch_to.active_element.get_attribute("aria-label") == (
        "Move a layer from IPU 0 to IPU 1")
    enter("micro_batch_size", "4")
    press("#pack label")
    wait_for("#verdict", speed("--layers_per_ipu", "1", "2", "1", "--micro_batch_size", "4",
                               "--pack"))
    assert "pinned" in find("#text").text and "--layers_per_ipu 1 2 1" in find("#text").text

    browser.get(browser.current_url)  # the address is that of this plan
    wait_for("#verdict", speed("--layers_per_ipu", "1", "2", "1", "--micro_batch_size", "4",
                               "--pack"))
    browser.get(f"{address}?matmul_proportion=2")
    wait_for("#error", "--matmul_proportion 2")
    assert find("[aria-invalid]").get_attribute("id") == "matmul_proportion"

    browser.switch_to.new_window("tab")  # as a second user
    browser.get(address)
    wait_for("#verdict", speed())
    assert "pinned" not in find("#timeline").text
    press("#search")
    best, *_ = printed(capsys, "search", *SMALL)
    wait_for("#verdict", f"{best['windows_per_second']:,.0f} windows/s (")
    press("#save")
    wait_for("#said", f"Wrote {file}")
    saved = printed(capsys, "plan", *SMALL[:6], *SMALL[11:], "--ipu_config", str(file),
                    "--micro_batch_size", str(best["micro_batch_size"]))
    assert saved["windows_per_second"] == best["windows_per_second"]
    assert all(url.startswith((address, "data:", "blob:")) for url in requests(browser))
