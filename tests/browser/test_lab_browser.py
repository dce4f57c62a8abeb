from urllib.parse import urlencode

from dashboard import at_rest, no_exception, shows, until

QUICK = {"model": "digits-mlp", "lab_training": "1000", "lab_epochs": "1"}


def link(address: str, **query) -> str:
    return f"{address}/training_lab?{urlencode(QUICK | query, doseq=True)}"


def train(page) -> None:
    at_rest(page)
    page.get_by_test_id("stButton").get_by_role("button", name="Train", exact=True).click()


def test_a_method_of_each_kind_trains_to_its_end_and_what_is_kept_opens_as_a_model(page, address):
    kinds = {"sdprun": {}, "aslp": {}, "smooth-svd": {}, "fap": {"lab_rounds": "1", "lab_tune": "1"}, "grda": {}}
    for method, knobs in kinds.items():
        page.goto(link(address, method=method, **knobs))
        shows(page, "not trained yet")
        train(page)
        page.get_by_text("trained in").wait_for()
        shows(page, "Remaining parameters")
        no_exception(page)
    names = page.get_by_test_id("stMain").inner_text()
    assert all(method in names for method in kinds)
    at_rest(page)
    page.get_by_test_id("stFormSubmitButton").get_by_role("button", name="Save").click()
    shows(page, "kept/grda-digits-mlp")
    page.goto(f"{address}/transport?model=kept%2Fgrda-digits-mlp")
    page.wait_for_selector(".js-plotly-plot")
    no_exception(page)


def test_curves_grow_a_reload_finds_them_it_stops_and_goes_on(page, address):
    page.goto(link(address, method="sgd", model="digits-vgg", lab_epochs="400"))
    shows(page, "not trained yet")
    train(page)
    until(page, "(document.querySelector('.js-plotly-plot')?.data?.[0]?.x?.length ?? 0) > 0")
    page.reload()
    until(page, "(document.querySelector('.js-plotly-plot')?.data?.[0]?.x?.length ?? 0) > 0")
    page.get_by_test_id("stMain").get_by_role("button", name="Cancel").click()
    shows(page, "stopped;")
    length = page.evaluate("document.querySelector('.js-plotly-plot').data[0].x.length")
    page.get_by_test_id("stButton").get_by_role("button", name="Continue").click()
    until(page, f"(document.querySelector('.js-plotly-plot')?.data?.[0]?.x?.length ?? 0) > {length}")
    page.get_by_test_id("stMain").get_by_role("button", name="Cancel").click()
    shows(page, "stopped")
    no_exception(page)
