import re

from dashboard import at_rest, no_exception, opened, shows, still_box, until, wait_for


def plot(page, says: str):
    """The box of the ground of the picture whose title says this, on the screen and at rest."""
    ground = page.locator(".js-plotly-plot", has=page.get_by_text(says)).locator(".nsewdrag").first
    ground.wait_for(state="attached")
    at_rest(page)
    return still_box(ground)


def test_clicking_an_image_explains_it_and_a_cell_of_any_criterion_tells_that_channels_story(page, address):
    opened(page, f"{address}/importance?order=by+channel&channel=3")
    box = plot(page, "with the highest activation")
    page.mouse.click(box["x"] + box["width"] * 2.5 / 8.9, box["y"] + 0.3 * box["height"])
    until(page, "() => location.search.includes('image=3')")

    box = plot(page, "criteria keep")
    width, height = box["width"] / 32.2, box["height"] / 7  # 32 channels, 7 criteria
    page.mouse.click(box["x"] + 0.1 * width + 20.5 * width, box["y"] + 4.5 * height)
    wait_for(page, "h3", "^Channel 20$")
    shows(page, re.compile("^With fusion. Channel 20 ranks"))
    assert "channel=20" in page.url
    no_exception(page)


def test_many_channels_are_clicked_by_column(page, address):
    criteria = "".join(f"&compare={name}" for name in ["random", "l1", "l2", "lamp", "fpgm", "bn_scale"])
    query = f"model=cifar10-vgg16_bn&weights=random&group=features.34&order=by+channel{criteria}"
    opened(page, f"{address}/importance?{query}")
    box = plot(page, "criteria keep")
    page.mouse.click(box["x"] + box["width"] * 400.6 / 512.2, box["y"] + 4)
    until(page, "() => /channel=(399|40[01])/.test(location.search)")


def test_dear_criteria_are_asked_for_and_the_page_fills_itself(page, address):
    others = "lamp taylor_sum obd chip hrank relative conductance activation-gradient deep-lift"
    page.goto(f"{address}/importance?criterion=taylor&" + "&".join(f"compare={name}" for name in others.split()))
    shows(page, "not computed yet")
    page.get_by_role("button", name=re.compile("^Compute")).first.click()
    shows(page, "All 10 criteria keep")
    until(page, "() => !document.body.innerText.includes('not computed yet')")
    no_exception(page)
