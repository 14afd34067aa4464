"""The page of `zero serve`: nothing from elsewhere, text stays text, and a person can use it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_case import KEY, FakeGenerator, FakeTokenizer, Running, serving

from zero.generation import Limits

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & so on"


class TestWithoutABrowser:
    def test_only_its_own_style_and_script_may_run(self) -> None:
        with serving() as running:
            reply = running.get("/")
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in str(policy)
        for tag in ("style", "script"):
            [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
        assert reply.headers["x-content-type-options"] == "nosniff"

    def test_nothing_is_asked_for_from_elsewhere(self) -> None:
        with serving() as running:
            text = running.get("/").text
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'<>)]*", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, "a name of a format, never fetched"
        assert not re.findall(r"\b(?:src|href)=\"(?!data:)", text)
        assert not re.findall(r"\bon\w+=|style=|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)

    def test_every_control_has_a_name(self) -> None:
        with serving() as running:
            text = running.get("/").text
        for control in re.findall(r"<(?:textarea|input)\b[^>]*>", text):
            identity = re.search(r'id="([\w-]+)"', control)
            inside = re.search(r"<label>[^<]*" + re.escape(control), text)
            assert inside or (identity and f'for="{identity[1]}"' in text), control
        assert '<html lang="en">' in text


def _driver(folder: Path) -> Any:
    """Headless Chromium, or a skip that says what is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs a browser's driver: pip install selenium")
    browser, service = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or service is None:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={folder}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(service))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests."""
    driver = _driver(tmp_path_factory.mktemp("browser"))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page as a person has it."""

    def __init__(self, driver: Any, running: Running) -> None:
        self.driver = driver
        self.running = running
        driver.get(running.url + "/")

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))

    def wait(self, condition: Any, within_s: float = 10.0) -> None:
        end_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end_s, self.text("main")[-600:]
            time.sleep(0.02)

    def write(self, text: str) -> None:
        self.one("#prompt").clear()
        self.one("#prompt").send_keys(text)

    def generate(self) -> None:
        self.wait(lambda: self.one("#generate").is_enabled())
        self.one("#generate").click()

    def set_length(self, num_tokens: int) -> None:
        self.wait(lambda: self.one("#generate").is_enabled())
        self.driver.execute_script("document.querySelector('#length').value = arguments[0]", num_tokens)

    def is_done(self) -> bool:
        return not self.one("#stop").is_enabled()

    def complaints(self) -> list[str]:
        """What the browser has to say against the page."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def page_of(browser: Any, generator: FakeGenerator, tokenizer: Any = None, **settings: Any) -> Iterator[Page]:
    """The page of a service."""
    with serving(generator, tokenizer, **settings) as running:
        page = Page(browser, running)
        page.complaints()
        yield page
        browser.get("about:blank")


def generator(text: str, pass_s: float = 0.002) -> FakeGenerator:
    """Answers this, slowly enough to be watched."""
    made = FakeGenerator(Limits(max_rows=4, max_tokens=2048), pass_s)
    made.text = text
    return made


class TestInABrowser:
    def test_type_and_generate(self, browser: Any) -> None:
        with page_of(browser, generator(" The Nile." + "\n" * 50)) as page:
            page.write("Question: Which river is the longest?")
            page.generate()
            page.wait(lambda: page.text("#answer").strip() == "The Nile." and page.is_done())
            assert "Answer:" in page.one("#prompt").get_attribute("value"), "the reply's beginning is added"
            assert "ended by itself" in page.text("#speed")
            assert re.search(r"\d+ tokens, [\d.]+ tokens per second, first after [\d.]+ s", page.text("#speed"))
            assert page.text("#model") == "fake"
            assert page.complaints() == []
            page.one("#keep").click()
            assert page.one("#prompt").get_attribute("value").endswith("Answer: The Nile.\n\nQuestion: ")

    def test_stop_frees_the_row(self, browser: Any) -> None:
        with page_of(browser, generator("word " * 500, 0.02)) as page:
            page.one("input[value=write]").click()
            page.generate()
            page.wait(lambda: "word word" in page.text("#answer"))
            assert page.running.generator.statistics.num_rows == 1
            page.one("#stop").click()
            page.wait(page.is_done)
            assert page.running.is_free()
            assert "stopped" in page.text("#speed")
            page.one("#prompt").send_keys(" and then")
            page.driver.switch_to.active_element.send_keys("\ue009\ue007")  # Ctrl and Enter
            page.wait(lambda: "word word" in page.text("#answer"))
            page.driver.switch_to.active_element.send_keys("\ue00c")  # Escape
            page.wait(page.is_done)
            assert page.running.is_free()

    def test_script_in_prompt_and_answer_is_shown_as_text(self, browser: Any) -> None:
        with page_of(browser, generator(HOSTILE + "\n" * 400)) as page:
            page.one("input[value=translate]").click()
            page.write(HOSTILE)
            page.set_length(len(HOSTILE) + 1)
            page.generate()
            page.wait(lambda: page.is_done() and page.text("#answer").strip() == HOSTILE)
            assert page.driver.execute_script("return document.querySelectorAll('main script, main img').length") == 0
            assert page.driver.title != "taken"
        with page_of(browser, generator(HOSTILE), ChatTokenizer()) as page:
            page.wait(lambda: page.text("#prompt-label") == "Message")
            page.one("input[value=chat]").click()
            page.write(HOSTILE)
            page.set_length(len(HOSTILE))
            page.generate()
            page.wait(lambda: page.text("#turns") == HOSTILE * 2)
            assert page.driver.execute_script("return document.querySelectorAll('main script, main img').length") == 0
            assert page.driver.title != "taken"
            assert page.complaints() == []

    def test_a_key_is_asked_for(self, browser: Any) -> None:
        with page_of(browser, generator("yes" * 99), api_key=KEY) as page:
            page.wait(lambda: page.one("#key").is_displayed())
            page.one("#key").send_keys(KEY)
            page.one("#use-key").click()
            page.wait(lambda: not page.one("#key").is_displayed())
            page.generate()
            page.wait(lambda: page.is_done() and page.text("#answer").startswith("yesyes"))
            page.driver.execute_script("sessionStorage.clear()")

    def test_a_refusal_is_said(self, browser: Any) -> None:
        with page_of(browser, generator("yes" * 99), max_queue=0, max_body_bytes=3000) as page:
            page.wait(lambda: page.one("#generate").is_enabled())
            page.driver.execute_script("document.querySelector('#prompt').value = 'x'.repeat(4000)")
            page.generate()
            page.wait(lambda: "larger than 3000 bytes" in page.text("#trouble"))

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
    def test_it_fits(self, browser: Any, width: int, height: int, scheme: str, tmp_path: Path) -> None:
        """Nothing is wider than the window; the picture is for a person to look at."""
        with page_of(browser, generator(" It is the Nile, I believe." + "\n" * 50)) as page:
            _emulate(browser, width, height, scheme)
            page.generate()
            page.wait(lambda: page.is_done() and "Nile" in page.text("#answer"))
            widest = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert browser.execute_script(widest) <= 0
            picture = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", _WHOLE)["data"])
            (tmp_path / f"page-{width}-{scheme}.png").write_bytes(picture)
            assert len(picture) > 10_000


_WHOLE = {"format": "png", "captureBeyondViewport": True}


def _emulate(browser: Any, width: int, height: int, scheme: str) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


class ChatTokenizer(FakeTokenizer):
    """Of a model with a chat template."""

    chat_template = "a template"
