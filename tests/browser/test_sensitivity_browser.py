from functools import partial

from dashboard import (
    at_rest,
    chart_mark,
    click_mark,
    click_until,
    fits,
    is_dark,
    new_page,
    no_exception,
    opened,
    shows,
    still_box,
    until,
    wait_for,
)

LONG = "model=digits-resnet&study_limit=500&" + "&".join(f"study_sparsities={p}" for p in range(5, 100, 5))


def main(page):
    """The page without its sidebar, where the queue has words and buttons of the same names."""
    return page.get_by_test_id("stMain")


def cell(page, group: int, sparsity: int, groups: int = 9, sparsities: int = 4) -> None:
    """Click a cell of the first heatmap, by its row and column."""
    ground = page.locator(".js-plotly-plot").first.locator(".nsewdrag").first
    ground.wait_for(state="attached")
    at_rest(page)
    box = still_box(ground)
    page.mouse.click(box["x"] + box["width"] * (sparsity + 0.5) / sparsities, box["y"] + box["height"] * (group + 0.5) / groups)


def test_a_cell_and_a_bar_show_their_group_and_the_sidebar_follows(page, address):
    opened(page, f"{address}/sensitivity")
    shows(page, "72 of 72 points on 597 images: done")
    shows(page, ", measured")
    for row, column, group, percent in ((4, 2, "layer2.0.conv2", 50), (7, 1, "layer3.0.conv2", 30)):
        cell(page, row, column)
        wait_for(page, "h3", f"^Group {group}$")
        until(page, "([g, p]) => location.search === `?group=${g}&cell=${p}`", [group, percent])
    at_rest(page)
    frame = page.evaluate("document.querySelector('.js-plotly-plot').layout.shapes.find(s => s.type === 'rect')")
    assert (frame["x0"], frame["y0"]) == (0.5, 6.5)

    click_mark(page, chart_mark(page, 2, ".bars .point path"))
    wait_for(page, "h3", "^Group conv1$")
    no_exception(page)


def test_while_a_study_runs_cells_can_be_clicked_a_reload_and_others_find_it_and_it_stops_at_once(page, address, browser):
    page.goto(f"{address}/sensitivity?{LONG}&criterion=l2")
    shows(page, "0 of 342 points on 500 images: not computed yet")
    at_rest(page)
    page.get_by_role("button", name="Run study").click()
    wait_for(page, '[data-testid="stMain"] p', r"computing.*; [1-9]\d* on a sample so far")
    for row, group in ((0, "conv1"), (8, "layer3.1.conv1")):
        click_until(page, partial(cell, page, row, 10, sparsities=19), "h3", f"^Group {group}$")

    page.reload()
    main(page).get_by_role("button", name="Cancel").wait_for()
    wait_for(page, "h3", "^Group layer3.1.conv1$")
    other = new_page(browser)
    other.goto(f"{address}/overview")
    other.get_by_test_id("stSidebar").get_by_text("sensitivity of digits-resnet").wait_for()
    other.get_by_role("button", name="Cancel").wait_for()  # of this address, as a reload is
    other.close()

    main(page).get_by_role("button", name="Cancel").click()
    shows(page, "cancelled;")
    main(page).get_by_role("button", name="Continue").wait_for()
    no_exception(page)


def test_two_readers_study_two_networks_at_once(page, browser, address):
    other = new_page(browser)
    readers = {"digits-mlp": (page, 8), "digits-vgg": (other, 24)}
    for model, (reader, _) in readers.items():
        reader.goto(f"{address}/sensitivity?model={model}&study_sparsities=20&study_sparsities=60")
    for reader, points in readers.values():
        reader.get_by_text(f"{points} of {points} points on 597 images: done").wait_for()
        reader.get_by_text(", measured").wait_for()
        no_exception(reader)
    other.close()


def test_nothing_is_wider_than_the_page(dark, address):
    opened(dark, f"{address}/sensitivity?model=digits-mlp")
    shows(dark, "16 of 16 points on 597 images: done")
    for name in ("Run options", "Transport options", "Results table"):
        dark.get_by_text(name, exact=True).click()
    for width in (900, 1400):
        dark.set_viewport_size({"width": width, "height": 1000})
        dark.wait_for_timeout(1000)
        at_rest(dark)
        fits(dark)
    is_dark(dark)
