"""The table of `scale`, from rows made by hand."""

from __future__ import annotations

from asyncscale.bench.table import Row, markdown_table, plain_table

ROWS = [
    Row("serve", "TTFT", {"p50": 31.26, "p99": 52.0}, "{p50:.1f} / {p99:.0f} ms", "40 / 100 ms", True),
    Row("serve", "requests lost", {"lost": 2}, "{lost}", "0", False),
    Row("idle", "CPU", {"cpu": None}, "{cpu:.1f} ms"),
]


def test_columns_are_aligned_and_a_section_is_named_once() -> None:
    assert plain_table(ROWS).splitlines() == [
        "section  what           measured      target       met",
        "-------  -------------  ------------  -----------  ---",
        "serve    TTFT           31.3 / 52 ms  40 / 100 ms  yes",
        "         requests lost  2             0            no",
        "idle     CPU            nan ms",
    ]


def test_markdown_has_the_same_cells() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| section | what | measured | target | met |",
        "| --- | --- | --- | --- | --- |",
        "| serve | TTFT | 31.3 / 52 ms | 40 / 100 ms | yes |",
        "|  | requests lost | 2 | 0 | no |",
        "| idle | CPU | nan ms |  |  |",
    ]


def test_plain_values_keep_every_figure_unrounded() -> None:
    assert ROWS[0].to_dict() == {
        "section": "serve",
        "what": "TTFT",
        "figures": {"p50": 31.26, "p99": 52.0},
        "measured": "31.3 / 52 ms",
        "target": "40 / 100 ms",
        "met": True,
    }
    assert ROWS[2].to_dict()["figures"] == {"cpu": None}
