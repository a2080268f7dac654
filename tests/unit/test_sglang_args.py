"""The reader of a server's command line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import sglang_args
from tests.strategies import FUZZ


def test_value_repeated_option_last_counts() -> None:
    assert sglang_args.value(["--port", "1", "--port=2"], sglang_args.PORT) == "2"
    assert sglang_args.value(["--port"], sglang_args.PORT) is None
    assert sglang_args.number(["--port", "x"], sglang_args.PORT, 7) == 7


def test_dummy_weights_drop_loader_config_and_keep_overrides() -> None:
    argv = [
        "--tp",
        "8",
        "--model-loader-extra-config",
        '{"a": 1}',
        '--json-model-override-args={"b": 2}',
        "--load-format=auto",
    ]
    words = sglang_args.with_dummy_weights(argv, {"num_hidden_layers": 4})
    assert sglang_args.value(words, sglang_args.LOADER_CONFIG) is None
    assert sglang_args.value(words, sglang_args.LOAD_FORMAT) == "dummy"
    assert json.loads(sglang_args.value(words, sglang_args.OVERRIDES) or "") == {"b": 2, "num_hidden_layers": 4}
    assert words[:2] == ["--tp", "8"]
    assert sglang_args.value(sglang_args.with_dummy_weights(argv, {}), sglang_args.OVERRIDES) == '{"b": 2}'


@pytest.mark.parametrize(
    ("argv", "size"),
    [
        ([], 8192),
        (["--chunked-prefill-size", "4096"], 4096),
        (["--dp", "8", "--enable-dp-attention"], 1024),
        (["--dp", "8"], 8192),
        (["--attn-dp-size", "8"], 1024),
        (["--chunked-prefill-size=-1", "--dp-size=2", "--enable-dp-attention"], -1),
    ],
)
def test_chunked_prefill_size_is_divided_by_dp_attention(argv: list[str], size: int) -> None:
    assert sglang_args.chunked_prefill_size(argv, 8192) == size


def test_split_keeps_front_values_and_rest() -> None:
    front, options, rest = sglang_args.split(["front", "--tp-size=8", "--bs", "1", "-1", "-v", "--", "--tp", "2"])
    assert (front, rest) == (["front"], ["--", "--tp", "2"])
    assert [(option.name, option.spelt, option.values) for option in options] == [
        ("--tp", "--tp-size", ("8",)),
        ("--bs", "--bs", ("1", "-1")),
        ("-v", "-v", ()),
    ]


def test_without_drops_options_with_their_value() -> None:
    argv = ["--a", "1", "--b=2", "--c", "--a=3", "4"]
    assert sglang_args.without(argv, ("--a", "--b")) == ["--c", "4"]


@pytest.mark.parametrize(
    ("argv", "tp"), [("--tp 8", 8), ("--tensor-parallel-size=4", 4), ("", 1), ("--tp x", 1), ("--tp 99999", 1)]
)
def test_degree_is_one_where_none_is_set(argv: str, tp: int) -> None:
    assert sglang_args.degree(argv.split(), "tp") == tp


@pytest.mark.parametrize(
    ("argv", "normal"),
    [
        ("", ""),
        ("--tp 8 --dp 2", "--dp 2 --tp 8"),
        ("--tp=8 --dp=2", "--dp 2 --tp 8"),
        ("--flag --tp 8", "--flag --tp 8"),
        ("--bs 4 2 1 --a", "--a --bs 4 2 1"),
        ("--x 2 --a --x 1", "--a --x 2 --x 1"),
        ("--x=1 --x=2", "--x 1 --x 2"),
        ("front --b --a", "front --a --b"),
        ("--seed -1 --a", "--a --seed -1"),
        ("--seed=-1 --a", "--a --seed -1"),
        ("--a=--b", "--a=--b"),
        ("--b --a=--c", "--a=--c --b"),
        ("--b -- --a", "--b -- --a"),
        ("-v --a -", "--a - -v"),
        ("--json={\"a\":=1}", "--json {\"a\":=1}"),
        ("--a=", "--a "),
    ],
)  # fmt: skip
def test_normalised(argv: str, normal: str) -> None:
    wanted = normal.split(" ") if normal else []
    assert sglang_args.normalised(argv.split(" ") if argv else []) == wanted
    assert sglang_args.normalised(wanted) == wanted


@FUZZ
@given(
    options=st.lists(st.tuples(st.sampled_from("abcd"), st.lists(st.sampled_from("123"), max_size=2)), max_size=6),
    data=st.data(),
)
def test_normalised_order_counts_among_repeats_only(options: list[tuple[str, list[str]]], data: st.DataObject) -> None:
    first: dict[str, list[list[str]]] = {}
    for name, values in options:
        first.setdefault(name, []).append(values)
    order = data.draw(st.permutations([name for name, _ in options]))
    shuffled = [(name, first[name].pop(0)) for name in order]

    def spell(pairs: list[tuple[str, list[str]]]) -> list[str]:
        return [word for name, values in pairs for word in (f"--{name}", *values)]

    assert sglang_args.normalised(spell(options)) == sglang_args.normalised(spell(shuffled))


@FUZZ
@given(
    st.lists(
        st.one_of(st.sampled_from(["--a", "--a=b", "-x", "-1", "--", "--a=--b", "c"]), st.text(max_size=4)), max_size=8
    )
)
def test_normalised_twice_is_normalised_once(argv: list[str]) -> None:
    once = sglang_args.normalised(argv)
    assert sglang_args.normalised(once) == once
    assert "".join(sorted("".join(argv).replace("=", ""))) == "".join(sorted("".join(once).replace("=", "")))
