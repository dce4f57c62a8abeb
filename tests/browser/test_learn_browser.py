import re

from dashboard import at_rest, click_mark, fits, is_dark, no_exception, opened, shows, still_box, until, wait_for


def mark(page, picture, number):
    """Return the mark with this number in the picture whose title holds these words."""
    marks = page.locator(".js-plotly-plot").filter(has=page.locator(".gtitle", has_text=picture)).first
    return marks.locator("path.point, .bars .point path").nth(number)


def test_marks_choose_neurons_a_question_is_answered_and_a_step_leads_to_a_real_layer(page, address):
    opened(page, f"{address}/learn")
    for picture, number, says in (
        ("Two inputs, 6 neurons", 3, "Neuron 3 is active"),
        ("neurons are kept", 1, "Neuron 1 is active"),
        ("The distance of neuron", 6 + 4, "The distance of neuron 4 from neuron 2 is 1.73"),
        ("The plan G", 6 + 2, "Neuron 2 is active"),
    ):
        click_mark(page, mark(page, picture, number))
        wait_for(page, ".gtitle", says)
        at_rest(page)
        assert re.search(r"lesson_neuron=\d", page.url)

    form = page.get_by_test_id("stForm").filter(has_text="Double every weight")
    form.get_by_text("It stays the same").click()
    form.get_by_role("button", name="Check").click()
    form.get_by_text("Correct.").wait_for()

    page.get_by_role("link", name="See this on a real network: scores").click()
    shows(page, "channels are kept")
    assert "/importance" in page.url
    no_exception(page)


def test_many_presses_of_a_key_are_all_counted_and_a_dragged_weight_ends_where_the_hand_does_in_the_dark(dark, address):
    opened(dark, f"{address}/learn")
    dark.locator(".js-plotly-plot .gtitle").nth(10).wait_for()
    fits(dark)
    is_dark(dark)
    dark.locator('input[aria-label="w₁"]').focus()
    for _ in range(12):
        dark.keyboard.press("ArrowRight")
        dark.wait_for_timeout(120)
    until(dark, "() => location.search.includes('0.w1%3D-1.31')")
    dark.get_by_role("textbox", name="Your changes").fill("")
    dark.keyboard.press("Enter")
    until(dark, "() => !location.search.includes('lesson_changes')")

    dark.set_viewport_size({"width": 1400, "height": 1000})
    at_rest(dark)
    thumb = dark.locator('[data-testid="stBottom"] [data-testid="stSlider"] div:has(> div > input)').nth(3)
    box = still_box(thumb)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    dark.mouse.move(x, y)
    dark.mouse.down()
    for step in range(30):
        dark.mouse.move(x - step, y)
        dark.wait_for_timeout(40)
    dark.mouse.up()
    until(dark, "() => location.search.includes('lesson_changes=0.v1')")
    dark.wait_for_timeout(2000)  # nothing may come after it
    at_rest(dark)
    shown = dark.locator('[data-testid="stBottom"] input[aria-label="v₁"]').input_value()
    assert dark.url.endswith(f"lesson_changes=0.v1%3D{float(shown):g}")
    assert dark.get_by_role("textbox", name="Your changes").input_value() == f"0.v1={float(shown):g}"
    fits(dark)
    no_exception(dark)
