"""The Learn page: the method in six steps, on a network small enough to show completely."""

import numpy as np
import streamlit as st

from intrafusion import registry
from intrafusion.pruning.transport.provenance import story
from intrafusion.reporting.figures import toy_network as pictures
from intrafusion.reporting.figures.importance import importance_bars
from intrafusion.studies import toy_network
from pages.panels import learn as parts
from pages.panels.learn import fraction, lesson_chart, number_table, numbered, onwards, plus, quiz, step, two
from pages.shared import links, open_model
from pages.shared.navigation import enter_app
from pages.shared.parts import group_curve_line, is_dark, take_away

_PLACE = (-1.0, 0.5)  # coordinates of the star in step 1

enter_app()
here: open_model.Here = st.session_state.here
dark = is_dark()
st.markdown(
    "This page applies the method to a network that is small enough to show completely. Choose a neuron or drag a weight in the "
    "bar at the bottom, and every step is computed again. The functions are the same as for real networks with thousands of "
    "neurons, which are called *channels* there."
)
seed, hidden, changes, stay, criterion, p = parts.setting()
neuron = parts.neuron_bar(seed, hidden, changes)
made = parts.opened_lesson(seed, hidden, changes, stay, criterion, p)
plan, kept, home = made.plan, made.kept, made.home(neuron)
column = kept.index(home)
rows, fused = toy_network.numbers(made.dense), toy_network.numbers(made.fused)
everyone = list(range(hidden))
w1, w2, b, v1, v2 = rows[neuron].tolist()

step(
    "1 · The neurons",
    "The output of a neuron is $h = \\max(0,\\ w_1 x_1 + w_2 x_2 + b)$. It contributes to the classes *outer* and *inner* with "
    "the outgoing weights $v_1$ and $v_2$. In the plane of the inputs, a neuron is a line: inactive on one side and active on "
    "the other, where its disc is drawn. **Neurons whose discs are close together compute nearly the same function.**",
)
cloud = tuple(part.numpy() for part in toy_network.toy_points())
left, right = two()
with left:
    title = f"Two inputs, {hidden} neurons, two classes"
    lesson_chart(pictures.network(rows.numpy(), everyone, "dense", neuron, title, dark), "network", "lesson_neuron")
with right:
    title = f"Neuron {neuron} is active on the shaded side"
    picture = pictures.neuron_plane(cloud, rows.numpy(), everyone, ["dense"] * hidden, neuron, title, _PLACE, dark)
    lesson_chart(picture, "plane", "lesson_neuron")
left, right = two()
with left:
    start = toy_network.numbers(parts.trained(seed, hidden))
    lines = []
    for i, (row, was) in enumerate(zip(rows.tolist(), start.tolist(), strict=True)):
        cells = [f"**{value:.2f}**" if value != old else f"{value:.2f}" for value, old in zip(row, was, strict=True)]
        lines.append([f"**{i}**" if i == neuron else f"{i}", *cells])
    number_table(["neuron", *parts.SIGNS], lines)
    own = toy_network.output_bias(made.dense).tolist()
    st.caption(
        f"Trained on 200 points, then rounded to two decimals so that you can check by hand. The class biases are {own[0]:.2f} "
        f"(outer) and {own[1]:.2f} (inner)." + (" Bold weights are your changes." if changes else "")
    )
with right:
    gives, summed = float(toy_network.toy_activations(made.dense, _PLACE)[neuron]), w1 * _PLACE[0] + w2 * _PLACE[1] + b
    quiz(
        "neuron",
        f"What is the output of neuron {neuron} at the star, where $x_1 = {_PLACE[0]:g}$ and $x_2 = {_PLACE[1]:g}$?",
        lambda given: abs(given - gives) < 0.0101,
        f"{w1:.2f} × {_PLACE[0]:g} + ({w2:.2f}) × {_PLACE[1]:g} + ({b:.2f}) = {summed:.3f}, "
        + ("and a positive sum is the output." if summed > 0 else "and the output for a negative sum is zero."),
        "Multiply each input by its weight and add the bias. If the sum is negative, the output is zero.",
    )
    onwards("overview", "layers")

step(
    "2 · Importance",
    f"A criterion gives every neuron a score. The {stay} neurons with the highest scores are kept"
    + (f", and the other {hidden - stay} are removed." if made.gone else ". These are all neurons, so nothing is pruned."),
)
left, right = two()
with left:
    picture = importance_bars(made.scores.tolist(), kept, criterion, False, neuron, dark)
    picture.update_layout(title_text=f"{stay} of {hidden} neurons are kept, {hidden - stay} removed").update_xaxes(
        title="neuron"
    )
    lesson_chart(picture.update_traces(hovertemplate="neuron %{x}<br>score %{y:.3f}<extra></extra>"), "scores", "lesson_neuron")
with right:
    if criterion in ("l1", "l2"):
        terms, power = toy_network.score_terms(made.dense, neuron, int(criterion[1])), "^2" * (criterion == "l2")
        st.markdown(
            f"For neuron {neuron}: sum the {'squared' if power else 'absolute'} incoming weights and the {'squared' if power else 'absolute'} "
            "outgoing weights, take the mean of the two sums, and divide it by the average over all neurons."
        )
        written, read = (plus(values, f"|{{:.2f}}|{power}") for values in ((w1, w2), (v1, v2)))
        st.latex(rf"\tfrac12\big[\,({written}) + ({read})\,\big] = {terms.own:.3f}")
        st.latex(rf"\text{{score of neuron {neuron}}} = \frac{{{terms.own:.3f}}}{{{terms.average:.3f}}} = {terms.score:.3f}")
    else:
        st.markdown(
            f"**{criterion}**: {registry('criterion')[criterion].summary}. Neuron {neuron} scores {made.scores[neuron]:.3f}. Choose *l1* "
            "or *l2* to see how a score is computed."
        )
    least = float(made.scores[kept].min())
    quiz(
        "importance",
        "Which of the kept neurons would be removed next?",
        lambda given: int(given) in kept and float(made.scores[int(given)]) == least,
        f"It has the lowest score of the kept neurons, {least:.3f}.",
        "Look for the lowest of the solid bars.",
        [str(i) for i in everyone],
    )
    onwards("importance", "scores")

step(
    "3 · Distance",
    "Two neurons are similar if their weight vectors have the same direction. Divide each vector $(w_1, w_2, v_1, v_2)$ by its "
    "length and compare. A distance of zero means the same direction; the bias is not used.",
)
left, right = two()
with right:
    others = [j for j in kept if j != neuron] or kept
    other = parts.other_control(neuron, kept, home if home in others else others[0])
    terms = toy_network.distance_terms(made.dense, neuron, other, p)
    number_table(
        ["neuron", "÷ length", *parts.SIGNS[:2], *parts.SIGNS[3:]],
        [
            [str(i), *numbered([length, *unit])]
            for i, length, unit in zip((neuron, other), terms.lengths, terms.units, strict=True)
        ]
        + [["**difference**", "", *numbered(terms.gaps, True)]],
    )
    total = plus(terms.gaps) if p == 1 else rf"\sqrt{{{plus(terms.gaps, '{:.2f}^2')}}}"
    st.latex(rf"\text{{distance}} = {total} = {terms.distance:.2f}")
with left:
    title = f"The distance of neuron {neuron} from neuron {other} is {terms.distance:.2f}"
    words = [numbered(line) for line in plan.cost.T.tolist()]
    picture = pictures.number_matrix(plan.cost.T.numpy(), words, kept, (neuron, other), title, None, dark)
    lesson_chart(picture, "cost", "lesson_neuron", "lesson_other")
now, then = (float(cost[neuron, kept.index(other)]) for cost in (plan.cost, toy_network.doubled_costs(made, neuron)))
outcomes = {"It halves": now / 2, "It stays the same": now, "It doubles": 2 * now}
quiz(
    "distance",
    f"Double every weight of neuron {neuron}. What happens to its distance from neuron {other}?",
    lambda given: abs(outcomes[given] - then) < 1e-9,
    f"It is {now:.2f} before and {then:.2f} after: both vectors are divided by their lengths, so only their directions matter.",
    "Both vectors are divided by their lengths before they are compared. Try it with the bar at the bottom.",
    list(outcomes),
)
onwards("transport", "distances")

share, T = fraction(1 / hidden), plan.matrix
step(
    "4 · Transport plan",
    f"Each of the {hidden} neurons starts with a mass of {share}, and each of the {stay} kept neurons has a capacity of "
    f"{fraction(1 / stay)}. The plan moves all mass to the kept neurons at the least total cost. Kept neurons keep their own mass, "
    "and removed neurons share the capacity that is left.",
)
left, right = two()
for cell, name, cells, sums, title in (
    (left, "plan", plan.coupling.T, (plan.source, plan.target), "The plan G: mass moved to each kept neuron"),
    (right, "matrix", T, (T.sum(0), T.sum(1)), f"The matrix T: G divided by {share}"),
):
    words = [[fraction(value) if value else "" for value in line] for line in cells.tolist()]
    written = tuple([fraction(value) for value in part.tolist()] for part in sums)
    with cell:
        lesson_chart(
            pictures.number_matrix(cells.numpy(), words, kept, (neuron, home), title, written, dark), name, "lesson_neuron"
        )
with left:
    priced = " + ".join(f"{fraction(move['mass'])} × {move['cost']:.2f}" for move in made.moves()) or "0"
    st.markdown(f"Total cost, mass times distance: {priced} = **{plan.total_cost:.3f}**. No other plan has a lower cost.")
with right:
    mass, weight = float(plan.coupling[neuron, column]), float(T[column, neuron])
    st.markdown(
        f"{parts.fate(story(plan, made.scores, neuron))} Its weight in neuron {home} is the mass moved there divided by its "
        f"initial mass: {fraction(mass)} ÷ {share} = **{fraction(weight)}**."
    )
crowded = made.crowded_out()
quiz(
    "plan",
    "Which neuron sends all or part of its mass to a kept neuron that is not its nearest?",
    lambda given: int(given) in crowded if given != "None" else not crowded,
    f"The nearest kept neuron has no capacity left for {'neurons' if len(crowded) > 1 else 'neuron'} "
    f"{' and '.join(map(str, crowded))}."
    if crowded
    else "The nearest kept neuron has enough capacity for each.",
    "The smallest number in a neuron's column of step 3 marks its nearest neuron. Compare it with the neuron's column in the plan.",
    [*(str(i) for i in made.gone), "None"],
)
onwards("transport", "the plan")

step(
    "5 · Fusion",
    "A kept neuron absorbs the neurons that are merged into it: its new weights are the sum of theirs and its own, each multiplied "
    "by its weight in $T$. This applies to the incoming weights, the bias and the outgoing weights.",
)
pieces = toy_network.fused_terms(made, home)
left, right = two()
with left:
    title = f"{stay} fused neurons replace {hidden}" if made.gone else f"All {stay} neurons are kept"
    lesson_chart(pictures.network(fused.numpy(), kept, "fusion", home, title, dark), "fused-network", "lesson_neuron")
with right:
    taken = np.stack([row.numpy() for _, _, row in pieces])
    title = f"Fused neuron {home} lies between the neurons that it combines"
    if len(pieces) == 1:
        title = f"Neuron {home} absorbs no other neuron"
    names, merges = kept + [i for i, _, _ in pieces], ["fusion"] * stay + ["drop"] * len(pieces)
    picture = pictures.neuron_plane(cloud, np.concatenate([fused.numpy(), taken]), names, merges, home, title, None, dark)
    lesson_chart(picture, "fused-plane", "lesson_neuron")
left, right = two()
with left:
    number_table(
        ["neuron", "weight in T", *parts.SIGNS],
        [[str(i), fraction(times), *numbered(row.tolist())] for i, times, row in pieces]
        + [[f"**fused {home}**", "", *numbered(fused[column].tolist(), True)]],
    )
    for name, place in (("w_1", 0), ("b", 2), ("v_1", 3)):
        added = " + ".join(rf"{fraction(times)} \cdot ({row[place]:.2f})" for _, times, row in pieces)
        st.latex(rf"{name} = {added} = {fused[column, place]:.2f}")
with right:
    following = kept[(column + 1) % stay]
    bias, its_pieces = float(fused[kept.index(following), 2]), toy_network.fused_terms(made, following)
    listed = " and ".join(f"neuron {i} with weight {fraction(times)}" for i, times, _ in its_pieces[1:])
    quiz(
        "fusing",
        f"Neuron {following} absorbs {listed or 'no other neuron'}. What is its bias $b$ after fusion?",
        lambda given: abs(given - bias) < 0.0101,
        " + ".join(f"{fraction(times)} × ({row[2]:.2f})" for _, times, row in its_pieces) + f" = {bias:.3f}.",
        "Take the biases from the table in step 1, multiply each by its weight in T, and add them up.",
    )
    onwards("transport", "fused channels")

networks = (made.dense, made.dropped, made.fused)
measured, star = [toy_network.measure_toy(network) for network in networks], toy_network.telling_point(made)
step(
    "6 · Accuracy",
    f"All three networks are measured on the same {measured[0].count} points, which were not used for training. A network predicts "
    "*inner* in the shaded region; crosses are misclassified points. After dropping, no neuron is active for the removed neurons. "
    "Fused neurons replace all neurons that they absorbed.",
)
fresh = tuple(part.numpy() for part in toy_network.toy_points(400, 1))
words = (("Dense", "dense"), ("Dropped", "drop"), ("Fused", "fusion"))
with st.grid(3, min_column_width=260):
    for network, result, (name, merge) in zip(networks, measured, words, strict=True):
        grid = tuple(part.numpy() for part in toy_network.decision(network))
        lesson_chart(pictures.region(grid, result, name, merge, fresh, star, dark), merge)
left, right = two()
with left:
    activity, votes = toy_network.toy_activations(made.fused, star).tolist(), toy_network.toy_outputs(made.fused, star).tolist()
    number_table(
        ["fused", *parts.SIGNS, "h at ★"],
        [[str(j), *numbered([*row.tolist(), h])] for j, row, h in zip(kept, fused, activity, strict=True)],
    )
    st.caption(f"The class biases are still {own[0]:.2f} (outer) and {own[1]:.2f} (inner): pruning does not change them.")
with right:
    quiz(
        "computes",
        f"Which class does the fused network predict at the star, where $x_1 = {star[0]:g}$ and $x_2 = {star[1]:g}$?",
        lambda given: given == toy_network.CLASSES[int(votes[1] > votes[0])],
        f"The logits are {votes[0]:.2f} for outer and {votes[1]:.2f} for inner. The larger logit is the prediction.",
        "The logit of outer is the sum of each h times its v₁, plus the class bias; for inner, use v₂. The larger logit is the "
        "prediction.",
        list(toy_network.CLASSES),
    )
    onwards("curves", "accuracy")

st.subheader("Does the result depend on the seed?")
st.markdown(
    "Yes, in part. Each seed gives another network, and for some of them fusion lowers the accuracy. The result also depends on "
    "the sizes: try 5 neurons with 3 kept, or keep a single neuron."
)
about = "Trains 24 networks with these settings, without your changes."
if st.toggle("Compare 24 seeds", key="lesson_many", bind=links.BIND, help=about):
    lesson_chart(pictures.fortunes(parts.seed_accuracies(hidden, stay, criterion, p), seed, dark), "fortunes", "lesson_seed")

take_away(
    "learn",
    parts.neuron_table(made),
    group_curve_line(here.spec.but(criterion=criterion, sparsity=made.sparsity, p=p)),
    toy_network.snippet(seed, hidden, changes, made),
    parts.KEYS,
)
