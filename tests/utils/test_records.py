"""Evaluations recorded beside a model: appended whole, and read even where other lines are damaged."""

import errno
import json
import os

import pytest

from tensorfold.errors import InputError, TensorfoldError
from tensorfold.utils.records import EVALUATIONS, check_recordable, read_lines, read_object, record_evaluation


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_records_are_appended_in_order(directory):
    for number in range(3):
        record_evaluation(directory, {"perplexity": number})
    assert read_lines(directory / EVALUATIONS) == ([{"perplexity": number} for number in range(3)], 0)


def test_a_torn_line_costs_only_itself(directory):
    (directory / EVALUATIONS).write_text('{"perplexity": 1}\n{"perpl')
    record_evaluation(directory, {"perplexity": 2})
    assert read_lines(directory / EVALUATIONS) == ([{"perplexity": 1}, {"perplexity": 2}], 1)


def test_a_full_disk_is_named_and_the_next_record_survives_it(directory, monkeypatch):
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
        with pytest.raises(TensorfoldError, match="disk is full"):
            record_evaluation(directory, {"perplexity": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(TensorfoldError, match="disk is full"):
            record_evaluation(directory, {"perplexity": 1})
    record_evaluation(directory, {"perplexity": 2})
    assert read_lines(directory / EVALUATIONS) == ([{"perplexity": 2}], 1)


def test_only_a_models_directory_takes_records(tmp_path):
    for path in (tmp_path, tmp_path / "absent", "smollm2-135m"):
        with pytest.raises(InputError, match=r"config\.json"):
            check_recordable(path)
    assert os.listdir(tmp_path) == []


def test_a_directory_in_the_files_place_is_refused(directory):
    (directory / EVALUATIONS).mkdir()
    with pytest.raises(InputError, match="not a file"):
        record_evaluation(directory, {})


def test_eval_asks_for_a_directory_before_it_works(refused, monkeypatch, tmp_path, text_file):
    monkeypatch.chdir(tmp_path)
    refused("eval", "smollm2-135m", "--text", text_file, "--record", says=["smollm2-135m", "config.json"])


def test_objects(tmp_path):
    file = tmp_path / "a.json"
    assert read_object(file) is None
    file.write_text(json.dumps({"a": 1}))
    assert read_object(file) == {"a": 1}
    for content in ("[]", "{", "[" * 100_000):
        file.write_text(content)
        with pytest.raises(InputError, match=r"a\.json"):
            read_object(file)
