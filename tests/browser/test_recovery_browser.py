from urllib.parse import urlencode

from dashboard import at_rest, no_exception, shows, until, wait_for

from intrafusion._registry import MERGES, RECOVERIES

QUICK = {"training": "1000", "epochs": "0.5", "rate": "0.05", "recovery_limit": "500", "equal": "false"}


def link(address: str, **query) -> str:
    return f"{address}/recovery?{urlencode(QUICK | query, doseq=True)}"


def recover(page) -> None:
    page.get_by_test_id("stButton").get_by_role("button", name="Recover").click()


def test_every_method_runs_end_to_end(page, address):
    """All of them, on the embedded ResNet, in seconds."""
    page.goto(link(address, methods=list(RECOVERIES)))
    shows(page, f"0 of {len(RECOVERIES)} points on 500 images: not computed yet")
    at_rest(page)
    recover(page)
    page.get_by_text(f"{len(RECOVERIES)} of {len(RECOVERIES)} points on 500 images: done").wait_for()
    wait_for(page, '[data-testid="stPlotlyChart"]', r"best of \d+")
    until(page, "document.querySelectorAll('.js-plotly-plot').length == 2")
    lines = page.evaluate("document.querySelector('.js-plotly-plot').data.length")
    trained = [name for name, entry in RECOVERIES.items() if entry.needs == "labels"]
    assert lines == 2 * len(trained)
    no_exception(page)


def test_curves_grow_while_it_trains_a_reload_finds_them_and_it_stops(page, address):
    page.goto(link(address, methods=["finetune"], epochs="150", recovery_merge="drop"))
    shows(page, "0 of 1 points")
    at_rest(page)
    recover(page)
    until(page, "(document.querySelector('.js-plotly-plot')?.data?.[0]?.x?.length ?? 0) > 0")
    page.reload()
    until(page, "(document.querySelector('.js-plotly-plot')?.data?.[0]?.x?.length ?? 0) > 0")
    page.get_by_test_id("stMain").get_by_role("button", name="Cancel").click()
    shows(page, "cancelled;")
    no_exception(page)


def test_every_merge_runs_end_to_end(page, address):
    query = {"merges": list(MERGES), "sparsities": [50], "limit": "500", "model": "digits-vgg"}
    page.goto(f"{address}/curves?{urlencode(query, doseq=True)}")
    points = len(MERGES)
    shows(page, f"0 of {points} points on 500 images: not computed yet")
    at_rest(page)
    page.get_by_role("button", name="Compute curves").click()
    page.get_by_text(f"{points} of {points} points on 500 images: done").wait_for()
    names = "new Set(document.querySelector('.js-plotly-plot').data.map(line => line.name?.split(',')[0]).filter(Boolean))"
    until(page, f"{names}.size == {points}")
    assert set(page.evaluate(f"[...{names}]")) == set(MERGES)
    no_exception(page)


def test_the_learned_map_lies_beside_the_plan(page, address):
    page.goto(f"{address}/transport?sparsity=50&look=learned+map")
    shows(page, "the same rows and columns")
    wait_for(page, '[data-testid="stPlotlyChart"]', r"M explains \d+% of the 16 removed channels")
    no_exception(page)
