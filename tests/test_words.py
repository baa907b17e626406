"""Tables for readers."""

import numpy as np
import pandas as pd
import pytest

from dspark_lab.explore import readable


def test_columns_are_in_words_with_units_and_numbers_as_people_write_them():
    table = pd.DataFrame(
        {
            "num_anchors": [1024, 8],
            "share": [0.2451, 1.0],
            "seconds": [0.0915, 1.5],
            "memory_bytes": [25165203468, 1],
            "fits": [True, False],
            "tau": [2.216, np.nan],
            "change": [-0.5, 0.25],
            "text": [" the", "\n"],
        }
    )
    text = readable(table)
    assert text.columns.tolist() == [
        "anchors N",
        "share, %",
        "step, ms",
        "memory, GB",
        "fits",
        "tau",
        "change",
        "text",
    ]
    assert text.to_numpy().tolist() == [
        ["1,024", "24.5", "91.5", "25.17", "yes", "2.22", "−0.50", "␣the"],
        ["8", "100.0", "1,500.0", "0.00", "no", "–", "0.25", "⏎"],
    ]
    assert set(text.index) == {""}
    assert readable(table, ["tau"], digits=1).to_numpy().tolist() == [["2.2"], ["–"]]


def test_a_pivoted_table_keeps_the_order_and_names_of_its_values():
    table = pd.DataFrame({"seq_len": [512, 4096] * 2, "kind": list("aabb"), "expected": [0.1] * 4})
    wide = table.pivot(index="seq_len", columns="kind", values="expected")
    text = readable(wide, values="expected")
    assert text.index.name == "row S" and text.index.tolist() == ["512", "4,096"]
    assert text.columns.tolist() == ["a", "b"] and (text == "10.0").all(axis=None)


def test_words_of_an_index_are_not_taken_for_names_of_columns():
    table = pd.DataFrame({"budget": ["seconds", "slots"], "tau": [1.5, 2.0]}).set_index("budget")
    assert readable(table).index.tolist() == ["seconds", "slots"]


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"columns must be among \['tau'\], got \['share'\]"):
        readable(pd.DataFrame({"tau": [1.0]}), ["share"])
