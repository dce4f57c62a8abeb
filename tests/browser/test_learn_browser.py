import re

import pytest
from dashboard import fits, is_dark, new_page, shows, wait_for


@pytest.fixture
def page(browser, address):
    opened = new_page(browser, viewport={"width": 1400, "height": 1600})
    opened.goto(f"{address}/learn")
    shows(opened, "Share and reproduce")
    opened.locator(".js-plotly-plot .gtitle").nth(10).wait_for()
    opened.wait_for_timeout(1500)
    yield opened
    assert opened.locator('[data-testid="stException"]').count() == 0
    opened.close()


def click(page, picture, mark):
    """Click the mark with this number in the picture whose title holds these words, clear of the bar at the bottom."""
    marks = page.locator(".js-plotly-plot").filter(has=page.locator(".gtitle", has_text=picture)).first
    spot = marks.locator("path.point, .bars .point path").nth(mark)
    spot.evaluate("e => e.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(500)
    box = spot.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


@pytest.mark.parametrize(
    ("picture", "mark", "says"),
    [
        ("Two inputs, 6 neurons", 3, "Neuron 3 is active"),
        ("neurons are kept", 1, "Neuron 1 is active"),
        ("The distance of neuron", 6 + 4, "The distance of neuron 4 from neuron 2 is 1.73"),
        ("The plan G", 6 + 2, "Neuron 2 is active"),
    ],
)
def test_clicking_a_mark_chooses_its_neuron(page, picture, mark, says):
    click(page, picture, mark)
    wait_for(page, ".gtitle", says)
    assert re.search(r"lesson_neuron=\d", page.url)


def test_dragging_a_weight_ends_where_the_hand_does(page):
    thumb = page.locator('[data-testid="stBottom"] [data-testid="stSlider"] div:has(> div > input)').nth(3)
    box = thumb.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(30):
        page.mouse.move(x - step, y)
        page.wait_for_timeout(40)
    page.mouse.up()
    page.wait_for_function("() => location.search.includes('lesson_changes=0.v1')")
    page.wait_for_timeout(2000)
    shown = page.locator('[data-testid="stBottom"] input[aria-label="v₁"]').input_value()
    assert page.url.endswith(f"lesson_changes=0.v1%3D{float(shown):g}")
    assert page.get_by_role("textbox", name="Your changes").input_value() == f"0.v1={float(shown):g}"


def test_many_presses_of_a_key_are_all_counted(page):
    page.locator('input[aria-label="w₁"]').focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(120)
    page.wait_for_function("() => location.search.includes('0.w1%3D-1.23')")


def test_a_question_is_answered(page):
    form = page.get_by_test_id("stForm").filter(has_text="Double every weight")
    form.get_by_text("It stays the same").click()
    form.get_by_role("button", name="Check").click()
    form.get_by_text("Correct.").wait_for()


def test_a_step_leads_to_a_real_layer(page):
    page.get_by_role("link", name="See this on a real network: scores").click()
    shows(page, "channels are kept")
    assert "/importance" in page.url


@pytest.mark.parametrize("dark", [900, 1400], indirect=True)
def test_nothing_is_wider_than_the_page(dark, address):
    dark.goto(f"{address}/learn")
    dark.get_by_text("Share and reproduce").wait_for()
    dark.locator(".js-plotly-plot .gtitle").nth(10).wait_for()
    fits(dark)
    is_dark(dark)
