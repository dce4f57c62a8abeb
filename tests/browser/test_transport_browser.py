import re

import pytest
from dashboard import at_rest, chart_mark, click_mark, is_dark, no_exception, opened, shows, wait_for

PLAN, MAP = 0, 3  # of the charts on the page: the plan, kernels, provenance, and another look


def channel_told(page):
    return page.get_by_role("heading", name=re.compile(r"^Channel \d+$")).inner_text()


def test_clicking_a_square_of_the_plan_or_a_channel_on_the_map_tells_that_channels_story(page, address):
    opened(page, f"{address}/transport?channel=5")
    last = page.locator(".js-plotly-plot").nth(PLAN).locator(".scatterlayer .point").count() - 1
    click_mark(page, chart_mark(page, PLAN, which=last))
    wait_for(page, "h3", "^Channel 31$")
    shows(page, "It is kept, and absorbs")
    assert "channel=31" in page.url

    at_rest(page)
    traces = page.locator(".js-plotly-plot").nth(MAP).locator(".scatterlayer .trace")
    traces.first.wait_for()
    hollow = traces.count() - 3  # arrows first, then the dropped, the kept, and the ring around the chosen one
    click_mark(page, chart_mark(page, MAP, f".scatterlayer .trace:nth-child({hollow + 1}) .point"))
    wait_for(page, "h3", "^Channel (?!31$)")
    shows(page, "It is merged into")
    no_exception(page)


def test_the_player_plays_to_ninety_percent(page, address):
    opened(page, f"{address}/transport?look=sparsity+player&sparsity=0")
    player = page.locator(".js-plotly-plot").nth(MAP)
    title = player.locator(".gtitle")
    title.wait_for()
    assert title.text_content().startswith("At 0%: 0 of 32")
    player.locator(".updatemenu-button").first.click()
    wait_for(page, ".gtitle", "^At 90%: 29 of 32")
    no_exception(page)


@pytest.mark.parametrize("order", ["importance", "target"])
def test_a_click_finds_the_same_channel_in_every_order(page, address, order):
    opened(page, f"{address}/transport?arrange={order}&sparsity=50&channel=0")
    click_mark(page, chart_mark(page, PLAN, which=9))
    wait_for(page, "h3", "^Channel [1-9]")
    channel = int(channel_told(page).split()[1])
    data = page.evaluate(f"document.querySelectorAll('.js-plotly-plot')[{PLAN}].data")
    marks = next(trace for trace in data if trace["type"] == "scatter")["customdata"]
    assert channel == marks[9][0]
    no_exception(page)


def test_two_settings_stand_side_by_side_in_the_dark(dark, address):
    opened(dark, f"{address}/transport?look=two+settings")
    shows(dark, "Both plans move")
    shows(dark, "B: cost activations")
    shows(dark, "Transport cost")
    shows(dark, "non-zeros")
    is_dark(dark)
    no_exception(dark)


def test_a_wide_layer_is_a_picture_and_can_be_clicked(page, address):
    opened(page, f"{address}/transport?model=cifar10-vgg16_bn&weights=random&group=features.34&channel=1")
    page.locator(".js-plotly-plot").nth(PLAN).locator(".imagelayer image").first.wait_for(state="attached")
    click_mark(page, chart_mark(page, PLAN, which=400))  # its neighbours stand a pixel away: any of them will do
    wait_for(page, "h3", "^Channel (?!1$)")
    no_exception(page)
