"""Pictures of advice: every option and setting stands where its numbers say."""

from tests.gallery import JUDGED, OPTIONS, REACHED, picture_of
from tests.pictures import points, tick_names


def lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_options_stand_by_their_tau_with_what_was_known_forecast_and_reached():
    (ax,) = picture_of("advice").axes
    assert tick_names(ax.yaxis) == [
        "N 16, K 7, 2 rows",
        "N 4, K 7, 8 rows",
        "N 4, K 4, 2 rows",
        "N 96, K 15, 8 rows",
    ]
    assert ax.yaxis_inverted()
    order = [1, 2, 0, 3]
    for label, name in (("expected", "tau"), ("before pilots", "prior")):
        table = OPTIONS.iloc[order]
        assert points(lines(ax)[label]) == [[x, i] for i, x in enumerate(table[name])]
    assert points(lines(ax)["its pilot alone"]) == [[2.6, 0], [2.0, 1]]
    reached = REACHED["held_out"].iloc[order]
    assert points(lines(ax)["really reached"]) == [[x, i] for i, x in enumerate(reached)]
    (bars,) = ax.collections
    ends = [[low[0], high[0]] for low, high in bars.get_segments()]
    assert ends == OPTIONS.iloc[order][["low", "high"]].to_numpy().tolist()


def test_without_pilots_the_best_options_stand_alone():
    (ax,) = picture_of("advice without pilots").axes
    assert set(lines(ax)) == {"expected"}
    assert len(tick_names(ax.yaxis)) == 3


def test_each_setting_has_the_loss_of_each_advisor_with_its_interval():
    (ax,) = picture_of("judged").axes
    assert tick_names(ax.yaxis) == ["all, 20 s", "code, 200,000 slots"]
    for i, (advisor, own) in enumerate(JUDGED.groupby("advisor", sort=False)):
        found = points(lines(ax)[advisor])
        assert [x for x, _ in found] == own["lost"].tolist()
        assert [round(y) for _, y in found] == [0, 1]
        ends = [[low[0], high[0]] for low, high in ax.collections[i].get_segments()]
        assert ends == own[["low", "high"]].to_numpy().tolist()
    assert lines(ax)["pilot"].get_marker() != lines(ax)["coverage"].get_marker()
    assert [tick for tick in tick_names(ax.xaxis) if tick][0].endswith("%")
