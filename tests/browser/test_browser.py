import re

import pytest
from dashboard import is_dark, no_exception, serving, shows, wait_for


def test_a_page_opened_by_its_own_address_on_a_fresh_server_comes_with_the_app(page):
    with serving() as address:
        page.goto(f"{address}/importance")
        shows(page, "Share and reproduce")
        page.wait_for_timeout(1000)
        links = page.locator('[data-testid="stSidebarNavLink"]').all_inner_texts()
        names = [
            "Overview",
            "Learn",
            "Importance",
            "Transport",
            "Curves",
            "Sensitivity",
            "Recovery",
            "lab",
            "Landscape",
            "Export",
            "own",
            "Docs",
        ]
        assert [link.split()[-1] for link in links] == names
        assert page.get_by_label("Model").count() > 0
        no_exception(page)


@pytest.mark.parametrize(
    ("name", "sees"),
    [
        ("", "Channel groups, from input to output"),
        ("importance", "With fusion."),
        ("transport", "non-zeros"),
        ("curves", "points on 597 images"),
        ("sensitivity", "points on 597 images"),
    ],
)
def test_each_page_opens(page, address, name, sees):
    page.goto(f"{address}/{name}")
    shows(page, sees)
    shows(page, "Share and reproduce")
    no_exception(page)


def test_the_greeting_is_there_before_the_model(page, address):
    page.goto(address)
    shows(page, "Top-1 accuracy")
    wait_for(page, '[data-testid="stMetricValue"]', r"^\s*\d\d\.\d% ± \d\.\d\s*$")


def test_moving_the_slider_moves_the_cut(page, address):
    page.goto(f"{address}/importance")
    title = page.locator(".js-plotly-plot .gtitle").first
    title.wait_for()
    before = title.text_content()
    assert re.match(r"\d+ of \d+ channels are kept", before)
    slider = page.get_by_role("slider").first
    slider.focus()
    for _ in range(20):
        slider.press("ArrowRight")
    page.wait_for_function("t => document.querySelector('.js-plotly-plot .gtitle').textContent !== t", arg=before)
    assert int(title.text_content().split()[0]) < int(before.split()[0])
    assert "sparsity=50" in page.url
    no_exception(page)


def test_clicking_a_bar_tells_that_channels_story(page, address):
    page.goto(f"{address}/importance")
    page.locator(".js-plotly-plot .bars .point").first.wait_for()
    page.wait_for_timeout(1500)
    before = page.get_by_role("heading", name=re.compile(r"^Channel \d+$")).inner_text()
    box = page.locator(".js-plotly-plot .bars .point").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function(
        "t => [...document.querySelectorAll('h3')].some(h => /^Channel \\d+$/.test(h.innerText) && h.innerText !== t)",
        arg=before,
    )
    shows(page, "It is kept, and absorbs")
    assert "channel=" in page.url
    no_exception(page)


def test_the_default_curves_draw_themselves(page, address):
    page.goto(f"{address}/curves?model=digits-vgg")
    shows(page, "18 of 18 points on 597 images: done")
    heading = page.locator(".js-plotly-plot .gtitle").first.text_content()
    assert re.match(r"At \d+%, fusion keeps \d+ % where dropping keeps \d+ %", heading)
    no_exception(page)


def test_a_long_study_waits_to_be_asked_arrives_point_by_point_and_can_be_cancelled(page, address):
    many = "&".join(f"sparsities={percent}" for percent in range(5, 100, 5)) + "&criteria=l1&criteria=l2&criteria=random"
    page.goto(f"{address}/curves?model=digits-resnet&limit=500&{many}")
    shows(page, "0 of 114 points on 500 images: not computed yet")
    page.get_by_role("button", name="Compute curves").click()
    page.wait_for_function("() => /of 114 points.*: computing.*[1-9]\\d* on a sample/.test(document.body.innerText)")
    page.get_by_test_id("stMainBlockContainer").get_by_role("button", name="Cancel").click()
    shows(page, "cancelled;")
    page.reload()
    shows(page, "cancelled;")
    page.locator(".js-plotly-plot .scatterlayer .point").first.wait_for()
    no_exception(page)


def test_dark_mode_draws_on_dark_ground(dark, address):
    dark.goto(f"{address}/transport")
    shows(dark, "Share and reproduce")
    dark.locator(".js-plotly-plot .gtitle").first.wait_for()
    dark.wait_for_timeout(2500)
    ground = dark.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 150
    is_dark(dark)
