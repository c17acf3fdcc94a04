"""The playground, in a headless Chromium. Skipped where there is none."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time

import pytest

from serve_apps.http.keys import Key

sync_api = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
PROMPT = "the quick größe 🙂 fox"


@pytest.fixture(scope="module")
def browser():
    sync_api.expect.set_options(timeout=20_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chatting(serving_echo, chat_folder):
    with serving_echo(chat_folder) as served:
        yield served


@pytest.fixture
def echoing(chatting):
    chatting.target.drafts, chatting.target.pause = True, 0.0
    return chatting


@pytest.fixture
def visit(browser):
    """Opens the page; nothing may go wrong in it, and it asks nobody else for anything."""
    with contextlib.ExitStack() as stack:

        def visit(served, *, expected=(), **settings):
            context = browser.new_context(**settings)
            stack.callback(context.close)
            page, wrong = context.new_page(), []
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
            page.on(
                "request",
                lambda asked: (
                    asked.url.startswith((served.url, "data:")) or wrong.append(asked.url)
                ),
            )
            page.goto(served.url)
            stack.callback(lambda: check(wrong, expected))
            return page

        def check(wrong, expected):
            found = [one for one in wrong if not any(word in one for word in expected)]
            assert found == []

        yield visit


@pytest.fixture
def page(visit, echoing):
    page = visit(echoing)
    sync_api.expect(page.locator("#served")).to_have_text("tiny")
    return page


def texts(page, kind):
    return page.locator(f"#output .{kind}").all_text_contents()


def ends(page, how="Done"):
    sync_api.expect(page.get_by_role("status")).to_have_text(re.compile(f"^{how}"))


def test_a_completion(page, echoing):
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.keyboard.press("Control+Enter")
    ends(page)
    output = page.locator("#output")
    assert output.text_content() == f"{PROMPT} {PROMPT}!"
    sync_api.expect(page.locator("#output .c")).to_have_text("the")
    drafted, chosen = texts(page, "d"), texts(page, "s")
    assert drafted and chosen and "!" in chosen[-1]
    assert all(one in f"{PROMPT}!" for one in drafted)
    tree = page.get_by_role("img", name=re.compile(r"\d+ guesses, \d+ of them right"))
    assert tree.locator("rect").count() == tree.locator("text").count() > 0
    page.locator("#output .d").first.hover()
    looked = page.get_by_role("region", name=re.compile(r"Round \d+ of \d+"))
    sync_api.expect(looked).to_contain_text("were right")
    page.get_by_label("Prompt", exact=True).hover()
    sync_api.expect(page.get_by_role("region", name="Last round")).to_be_visible()
    assert re.match(r"[\d.]+$", page.locator("#perround").text_content())
    assert "1 of them cached" in page.locator("#asked").text_content()
    assert page.locator("#state").text_content() == "100 B"
    length = len(echoing.target.jobs[-1].prompt) * 2
    assert page.locator("#cache").text_content() == f"{7 * length} B"
    job = echoing.target.jobs[-1]
    assert job.trees and job.max_tokens == 128 and job.sampling.temperature == 0.7


def test_the_text_is_the_next_prompt(page, echoing):
    page.get_by_label("Prompt", exact=True).fill("a b")
    page.get_by_role("button", name="Generate").click()
    ends(page)
    page.get_by_role("button", name="Continue").click()
    sync_api.expect(page.locator("#output")).to_have_text("a b a b! a b a b!!")


def test_what_is_set_is_asked_for(page, echoing):
    for label, value in {"Most tokens": "7", "Temperature": "0", "Top k, 0 for all": "3"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Stop before").fill("###")
    page.get_by_label("Drafts").select_option("none")
    page.get_by_label("Prompt", exact=True).fill("a")
    page.keyboard.press("Control+Enter")
    ends(page)
    job = echoing.target.jobs[-1]
    assert (job.max_tokens, job.stop, job.speculate) == (7, ("###",), "none")
    assert (job.sampling.temperature, job.sampling.top_k, job.sampling.seed) == (0, 3, 11)


def test_escape_stops(page, echoing):
    echoing.target.pause = 0.05
    ended = echoing.target.ended
    page.get_by_label("Prompt", exact=True).fill("w " * 500)
    page.keyboard.press("Control+Enter")
    page.locator("#output .s").first.wait_for()
    page.keyboard.press("Escape")
    ends(page, "Stopped")
    assert not page.locator("#error").is_visible()
    assert page.get_by_role("button", name="Generate").is_enabled()
    deadline = time.monotonic() + 20
    while echoing.target.ended == ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert echoing.target.ended == ended + 1


def test_a_chat(page, echoing):
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("System message").fill("be kind")
    for message in ("one", "two"):
        page.get_by_label("Message", exact=True).fill(message)
        page.keyboard.press("Control+Enter")
        ends(page)
        sync_api.expect(page.locator("#output .turn").last).to_contain_text("!")
    assert page.locator("#output .turn").count() == 4
    first = " system: be kind user: one assistant:!"
    whole = f"system: be kind\nuser: one\nassistant: {first}\nuser: two\nassistant:"
    assert echoing.tokenizer.decode(echoing.target.jobs[-1].prompt) == whole
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#output .turn").count() == 0


def test_a_model_without_a_template_has_no_chat(visit, serving_echo, folder):
    with serving_echo(folder) as served:
        page = visit(served)
        sync_api.expect(page.get_by_text("has no chat template")).to_be_visible()
        assert page.get_by_role("tab", name="Chat").is_disabled()


def test_what_goes_wrong_is_said(visit, echoing):
    page = visit(echoing, expected=("400", "500"))
    page.get_by_label("Temperature").fill("9")
    page.get_by_label("Prompt", exact=True).fill("a")
    page.keyboard.press("Control+Enter")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("temperature")
    page.get_by_label("Temperature").fill("1")
    page.get_by_label("Prompt", exact=True).fill("a fail b")
    page.keyboard.press("Control+Enter")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("internal error")
    assert page.locator("#output").text_content() == "a fail b a"


def test_keys(visit, serving_echo, folder):
    key = Key(name="alice", sha256=hashlib.sha256(b"secret").hexdigest())
    with serving_echo(folder, keys=(key,)) as served:
        page = visit(served, expected=("401",))
        sync_api.expect(page.get_by_role("alert")).to_contain_text("API key is missing")
        field = page.get_by_label("API key, if one is needed")
        sync_api.expect(field).to_be_focused()
        field.fill("secret")
        field.press("Tab")
        sync_api.expect(page.locator("#served")).to_have_text("tiny")
        assert not page.get_by_role("alert").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phones_and_the_dark(visit, echoing, scheme):
    phone = {"width": 360, "height": 740}
    page = visit(echoing, viewport=phone, color_scheme=scheme, has_touch=True)
    page.get_by_label("Prompt", exact=True).fill(f"{PROMPT} hippopotomonstrosesquippedaliophobia")
    page.get_by_role("button", name="Generate").tap()
    ends(page)
    tree = page.get_by_role("img", name=re.compile("guesses"))
    assert tree.bounding_box()["width"] > 360  # it scrolls in its own box
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    shades = page.evaluate(
        "['d', 's', 'c'].map(kind => getComputedStyle(document.querySelector('.legend .' + kind))"
        ".backgroundColor).concat(getComputedStyle(document.body).backgroundColor)"
    )
    assert len(set(shades)) == 4
    channels = [int(one) for one in re.findall(r"\d+", shades[-1])][:3]
    assert (max(channels) < 80) == (scheme == "dark")


def test_all_that_can_be_used_has_a_name(page):
    page.get_by_role("tab", name="Chat").click()
    names = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button, [role=region]')]"
        ".map(one => one.ariaLabel || one.labels?.[0]?.textContent.trim() || one.textContent.trim()"
        " || document.getElementById(one.getAttribute('aria-labelledby'))?.textContent)"
    )
    assert names and all(names)
