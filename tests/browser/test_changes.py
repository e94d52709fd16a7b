"""Changing analyzers from the dashboard: draining, weights, overrides, and who may."""

from __future__ import annotations

import pytest
from selenium_page import ELSEWHERE
from support import request, wait_until

TOKEN = "correct-horse-battery-staple"
ROW = "[data-analyzer={}]"


def drain(name):
    return f"{ROW.format(name)} .drain"


def wait_for_override(fastdist, name, override):
    wait_until(lambda: fastdist.analyzers()[name]["override"] == override, f"the override of {name} is {override}")


def test_draining_by_click_and_undoing_it(page, fastdist):
    page.open(fastdist.port)
    page.click(drain("A3"))
    fastdist.wait_for_state("A3", "draining")
    page.wait_for_state("A3", "draining")
    page.wait_for_text("#done", "A3 is draining")
    page.wait_for_text("#conditions", "A3 is draining. It gets no new packets.")
    # What an earlier test made its health check fail with may stand behind it.
    assert page.cells("A3")["State"].split()[0] == "Draining"
    assert "Override: draining" in page.cells("A3")["Share"]
    assert page.text(drain("A3")) == "Undrain"
    assert page.attribute("#banner", "data-level") == "ok", "draining is no fault"
    page.click(drain("A3"))
    fastdist.wait_for_state("A3", "online")
    page.wait_for_state("A3", "online")
    page.wait_for_text("#done", "A3 takes packets again")
    assert fastdist.analyzers()["A3"]["override"] is None


def test_a_change_that_is_refused_says_why(page, fastdist):
    page.forgiven = [r"/analyzers/A4 .* 422 "]
    for name in ("A1", "A2", "A3"):
        request(fastdist.port, "PATCH", f"/analyzers/{name}", b'{"state":"draining"}')
    page.open(fastdist.port)
    page.click(drain("A4"))
    page.wait_for_text("#failed", "A4 was not changed: nothing would be left to deliver to")
    assert fastdist.analyzers()["A4"]["state"] == "online"


def test_setting_a_weight(page, fastdist):
    page.open(fastdist.port)
    page.click(f"{ROW.format('A1')} .weight")
    assert page.text("#analyzer-title") == "A1"
    field = page.one("#weight")
    assert field.get_attribute("value") == "0.1"
    field.clear()
    field.send_keys("0.9")
    page.wait_for_text("#weight-share", "A target share of 50.0 %; it is 10.0 % now.")
    page.click("#weight-form [type=submit]")
    wait_for_override(fastdist, "A1", {"weight": 0.9})
    page.wait_for_text("#analyzer-done", "A1 has the weight 0.9 now.")
    page.wait_for_text("#analyzer-facts", "Override weight 0.9")
    page.click("#analyzer [data-close]")
    wait_until(lambda: page.cells("A1")["Weight"] == "0.9", "the row shows the new weight")
    assert " of 50.0 %" in page.cells("A1")["Share"]
    assert "Override: weight 0.9" in page.cells("A1")["Share"]
    page.click(f"{ROW.format('A1')} .override button")
    wait_for_override(fastdist, "A1", None)
    wait_until(lambda: page.cells("A1")["Weight"] == "0.1", "the row shows the configured weight")
    assert not page.one(f"{ROW.format('A1')} .override").is_displayed()


@pytest.mark.parametrize("text", ["", "-1"])
def test_what_is_no_weight_is_not_sent(page, fastdist, text):
    page.open(fastdist.port)
    page.click(f"{ROW.format('A1')} .weight")
    field = page.one("#weight")
    field.clear()
    field.send_keys(text)
    page.click("#weight-form [type=submit]")
    assert page.text("#weight-fault") == "A weight is a number, 0 or more."
    assert page.focused == "weight"
    assert fastdist.analyzers()["A1"]["override"] is None


def test_one_analyzer_closely(page, fastdist):
    page.open(fastdist.port)
    page.click(f"{ROW.format('A2')} .name")
    facts = page.wait_for_text("#analyzer-facts", "status 200")
    assert fastdist.analyzers()["A2"]["endpoint"] in facts
    assert "actual 0 %, target 40.0 %, now 40.0 %" in facts
    page.click("#analyzer-drain")
    fastdist.wait_for_state("A2", "draining")
    page.wait_for_text("#analyzer-state", "Draining")
    page.click("#analyzer-clear")
    fastdist.wait_for_state("A2", "online")
    page.wait_for_text("#analyzer-state", "Online")
    wait_until(lambda: not page.one("#analyzer-clear").is_displayed(), "there is no override left to remove")


def test_token_is_requested_when_needed(page, mocks, serve):
    page.forgiven = [r"/analyzers/\w+ .* 401 "]
    fastdist = serve(mocks, {"security": {"admin_tokens": [TOKEN]}})
    page.open(fastdist.port)
    assert not page.one("#forget-token").is_displayed()
    page.click(drain("A1"))
    wait_until(lambda: page.one("#token").is_displayed(), "the token is asked for")
    assert page.focused == "token-value"
    page.keys("wröng – indeed", "\n")
    page.wait_for_text("#token-fault", "The service does not know this token.")
    assert fastdist.analyzers()["A1"]["state"] == "online"
    page.keys(TOKEN, "\n")
    fastdist.wait_for_state("A1", "draining")
    wait_until(lambda: not page.one("#token").is_displayed(), "it is asked for no longer")
    page.wait_for_state("A1", "draining")
    page.click(drain("A1"))
    fastdist.wait_for_state("A1", "online")
    assert not page.one("#token").is_displayed(), "it is asked for once"
    # It is in this tab only, and no part of the page.
    assert page.run("return [localStorage.length, document.cookie, Object.values(sessionStorage)]") == [0, "", [TOKEN]]
    assert TOKEN not in page.driver.page_source
    assert page.one("#token-value").get_attribute("value") == ""
    page.wait_for_state("A1", "online")
    page.click("#forget-token")
    assert page.run("return sessionStorage.length") == 0
    page.click(drain("A1"))
    wait_until(lambda: page.one("#token").is_displayed(), "the token is asked for again")
    page.click("#token [data-close]")
    wait_until(lambda: not page.one("#token").is_displayed(), "no token is given")
    assert fastdist.analyzers()["A1"]["override"] is None
    assert TOKEN not in fastdist.output


def test_reason_is_shown_if_no_token_helps(page, fastdist):
    page.forgiven = [r"/analyzers/A1 .* 403 "]
    page.open(fastdist.port, ELSEWHERE)
    page.click(drain("A1"))
    page.wait_for_text("#failed", "open the dashboard as localhost")
    assert not page.one("#token").is_displayed()
    assert fastdist.analyzers()["A1"]["state"] == "online"


def test_a_name_of_this_machine_will_do(page, fastdist):
    page.open(fastdist.port, "localhost")
    page.click(drain("A1"))
    fastdist.wait_for_state("A1", "draining")
    page.wait_for_state("A1", "draining")
