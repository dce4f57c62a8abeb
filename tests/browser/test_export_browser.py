import io
import json
import re
import zipfile

from dashboard import fits, no_exception, shows, wait_for


def test_a_network_is_made_timed_written_and_downloaded(page, address):
    page.goto(f"{address}/export?model=digits-mlp&export_limit=500&formats=safetensors&formats=onnx")
    shows(page, "Share and reproduce")
    page.wait_for_timeout(1000)
    page.get_by_test_id("stMain").get_by_role("button", name="Prune network").click()
    wait_for(page, '[data-testid="stPlotlyChart"]', r"\d+ of \d+ channels are kept")
    page.get_by_role("button", name="Compute remaining").click()
    page.get_by_role("button", name="All computed").wait_for()
    wait_for(page, '[data-testid="stPlotlyChart"]', r"one forward pass, (ms|µs|s)")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download all (ZIP)").click()
    assert download.value.suggested_filename == "digits-mlp-fusion-30.zip"
    packed = zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes()))
    assert {"model.safetensors", "model.json", "model.onnx", "report.html", "spec.json"} <= set(packed.namelist())
    assert json.loads(packed.read("spec.json"))["model"] == "digits-mlp"
    page.reload()
    page.get_by_role("button", name="All computed").wait_for()
    page.set_content(packed.read("report.html").decode())
    page.locator(".js-plotly-plot .gtitle").first.wait_for()
    assert re.search(r"of \d+ channels are kept", page.locator(".js-plotly-plot").first.text_content())


def test_dark_and_narrow_nothing_is_wider_than_the_page(dark, address):
    dark.goto(f"{address}/export?model=digits-mlp")
    shows(dark, "Share and reproduce")
    dark.wait_for_timeout(1000)
    dark.get_by_test_id("stMain").get_by_role("button", name="Prune network").click()
    wait_for(dark, '[data-testid="stPlotlyChart"]', r"\d+ of \d+ channels are kept")
    dark.wait_for_timeout(1500)
    no_exception(dark)
    fits(dark)
