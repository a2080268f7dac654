"""The line of every table and key of a TOML text."""

from __future__ import annotations

from textwrap import dedent

from builder.manifest.document import find_lines


def test_find_lines_of_every_form_of_key() -> None:
    text = dedent('''\
        a = """
        b = 1
        """ # c = 1
        "quoted key" = [
          1, # d = 1
          { e = 1 },
        ]
        f.g = '\\'
        [t . u]
        h = { i = 1 }
        [[x]]
        [[x]]
        j = """a\\"""b"""
        [x.y]
        k = 1
        [[x.z]]
        l = 1
        ''')
    lines = find_lines(text)
    assert lines == {
        ("a",): 1,
        ("quoted key",): 4,
        ("f", "g"): 8,
        ("t", "u"): 9,
        ("t", "u", "h"): 10,
        ("x", 0): 11,
        ("x", 1): 12,
        ("x", 1, "j"): 13,
        ("x", 1, "y"): 14,
        ("x", 1, "y", "k"): 15,
        ("x", 1, "z", 0): 16,
        ("x", 1, "z", 0, "l"): 17,
    }
