"""Opens a page of the dashboard without a browser, and reads its words."""

from pathlib import Path

from streamlit.testing.v1 import AppTest

APP = str(Path(__file__).parents[2] / "app.py")


def open_page(page: str, **query: str) -> AppTest:
    app = AppTest.from_file(APP, default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    if page != "overview":
        app.switch_page(f"pages/{page}.py").run()
    return app


def text(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.title, app.subheader, app.error, app.warning, app.info, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)
