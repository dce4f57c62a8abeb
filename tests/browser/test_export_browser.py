import io
import json
import re
import zipfile

from dashboard import at_rest, fits, is_dark, no_exception, opened, wait_for


def test_a_network_is_made_timed_written_and_downloaded_in_a_dark_and_narrow_page(dark, address):
    page = dark
    opened(page, f"{address}/export?model=digits-mlp&export_limit=500&formats=safetensors&formats=onnx")
    page.get_by_test_id("stMain").get_by_role("button", name="Prune network").click()
    wait_for(page, '[data-testid="stPlotlyChart"]', r"\d+ of \d+ channels are kept")
    at_rest(page)
    fits(page)
    is_dark(page)
    no_exception(page)
    page.get_by_role("button", name="Compute remaining").click()
    page.get_by_role("button", name="All computed").wait_for()
    wait_for(page, '[data-testid="stPlotlyChart"]', r"one forward pass, (ms|µs|s)")
    at_rest(page)
    fits(page)
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
