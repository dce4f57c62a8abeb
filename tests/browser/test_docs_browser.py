"""Documents in a browser: a link goes to a section of another one in the same window, tables and pictures are drawn."""

from dashboard import no_exception, shows, until


def test_links_pictures_and_search(page, address):
    page.goto(f"{address}/docs?document=methods&model=digits-mlp")
    shows(page, "Where methods differ from their sources")
    main = page.get_by_test_id("stMain")
    assert main.locator("table").count() >= 7
    main.locator('a[href*="BatchNorm+in+folding"]').click()
    shows(page, "How k-means sees BatchNorm")
    assert "document=results" in page.url
    assert "model=digits-mlp" in page.url
    assert len(page.context.pages) == 1
    page.get_by_label("Search headings").fill("resnet-56")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Results: Sensitivity of ResNet-56").click()
    until(page, "() => [...document.querySelectorAll('[data-testid=stMain] img')].some(i => i.naturalWidth > 500)")
    assert main.locator("table").count() == 0
    no_exception(page)
