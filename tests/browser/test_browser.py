import re

from dashboard import at_rest, chart_mark, click_mark, no_exception, opened, shows, until, wait_for


def test_a_page_opened_by_its_own_address_on_a_fresh_server_comes_with_the_app(first_visit):
    names = "Overview Learn Importance Transport Curves Sensitivity Recovery lab Landscape Export own Docs"
    _, links, sidebar = first_visit
    assert [link.split()[-1] for link in links] == names.split()
    assert "Model" in sidebar


def test_the_greeting_is_there_before_the_model(page, address):
    page.goto(address)
    shows(page, "Top-1 accuracy")
    wait_for(page, '[data-testid="stMetricValue"]', r"^\s*\d\d\.\d% ± \d\.\d\s*$")
    shows(page, "Channel groups, from input to output")
    no_exception(page)


def test_moving_the_slider_moves_the_cut_and_clicking_a_bar_tells_that_channels_story(page, address):
    opened(page, f"{address}/importance")
    title = page.locator(".js-plotly-plot .gtitle").first
    before = title.text_content()
    assert re.match(r"\d+ of \d+ channels are kept", before)
    slider = page.get_by_role("slider").first
    slider.focus()
    for _ in range(8):
        slider.press("ArrowRight")
    until(page, "t => document.querySelector('.js-plotly-plot .gtitle').textContent !== t", before)
    until(page, "() => location.search.includes('sparsity=38')")
    at_rest(page)
    assert int(title.text_content().split()[0]) < int(before.split()[0])

    story = page.get_by_role("heading", name=re.compile(r"^Channel \d+$")).inner_text()
    click_mark(page, chart_mark(page, 0, ".bars .point"))
    wait_for(page, "h3", f"^Channel (?!{story.split()[1]}$)\\d+$")
    shows(page, "It is kept, and absorbs")
    shows(page, "With fusion.")
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
    until(page, "() => /of 114 points.*: computing.*[1-9]\\d* on a sample/.test(document.body.innerText)")
    page.get_by_test_id("stMainBlockContainer").get_by_role("button", name="Cancel").click()
    shows(page, "cancelled;")
    page.reload()
    shows(page, "cancelled;")
    page.locator(".js-plotly-plot .scatterlayer .point").first.wait_for()
    no_exception(page)
