"""JSON-lines files: written complete or not at all, and resumed by a run that was stopped."""

from __future__ import annotations

import json

import pytest

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import jsonl


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"b": "é"}', encoding="utf-8")
    assert list(jsonl.read(path)) == [{"a": 1}, {"b": "é"}] and jsonl.read_header(path) == {"a": 1}
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(UserError, match="a.jsonl, line 2: is not a JSON object"):
        list(jsonl.read(path))
    for text in ("[1]\n", "nonsense", ""):
        path.write_text(text)
        assert jsonl.read_header(path) == {}
    with pytest.raises(UserError, match="none cannot be read as JSON lines"):
        list(jsonl.read(tmp_path / "none"))
    assert jsonl.read_header(tmp_path / "none") == {}


def test_a_complete_file_has_one_writer(tmp_path):
    path = tmp_path / "a.jsonl"
    with jsonl.complete_file(path, {"of": 1}) as write:
        with (
            pytest.raises(UserError, match="a.jsonl is being written by another run; .* another --output"),
            jsonl.complete_file(path, {"of": 2}),
        ):
            pass
        write({"text": "\ud800"})
        assert not path.exists()
    assert list(jsonl.read(path)) == [{"of": 1}, {"text": "\ud800"}]
    with pytest.raises(KeyboardInterrupt), jsonl.complete_file(path, {"of": 3}):
        raise KeyboardInterrupt
    assert jsonl.read_header(path) == {"of": 1} and names(tmp_path) == ["a.jsonl"]


def test_append_file(tmp_path):
    path, seen = tmp_path / "a.jsonl", []

    def replay(number, span, record):
        seen.append((number, span, record))

    file = jsonl.AppendFile(path, replay)
    spans = [file.append({"n": n, "text": "é"}) for n in range(3)]
    assert [file.read(span)["n"] for span in spans] == [0, 1, 2]
    with pytest.raises(UserError, match="is being written by another run"):
        jsonl.AppendFile(path, replay)
    file.close()
    complete = path.read_bytes()
    for cut in range(len(complete) + 1):  # only a torn last line is lost, wherever it was torn
        path.write_bytes(complete[:cut])
        seen.clear()
        file = jsonl.AppendFile(path, replay)
        assert [number for number, *_ in seen] == list(range(1, complete[:cut].count(b"\n") + 1))
        assert [span for _, span, _ in seen] == spans[: len(seen)] and file.size == len(path.read_bytes())
        file.append({"after": cut})
        file.close()
        assert json.loads(path.read_bytes().splitlines()[-1]) == {"after": cut}
    path.write_bytes(b"{}\nbroken\n{}\nto")
    with pytest.raises(UserError, match="line 2: is not a JSON object; remove that line, or choose another"):
        jsonl.AppendFile(path, replay)
    assert path.read_bytes() == b"{}\nbroken\n{}\nto", "a file of others stays as it is"
    path.unlink()
    jsonl.AppendFile(path, replay).close()
    assert not names(tmp_path), "a file without lines is removed"


def test_a_resumable_file_gets_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "below" / "a.jsonl"
    with pytest.raises(RuntimeError), jsonl.ResumableFile(path, keep=("n",)) as file:
        file.add({"n": 1, "text": "long"})
        raise RuntimeError
    assert names(path.parent) == ["a.jsonl.part"]
    with file.part.open("ab") as torn:
        torn.write(b'{"n": 2, ')
    with jsonl.ResumableFile(path, keep=("n",)) as file:
        assert file.done == [{"n": 1}]
        file.add({"n": 2, "text": "é"})
    complete = '{"n": 1, "text": "long"}\n{"n": 2, "text": "é"}\n'
    assert path.read_text(encoding="utf-8") == complete and names(path.parent) == ["a.jsonl"]
    # More lines are added to a complete file; it has its name again even if that fails.
    with pytest.raises(RuntimeError), jsonl.ResumableFile(path, keep=()) as file:
        assert len(file.done) == 2
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == complete and names(path.parent) == ["a.jsonl"]
