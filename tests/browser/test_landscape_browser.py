import re

from dashboard import no_exception, shows, wait_for

QUICK = "landscape_limit=100&landscape_size=9&path_training=1000&path_epochs=2"
CONTOUR = "() => [...document.querySelectorAll('.js-plotly-plot')].some(p => p.data.some(d => d.type === 'contour'))"


def compute(page) -> None:
    page.wait_for_timeout(1000)
    page.get_by_test_id("stMain").get_by_role("button", name="Compute all").click()


def test_all_four_parts_come_and_a_reload_loses_nothing(page, address):
    page.goto(f"{address}/landscape?{QUICK}")
    shows(page, "Take it with you")
    compute(page)
    page.wait_for_function(CONTOUR)
    page.get_by_role("button", name="All computed").wait_for(timeout=240_000)
    wait_for(page, '[data-testid="stPlotlyChart"]', r"Fused keeps [\d.]+% where dropped keeps [\d.]+%")
    wait_for(page, '[data-testid="stPlotlyChart"]', "on average along a trained path")
    wait_for(page, '[data-testid="stPlotlyChart"]', "In the 10 sharpest directions: dropping")
    page.reload()
    page.wait_for_function(CONTOUR)
    wait_for(page, '[data-testid="stPlotlyChart"]', r"\d+ of \d+ changed: dense right, dropped wrong")
    page.get_by_text("only fusion loses:").click()
    page.wait_for_function("() => location.search.includes('changed=')")
    wait_for(page, '[data-testid="stPlotlyChart"]', r"\d+ of \d+ changed: dense and dropped right, fused wrong")
    page.get_by_text("loss", exact=True).first.click()
    page.wait_for_function("() => location.search.includes('shown=loss')")
    no_exception(page)


def test_a_long_plane_grows_and_can_be_cancelled(page, address):
    page.goto(f"{address}/landscape?landscape_size=33&landscape_limit=all&criterion=l2")
    shows(page, "Take it with you")
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Draw the plane").click()
    page.wait_for_function(CONTOUR)
    page.get_by_test_id("stMain").get_by_role("button", name="Cancel").click()
    wait_for(page, '[data-testid="stMain"] p', r"^plane\s*cancelled")
    page.get_by_role("button", name="Draw the plane again").wait_for()
    assert page.evaluate(CONTOUR.removeprefix("() => "))
    no_exception(page)


def test_dark_and_narrow_nothing_is_wider_than_the_page(browser, address):
    context = browser.new_context(color_scheme="dark", viewport={"width": 900, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{address}/landscape?model=digits-mlp&{QUICK}")
    shows(page, "Take it with you")
    compute(page)
    page.get_by_role("button", name="All computed").wait_for(timeout=240_000)
    page.wait_for_timeout(1500)
    wide = page.evaluate(
        "() => {const m = document.querySelector('[data-testid=stMain]'); return m.scrollWidth - m.clientWidth}"
    )
    ink = page.evaluate("getComputedStyle(document.querySelector('.js-plotly-plot .gtitle')).fill")
    context.close()
    assert wide <= 1
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) > 600
