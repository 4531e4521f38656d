"""infer.py --web: the page in a real browser, and the interface for programs."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from qa.answers.answerer import Answerer
from qa.data.demo import write_demo
from qa.settings import parse_infer
from runtime.errors import UsageError
from tests.end_to_end.test_train import fit
from tests.tools.kill_and_resume import ROOT

pytest.importorskip("dash")
from qa.web.ask import EXAMPLE  # noqa: E402  (needs dash)

pytestmark = pytest.mark.slow
TEXT = "Ada was born in Oslo in 1888. \U0001f9a2 She was afraid of geese."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    write_demo(folder / "data", seed=5, version_2_with_negative=True)
    assert fit(folder / "data", folder / "model", "--max_steps", "2", "--do_train",
               "--max_train_samples", "64", "--version_2_with_negative") == 0
    return folder / "model"


@pytest.fixture(scope="module")
def page(checkpoint):
    """The address of a running server, which ends as it does when its terminal is closed."""
    server = subprocess.Popen(
        [sys.executable, "infer.py", "--checkpoint", str(checkpoint), "--web", "--port", "0"],
        cwd=ROOT, stdout=subprocess.PIPE, universal_newlines=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"})
    address = re.search(r"ready: (http://127\.0\.0\.1:\d+/)", server.stdout.readline()).group(1)
    with server:
        yield address
        server.send_signal(signal.SIGHUP)
        try:
            assert server.wait(timeout=60) == 128 + signal.SIGHUP
        finally:
            server.kill()


@pytest.fixture
def browser():
    """Headless Chromium; without one the test is skipped."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium and chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking",
                 "disable-component-update", "disable-sync", "no-first-run"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.implicitly_wait(60)
    yield browser
    browser.quit()


def ask(page, body, method="POST", **headers):
    """Send to the interface for programs; returns (status, the JSON of the response)."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(page + "api/answer", body, {
        "Content-Type": "application/json", **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


def test_a_program_gets_what_the_command_line_prints(page, checkpoint, tmp_path):
    def command_line(context, question="What did she fear?"):
        (tmp_path / "text").write_text(context, encoding="utf-8")
        said = subprocess.run(
            [sys.executable, "infer.py", "--checkpoint", str(checkpoint), "--question", question,
             "--context_file", str(tmp_path / "text"), "--json", "--n_best", "5"], cwd=ROOT,
            stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
        return 200, json.loads(said)

    for context in (TEXT, TEXT * 300):
        assert ask(page, {"question": "What did she fear?", "context": context}) == command_line(
            context)
    questions = ["What did she fear?", "Who?"]
    status, answers = ask(page, {"question": questions, "context": TEXT, "n_best": 2})
    assert status == 200 and [answer["question"] for answer in answers] == questions
    assert all(len(answer["nbest"]) == 2 for answer in answers)
    _, alone = ask(page, {"question": "Who?", "context": TEXT, "n_best": 2})
    assert answers[1] == {**alone, "id": "1"}

    # What another program in Python gets is the same.
    answerer = Answerer.load(checkpoint)
    assert answerer.ask(questions, TEXT, n_best=2) == answers
    with pytest.raises(UsageError, match="n_bset: infer.py has no such setting .did you mean n_b"):
        Answerer.load(checkpoint, n_bset=3)


def test_programs_that_ask_at_once_get_each_their_own_answer(page):
    names = [f"Who is number {number}?" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: ask(page, {"question": name, "context": TEXT}), names))
    assert [answer["question"] for _, answer in answers] == names


def test_what_is_no_question_is_refused_and_the_server_goes_on(page):
    for body, why in (([], "send JSON"), ({"context": TEXT}, "question is missing"),
                      ({"question": "Who?", "context": " "}, "context is empty"),
                      ({"question": 7, "context": TEXT}, "question is a number: give one text"),
                      ({"question": [], "context": TEXT}, "question is an empty list"),
                      ({"question": ["Who?", ["Who?"]], "context": TEXT}, "question is a list"),
                      ({"question": "Who?", "context": [TEXT]}, "context is a list: give one text"),
                      ({"question": " ", "context": TEXT}, "question is empty"),
                      ({"question": "Who?", "context": {"a": TEXT}}, "context is an object"),
                      ({"question": "Who?", "context": TEXT, "n_best": "two"}, "n_best 'two'"),
                      ({"question": "Who?", "context": TEXT, "n_best": 0}, "at least 1"),
                      (b"[" * 100_000 + b"]" * 100_000, "send JSON"), (b"\xff", "send JSON"),
                      (b'{"question": ' + b"[" * 900 + b"]" * 900 + b', "context": "x"}', "")):
        status, answer = ask(page, body)
        assert status == 400 and why in answer["error"]
    for method in ("GET", "PUT", "DELETE"):
        status, answer = ask(page, b"", method)
        assert status == 405 and answer["error"].startswith("send JSON by POST")
    assert ask(page, {"question": "\ud800?", "context": "half \udc00 " + TEXT})[0] == 200
    # A site whose name leads to 127.0.0.1 is refused, see qa.web.server.serve.
    assert ask(page, {"question": "Who?", "context": TEXT}, Host="elsewhere.example")[0] == 400


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UsageError, match=f"--port {port}: cannot listen there .*another port"):
            parse_infer(["--checkpoint", str(checkpoint), "--web", "--port", port])
    for flags, message in ((["--port", "1234"], "--port 1234 does nothing without --web"),
                           (["--web", "--question", "Who?"], "exclude each other")):
        with pytest.raises(UsageError, match=message):
            parse_infer(["--checkpoint", str(checkpoint), *flags])


def test_a_browser_shows_the_answer_in_its_text_and_asks_no_other_machine(page, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page)
    browser.find_element(By.ID, "example").click()
    WebDriverWait(browser, 60).until(lambda _: browser.find_element(
        By.ID, "question").get_attribute("value") == EXAMPLE[1])
    assert browser.find_element(By.ID, "context").get_attribute("value") == EXAMPLE[0]
    for field in ("context", "question"):
        browser.find_element(By.ID, field).send_keys(Keys.CONTROL, "a", Keys.DELETE)
    browser.find_element(By.ID, "context").click()
    browser.execute_cdp_cmd("Input.insertText", {"text": TEXT})
    question = browser.find_element(By.ID, "question")
    for words, key in (("What did she fear?", Keys.ENTER), (" And who?", None)):
        question.send_keys(words, *filter(None, [key]))
        if key is None:
            browser.find_element(By.ID, "ask").click()
        asked = question.get_attribute("value")
        _, expected = ask(page, {"question": asked, "context": TEXT})
        shown = expected["answer"] or "(no answer)"
        WebDriverWait(browser, 60).until(
            lambda _: browser.find_element(By.ID, "best").text == shown
            and f"{expected['score']:.3f}" in browser.find_element(By.ID, "answer").text)
        assert browser.find_element(By.ID, "marked").text == TEXT
        marks = browser.execute_script(
            "return [...document.querySelectorAll('#marked mark')].map(m => m.textContent)")
        assert marks == [expected["answer"]] * bool(expected["answer"])
        rows = browser.find_elements(By.CSS_SELECTOR, "#nbest tbody tr")
        assert len(rows) == len(expected["nbest"]) == 5
        assert any("(no answer)" in row.text for row in rows) == any(
            not entry["text"] for entry in expected["nbest"])
    for field in ("context", "question"):
        assert browser.find_elements(By.CSS_SELECTOR, f"label[for={field}]")
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {entry["params"]["request"]["url"] for entry in requests
                 if entry["method"] == "Network.requestWillBeSent"}
    assert addresses and all(url.startswith((page, "data:")) for url in addresses), addresses
