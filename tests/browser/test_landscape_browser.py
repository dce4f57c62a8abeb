from dashboard import at_rest, fits, is_dark, no_exception, opened, until, wait_for

QUICK = "landscape_limit=100&landscape_size=9&path_training=1000&path_epochs=2"
CONTOUR = "() => [...document.querySelectorAll('.js-plotly-plot')].some(p => p.data.some(d => d.type === 'contour'))"


def test_all_four_parts_come_and_a_reload_loses_nothing_in_a_dark_and_narrow_page(dark, address):
    page = dark
    opened(page, f"{address}/landscape?model=digits-mlp&{QUICK}")
    page.get_by_test_id("stMain").get_by_role("button", name="Compute all").click()
    until(page, CONTOUR)
    page.get_by_role("button", name="All computed").wait_for()
    wait_for(page, '[data-testid="stPlotlyChart"]', r"Fused keeps (only )?[\d.]+% where dropped keeps [\d.]+%")
    wait_for(page, '[data-testid="stPlotlyChart"]', "on average along a trained path")
    wait_for(page, '[data-testid="stPlotlyChart"]', "Share in the 10 sharpest directions: dropping")
    at_rest(page)
    fits(page)
    is_dark(page)
    page.reload()
    until(page, CONTOUR)
    wait_for(page, '[data-testid="stPlotlyChart"]', r"\d+ of \d+ changed: dense and fused correct, dropped wrong")
    page.get_by_test_id("stButtonGroup").get_by_text("only fusion loses", exact=True).click()
    until(page, "() => location.search.includes('changed=')")
    wait_for(page, '[data-testid="stPlotlyChart"]', r"\d+ of \d+ changed: dense and dropped correct, fused wrong")
    page.get_by_text("loss", exact=True).first.click()
    until(page, "() => location.search.includes('shown=loss')")
    no_exception(page)


def test_a_long_plane_grows_and_can_be_cancelled(page, address):
    opened(page, f"{address}/landscape?landscape_size=33&landscape_limit=all&criterion=l2")
    page.get_by_role("button", name="Compute plane").click()
    until(page, CONTOUR)
    page.get_by_test_id("stMain").get_by_role("button", name="Cancel").click()
    wait_for(page, '[data-testid="stMain"] p', r"^plane\s*cancelled")
    page.get_by_role("button", name="Compute plane again").wait_for()
    assert page.evaluate(CONTOUR.removeprefix("() => "))
    no_exception(page)
