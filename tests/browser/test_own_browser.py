import numpy as np
import own_files as files
from dashboard import at_rest, no_exception, opened, shows, until, wait_for

CURVE = "() => [...document.querySelectorAll('.js-plotly-plot')].some(p => p.data.some(d => (d.x || []).length >= 5))"


def upload(page, which: int, *paths) -> None:
    uploader = page.get_by_test_id("stFileUploader").nth(which)
    uploader.locator('input[type="file"]').set_input_files([str(path) for path in paths])
    page.get_by_role("button", name="Check and save").nth(which).click()  # enabled when the server has the file


def test_a_bad_file_is_one_line_and_a_weights_file_leads_to_a_curve(page, address, tmp_path):
    state = files.mlp_state()
    good = files.save_state(tmp_path / "browser-mlp.safetensors", state)
    state[next(iter(state))] *= float("nan")
    opened(page, f"{address}/your_own?model=digits-mlp")
    upload(page, 1, files.save_state(tmp_path / "broken.safetensors", state))
    alert = page.get_by_test_id("stAlert")
    alert.wait_for()
    (said,) = alert.locator("p").all_inner_texts()
    assert "in broken.safetensors has NaN or infinite values" in said

    at_rest(page)
    upload(page, 1, good)
    shows(page, "Saved as kept/browser-mlp")
    page.get_by_role("button", name="Open this network").click()
    shows(page, "It is selected in the sidebar")
    until(page, "() => location.search.includes('browser-mlp')")
    page.get_by_test_id("stMain").get_by_role("link", name="Curves").first.click()
    until(page, CURVE)
    wait_for(page, '[data-testid="stCode"]', "--model kept/browser-mlp")
    no_exception(page)


def test_from_a_program_and_images_to_a_curve(page, address, tmp_path):
    program = files.export(files.network(), tmp_path / "browser-net.pt2")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    images = files.npz(tmp_path / "browser-images.npz", images=pixels, labels=np.arange(60) % 3)
    opened(page, f"{address}/your_own?model=digits-mlp")
    upload(page, 2, images)
    shows(page, "Saved as kept/browser-images")
    upload(page, 0, program)
    shows(page, "Saved as kept/browser-net")
    page.get_by_role("button", name="Open this network").click()
    shows(page, "It is selected in the sidebar")
    page.get_by_test_id("stMain").get_by_role("link", name="Curves").first.click()
    until(page, CURVE)
    wait_for(page, '[data-testid="stCode"]', "--model kept/browser-net --data kept/browser-images")
    no_exception(page)
