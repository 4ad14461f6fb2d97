"""Files that people hand us name themselves in errors; files that we write appear whole."""

import ast
import json
from pathlib import Path

import pytest

from utils.files import (
    decode_text,
    read_bytes,
    read_json,
    read_jsonl,
    read_object,
    short_name,
    shown,
    some_of,
    whole_file,
    whole_number,
    write_json,
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_in_unicode_encodings_is_read(encoding):
    assert decode_text("café 蓝色 😀".encode(encoding), "f") == "café 蓝色 😀"


@pytest.mark.parametrize(
    ("text", "encoding"), [("蓝色的杯子", "gbk"), ("青いカップ", "cp932"), ("синяя чашка", "cp1251"), ("żółty", "cp1250")]
)
def test_text_in_another_encoding_is_refused_even_where_cp1252_is_allowed(text, encoding):
    for cp1252 in (False, True):
        with pytest.raises(ValueError, match="f, line 2: is no UTF-8 text"):
            decode_text(b"first\n" + text.encode(encoding), "f", cp1252)


def test_western_text_of_windows_is_read_where_it_is_allowed():
    assert decode_text("the dog’s café".encode("cp1252"), "f", cp1252=True) == "the dog’s café"
    with pytest.raises(ValueError, match="save it as UTF-8"):
        decode_text("the dog’s café".encode("cp1252"), "f")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>403</html>", "web page"),
    ],
)
def test_what_is_no_content_is_named(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json .*{message}"):
        read_bytes(tmp_path / "x.json")


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError, match="a.json does not exist"):
        read_bytes(tmp_path / "a.json")


@pytest.mark.parametrize("content", ['{"a": ', "[" * 100_000, "[1, 2}"])
def test_broken_json_names_its_file(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="x.json is no"):
        read_json(tmp_path / "x.json")


def test_an_object_is_wanted(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"x.json: must be a JSON object .* found \[1\]"):
        read_object(tmp_path / "x.json")


def test_json_lines_name_their_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"b": ')
    lines = read_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="x.jsonl, line 3"):
        list(lines)


@pytest.mark.parametrize("value", ["48", None, True, 4.5, float("nan"), float("inf"), -1, 0, 10**10, [4], 10**400])
def test_only_whole_numbers_in_range_are_sizes(value):
    with pytest.raises(ValueError, match="height: must be a whole number from 1"):
        whole_number(value, "height")


def test_a_number_without_fraction_is_whole():
    assert whole_number(48.0, "height") == 48 and isinstance(whole_number(48.0, "height"), int)


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), whole_file(file) as out:
        out.write("half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_half_a_surrogate_pair_survives_in_json(tmp_path):
    write_json(tmp_path / "x.json", {"name": "a\udcff蓝"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "a\udcff蓝"}


# ------------------------------------------------------------------------------------------------ the whole repository

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "dataset", "model", "scripts", "utils")
PRODUCT = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))])


def opened_without_encoding(source: str) -> list[int]:
    """Lines on which a text file is opened in the encoding of the locale: what ruff's PLW1514 looks for, of any object."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        name = node.func.id if isinstance(node.func, ast.Name) else None
        owner = node.func.value.id if method and isinstance(node.func.value, ast.Name) else None
        mode = node.args[1:2] if name == "open" else node.args[:1]
        mode += [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
        binary = any(isinstance(value, ast.Constant) and "b" in str(value.value) for value in mode)
        opens = (name == "open" or method == "open") and owner not in ("Image", "archive", "gzip", "os", "zipfile") and not binary
        if opens or (method == "read_text" and not node.args) or (method == "write_text" and len(node.args) == 1):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("file", PRODUCT, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_text_file_is_opened_as_utf_8(file):
    assert opened_without_encoding(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("open(x)", [1]), ("\nopen(x, 'w')", [2]), ("open(x, 'rb')", []), ("open(x, encoding='utf-8')", []), ("p.open()", [1]),
        ("p.open('a')", [1]), ("p.open(mode='wb')", []), ("(a / b).read_text()", [1]), ("p.write_text(x)", [1]),
        ("p.write_text(x, encoding='utf-8')", []), ("write_text(p, x)", []), ("Image.open(p)", []),
    ],
)  # fmt: skip
def test_what_opens_a_text_file_is_found(source, lines):
    assert opened_without_encoding(source) == lines


@pytest.mark.parametrize("text", ["a" * 120, "a" * 121, "蓝" * 40, "蓝" * 41, "😀" * 100, "é" * 200, "\udcff" * 100, ""])
def test_a_short_name_has_few_bytes_and_tells_long_ones_apart(text):
    short = short_name(text)
    assert len(short.encode("utf-8", "surrogatepass")) <= 120
    assert (short == text) == (len(text.encode("utf-8", "surrogatepass")) <= 120)
    assert short == text or short != short_name(text + "x")


@pytest.mark.parametrize(
    "value", [5, "a", "a\0b", None, [], (), (1,), (1, 2), {}, {"a": [1, {"b": ()}], 2: None}, [1.5, True], {1, 2}, b"a"]
)
def test_a_short_value_is_shown_as_python_writes_it(value):
    assert shown(value) == repr(value)


def nested(times, how):
    value = ["a" * 10]
    for _ in range(times):
        value = how(value)
    return value


@pytest.mark.parametrize(
    ("value", "begins"),
    [
        (nested(5000, lambda value: [value]), "[[["), (nested(5000, lambda value: (value,)), "((("),
        (nested(5000, lambda value: {"k": value}), "{'k': {'k'"), (nested(40, lambda value: [value] * 10), "[[["),
        (10**5000, "a number of 16610 bits"), ([1, 10**5000], "[1, a number of"),
    ],
    ids=["lists", "tuples", "objects", "lists of ten", "a number", "a number in a list"],
)  # fmt: skip
def test_a_value_without_end_is_shown_at_once(value, begins):
    assert shown(value).startswith(begins) and len(shown(value)) < 110


def test_a_list_that_holds_itself_is_shown():
    value = [1]
    value.append(value)
    assert shown(value).startswith("[1, [1, [1, ")


@pytest.mark.parametrize(
    "count, told", [(0, ""), (1, "0"), (2, "0; 1"), (3, "0; 1; and 1 more")]
)
def test_of_many_texts_the_first_are_told_and_the_rest_counted(count: int, told: str) -> None:
    assert some_of([str(n) for n in range(count)], most=2) == told
