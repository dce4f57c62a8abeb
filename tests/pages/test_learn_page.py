import re
from urllib.parse import parse_qsl, urlsplit

import pytest
from opening import open_page, text
from streamlit.testing.v1 import AppTest

from intrafusion.studies import toy_network


def learn(**query: str) -> AppTest:
    return open_page("learn", **query)


def sums(app: AppTest) -> str:
    return "\n".join(element.value for element in app.latex)


def weight(app: AppTest, name: str):
    """The slider of one of the chosen neuron's weights."""
    return next(slider for slider in app.slider if slider.label == name)


def answer(app: AppTest, question: str, given: float | str) -> AppTest:
    """Fill in an answer and press its Check button."""
    field = next(w for w in (*app.number_input, *app.radio) if (w.key or "").startswith(f"lesson_answer_{question}:"))
    field.set_value(given)
    return check(app, question)


def check(app: AppTest, question: str) -> AppTest:
    return app.button(key=f"FormSubmitter:lesson_ask_{question}-Check").click().run()


def test_the_page_shows_six_steps_each_with_a_question_and_a_way_on():
    app = learn()
    assert not app.exception
    assert not app.error
    assert app.title[0].value == "Learn"
    assert [s.value[0] for s in app.subheader][:6] == list("123456")
    assert sum(m.value.startswith("**Question.**") for m in app.markdown) == 6
    links = [link.value for link in app.page_link if link.value.startswith("See this on a real network")]
    assert len(links) == 6
    assert "Share and reproduce" in text(app)


def test_the_sums_on_the_page_are_the_librarys():
    app, made = learn(), toy_network.open_lesson(toy_network.train_toy(), 3)
    for neuron in range(6):
        app.button_group(key="lesson_neuron").set_value(neuron).run()
        assert f"= {made.scores[neuron]:.3f}" in sums(app)
        assert f"**{made.plan.total_cost:.3f}**" in text(app)
        fused = toy_network.numbers(made.fused)[made.kept.index(made.home(neuron))]
        assert f"= {fused[0]:.2f}" in sums(app)


def test_dragging_a_weight_changes_everything_and_undo_brings_it_back():
    app = learn()
    before, said = sums(app), text(app)
    weight(app, "w₁").set_value(0.5).run()
    assert not app.exception
    assert app.text_input(key="lesson_text").value == "0.w1=0.5"
    assert app.query_params["lesson_changes"] in ("0.w1=0.5", ["0.w1=0.5"])
    assert "|0.50|" in sums(app)
    assert sums(app) != before
    assert "changes='0.w1=0.5'" in text(app)
    weight(app, "b").set_value(-1.0).run()
    assert app.text_input(key="lesson_text").value == "0.b=-1 0.w1=0.5"
    app.button(key="lesson_undo").click().run()
    assert (sums(app), text(app)) == (before, said)
    assert weight(app, "w₁").value != 0.5


def test_a_weight_dragged_back_is_no_change():
    app = learn()
    was = weight(app, "v₂").value
    weight(app, "v₂").set_value(2.0).run()
    weight(app, "v₂").set_value(was).run()
    assert app.text_input(key="lesson_text").value == ""


def test_changes_can_be_written_and_move_the_sliders():
    app = learn()
    app.text_input(key="lesson_text").set_value("0.v1=-2 3.w2=1")
    app.button(key="FormSubmitter:lesson_changes_form-Apply").click().run()
    assert not app.error
    assert weight(app, "v₁").value == -2
    app.button_group(key="lesson_neuron").set_value(3).run()
    assert weight(app, "w₂").value == 1


RIGHT = toy_network.open_lesson(toy_network.train_toy(), 3)
ROWS, FUSED = toy_network.numbers(RIGHT.dense), toy_network.numbers(RIGHT.fused)
QUESTIONS = {
    "neuron": (round(max(0.0, float(-ROWS[0, 0] + 0.5 * ROWS[0, 1] + ROWS[0, 2])), 2), 0.0, "a positive sum"),
    "importance": (str(min(RIGHT.kept, key=lambda i: RIGHT.scores[i])), "0", "lowest score"),
    "distance": ("It stays the same", "It doubles", "only their directions matter"),
    "plan": (str(RIGHT.crowded_out()[0]), "None", "no capacity"),
    "fusing": (round(float(FUSED[0, 2]), 2), 0.0, "×"),
    "computes": ("outer", "inner", "larger logit"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_right_answer_is_accepted_and_a_wrong_one_refused(question):
    right, wrong, why = QUESTIONS[question]
    app = check(learn(), question)
    assert "Enter an answer" in app.info[0].value
    answer(app, question, wrong)
    assert app.error[0].value.startswith(f"{wrong} is not correct.")
    assert not app.success
    answer(app, question, right)
    assert app.success[0].value.startswith("Correct.")
    assert why in app.success[0].value
    assert not app.error


def test_the_answer_follows_the_weights():
    assert answer(learn(), "neuron", 1.75).error
    assert answer(learn(lesson_changes="0.w1=-1 0.w2=1 0.b=0.25"), "neuron", 1.75).success


def test_a_permalink_restores_the_page():
    app = learn()
    app.slider(key="lesson_hidden").set_value(8)
    app.number_input(key="lesson_seed").set_value(3)
    app.selectbox(key="lesson_criterion").set_value("l2")
    app.button_group(key="lesson_p").set_value(2).run()
    app.slider(key="lesson_stay").set_value(5)
    app.button_group(key="lesson_neuron").set_value(6).run()
    weight(app, "b").set_value(0.75).run()
    app.selectbox(key="lesson_other").set_value(app.selectbox(key="lesson_other").options[-1]).run()
    link = next(c.value for c in app.code if c.value.startswith("http"))
    again = learn(**dict(parse_qsl(urlsplit(link).query)))
    assert not again.error
    assert weight(again, "b").value == 0.75
    assert "lesson_changes=6.b%3D0.75" in link
    assert [m.value for m in again.markdown] == [m.value for m in app.markdown]
    assert sums(again) == sums(app)


def test_the_snippet_runs_and_prints_the_pages_accuracy(capsys):
    app = learn(lesson_changes="3.w1=0.5", lesson_stay="4")
    code = next(c.value for c in app.code if "import intrafusion" in c.value)
    names: dict = {}
    exec(code, names)
    printed = capsys.readouterr().out
    assert f"fusion {toy_network.measure_toy(names['small']).accuracy}" in printed
    assert [f"{names['plan'].cost[0, j]:.2f}" for j in range(4)] == [
        f"{cost:.2f}" for cost in toy_network.open_lesson(toy_network.train_toy(14, 6, "3.w1=0.5"), 4).plan.cost[0].tolist()
    ]


@pytest.mark.parametrize(("hidden", "stay"), [(4, 1), (4, 4), (5, 3), (8, 1), (8, 7), (8, 8)])
def test_every_size_is_drawn(hidden, stay):
    app = learn(lesson_hidden=str(hidden), lesson_stay=str(stay))
    for neuron in range(0, hidden, 3):
        app.button_group(key="lesson_neuron").set_value(neuron).run()
        assert not app.exception
        assert not app.error
    assert re.search(rf"Each of the {hidden} neurons .* each of the {stay} kept neurons", text(app))
    assert ("nothing is pruned" in text(app)) == (hidden == stay)


@pytest.mark.parametrize("criterion", toy_network.criteria(toy_network.train_toy()))
def test_every_criterion_is_explained(criterion):
    app = learn(lesson_criterion=criterion)
    assert not app.exception
    assert not app.error
    assert ("score of neuron" in sums(app)) == (criterion in ("l1", "l2"))


def test_fewer_neurons_than_were_chosen_to_stay():
    app = learn(lesson_stay="6", lesson_neuron="5")
    app.slider(key="lesson_hidden").set_value(4).run()
    assert not app.exception
    assert app.slider(key="lesson_stay").value <= 4
    assert app.button_group(key="lesson_neuron").value in range(4)


def test_another_neuron_brings_its_own_comparison():
    app = learn()
    for neuron in (3, 4, 2):
        app.button_group(key="lesson_neuron").set_value(neuron).run()
        other = int(app.selectbox(key="lesson_other").value)
        assert other != neuron
        assert neuron in RIGHT.kept or other == RIGHT.home(neuron)


def test_many_networks_are_trained_when_asked():
    app = learn(lesson_hidden="5")
    before = len(app.get("plotly_chart"))
    app.toggle(key="lesson_many").set_value(True).run()
    assert not app.exception
    assert len(app.get("plotly_chart")) == before + 1


@pytest.mark.parametrize(
    "query",
    [
        {"lesson_hidden": "99"},
        {"lesson_stay": "0"},
        {"lesson_hidden": "4", "lesson_stay": "6"},
        {"lesson_seed": "-1"},
        {"lesson_seed": "abc"},
        {"lesson_criterion": "chip"},
        {"lesson_p": "3"},
        {"lesson_neuron": "77"},
        {"lesson_other": "0"},
        {"lesson_many": "perhaps"},
    ],
)
def test_a_bad_link_falls_back_to_defaults(query):
    app = learn(**query)
    assert not app.exception
    assert not app.error
    assert "Share and reproduce" in text(app)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("3.w1", "invalid change '3.w1'"),
        ("<script>", "invalid change"),
        ("9.w1=1", "neurons are"),
        ("1.w9=1", "weights are"),
        ("1.w1=99", "between -3 and 3"),
    ],
)
def test_bad_changes_give_one_line_and_leave_the_network(changes, says):
    app = learn(lesson_changes=changes)
    assert not app.exception
    assert says in app.error[0].value
    assert "\n" not in app.error[0].value
    assert sums(app) == sums(learn())
    weight(app, "w₁").set_value(1.0).run()
    assert not app.error


def test_a_network_of_nothing_is_drawn():
    silent = " ".join(f"{i}.{name}=0" for i in range(4) for name in toy_network.WEIGHTS)
    app = learn(lesson_hidden="4", lesson_stay="2", lesson_changes=silent)
    assert not app.exception
    assert "Share and reproduce" in text(app)
