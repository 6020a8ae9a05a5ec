"""The protocol lm-eval: tasks over local files in the real harness, and refusals without it."""

import importlib.util
import json
import math
import re

import pytest
import torch

import tensorfold
from documents import blocks
from tensorfold.errors import InputError, TensorfoldError
from tensorfold.evaluation import lm_eval
from tensorfold.evaluation.lm_eval import HarnessEvaluation, _origin, check_tasks, evaluate_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'tensorfold[lm-eval]'"
)

PAGES = """
task: tiny_pages
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
metadata: {version: 1.0}
"""
LAST_WORD = """
task: tiny_last_word
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{page.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+page.split(' ')[-1]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
DOCUMENTS = (
    "The quick brown fox jumps over the lazy dog",
    "A good tool does one thing well, says what went wrong, and leaves nothing half done behind it",
)


@pytest.fixture
def task_directory(tmp_path, monkeypatch):
    """Two tasks over one local file, and a data set cache of the test's own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "tasks"
    directory.mkdir()
    data = directory / "pages.jsonl"
    data.write_text("".join(json.dumps({"page": document}) + "\n" for document in DOCUMENTS))
    for name, task in {"pages": PAGES, "last_word": LAST_WORD}.items():
        (directory / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    return directory


@torch.no_grad()
def log_likelihood(model, tokenizer, document):
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(document)["input_ids"]]])
    losses = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    return losses.gather(1, ids[0, 1:, None]).sum().item(), ids.shape[1] - 1


@needs_harness
def test_tasks_of_local_files(command, folded_directory, tokenizer, task_directory, tmp_path):
    """One run of the command over both tasks: its JSON, and its numbers against a loop that shares no code."""
    outcome = command(
        "eval", folded_directory, "--protocol", "lm-eval", "--tasks", "tiny_pages, tiny_last_word",
        "--include-path", task_directory, "--json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("\n") == 1
    result = json.loads(outcome.out)
    contract = {"perplexity", "tokens", "protocol", "text", "seconds", "parameters"}
    assert contract | {"results", "versions"} <= result.keys()
    model = tensorfold.load(folded_directory)
    scores = [log_likelihood(model, tokenizer, document) for document in DOCUMENTS]
    words = sum(len(document.split()) for document in DOCUMENTS)
    expected = math.exp(-sum(score for score, _ in scores) / words)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert result["results"]["tiny_pages"]["word_perplexity"] == result["perplexity"]
    assert set(result["results"]["tiny_last_word"]) == {"acc", "acc_stderr"}
    assert result["accuracy"] is None
    assert (result["protocol"], result["text"]) == ("lm-eval", "tiny_pages,tiny_last_word")
    assert result["tokens"] > sum(tokens for _, tokens in scores)
    assert result["parameters"] == model.num_parameters()
    assert result["versions"]["tiny_last_word"] == 2.0
    assert result["versions"]["lm_eval"]


@needs_harness
def test_a_task_without_perplexity_has_none(folded_directory, tokenizer, task_directory):
    model = tensorfold.load(folded_directory).train()
    result = tensorfold.evaluate(
        model, tokenizer, protocol="lm-eval", tasks=["tiny_last_word"], include_path=task_directory, limit=1
    )
    assert isinstance(result, HarnessEvaluation)
    assert result.perplexity is None
    assert result.accuracy == result.results["tiny_last_word"]["acc"]
    assert result.text == "tiny_last_word (first 1 documents)"
    assert model.training
    assert "tiny_last_word: acc" in str(result)


@needs_harness
def test_logits_that_are_no_numbers_have_no_accuracy(folded_directory, tokenizer, task_directory):
    """NumPy calls the first NaN the largest, so that the harness would score a task by its first choices."""
    model = tensorfold.load(folded_directory)
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(TensorfoldError, match=r"not numbers; model.norm.weight holds NaN") as error:
        evaluate_tasks(model, tokenizer, ["tiny_last_word"], include_path=task_directory)
    assert not isinstance(error.value, InputError)


@needs_harness
def test_data_that_cannot_be_had_is_named(folded_directory, tokenizer, task_directory):
    (task_directory / "pages.jsonl").unlink()
    with pytest.raises(InputError, match=r"tiny_pages: cannot be loaded .*include path"):
        evaluate_tasks(tensorfold.load(folded_directory), tokenizer, ["tiny_pages"], include_path=task_directory)


def test_only_what_datasets_wraps_is_unwrapped():
    """The error names a data set that cannot be reached, not the socket below it."""
    exceptions = pytest.importorskip("datasets.exceptions")
    wrapped = exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    wrapped.__cause__ = ValueError("JSON parse error in row 1")
    unreachable = ConnectionError("Couldn't reach 'some/pages' on the Hub")
    unreachable.__cause__ = OSError("Name or service not known")
    assert _origin(wrapped) is wrapped.__cause__
    assert _origin(unreachable) is unreachable


@needs_harness
def test_data_that_cannot_be_read_are_one_line(command, folded_directory, task_directory):
    """The error says what is wrong with a file, and the harness prints nothing beside it."""
    (task_directory / "pages.jsonl").write_text('{"page": "a"}\n{"page": \n')
    arguments = ("--protocol", "lm-eval", "--tasks", "tiny_pages", "--include-path", task_directory)
    outcome = command("eval", folded_directory, *arguments)
    assert outcome.status == 2
    *before, last = outcome.err.strip().splitlines()
    assert re.match(r"tensorfold: lm-eval tiny_pages: cannot be loaded .*JSON", last)
    assert not [line for line in before if "examples/s]" not in line]


@needs_harness
def test_the_task_in_the_documentation_runs(folded_directory, tokenizer, task_directory):
    [task] = [block.text for block in blocks("docs/tools.md") if block.language == "yaml"]
    (task_directory / "own.yaml").write_text(task.replace("/data/", f"{task_directory}/"))
    result = evaluate_tasks(tensorfold.load(folded_directory), tokenizer, ["my_task"], include_path=task_directory)
    assert result.perplexity is not None


@needs_harness
def test_an_unknown_task_is_offered_the_nearest(monkeypatch, folded_directory, tokenizer, task_directory):
    import lm_eval.tasks

    # The harness's own fourteen thousand names take many seconds to index.
    make = lm_eval.tasks.TaskManager.__init__
    monkeypatch.setattr(
        lm_eval.tasks.TaskManager, "__init__", lambda self, **o: make(self, **{**o, "include_defaults": False})
    )
    with pytest.raises(InputError, match="no task 'tiny_page'; did you mean 'tiny_pages'"):
        evaluate_tasks(tensorfold.load(folded_directory), tokenizer, ["tiny_page"], include_path=task_directory)


def test_without_the_package_the_message_is_the_command(refused, monkeypatch, dense_directory):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    refused(
        "eval",
        dense_directory,
        "--protocol",
        "lm-eval",
        "--tasks",
        "wikitext",
        says=["pip install 'tensorfold[lm-eval]'"],
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--protocol", "lm-eval"), ["nothing to evaluate on", "wikitext"]),
        (("--protocol", "lm-eval", "--tasks", "wikitext", "--text", "x"), ["--text has no effect", "not lm-eval"]),
        (("--protocol", "lm-eval", "--tasks", "wikitext", "--max-tokens", "9"), ["--max-tokens has no effect"]),
        (("--protocol", "lm-eval", "--tasks", " ,"), ["needed names of tasks, such as wikitext"]),
        (("--text", "x", "--tasks", "wikitext"), ["--tasks has no effect", "lm-eval"]),
        (("--text", "x", "--limit", "3"), ["--limit has no effect"]),
        ((), ["nothing to evaluate on", "needed a text"]),
        (("--protocol", "lm-evil", "--text", "x"), ["did you mean 'lm-eval'?"]),
    ],
)
def test_text_or_tasks(refused, dense_directory, arguments, says):
    refused("eval", dense_directory, *arguments, says=says)


def test_tasks_are_checked_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    assert check_tasks([" wikitext "], None, 3) == ["wikitext"]
    with pytest.raises(InputError, match="no such directory"):
        check_tasks(["wikitext"], tmp_path / "absent", None)
    with pytest.raises(InputError, match="limit=0"):
        check_tasks(["wikitext"], None, 0)


@needs_harness
def test_requests_of_like_length_are_scored_together_with_the_same_result(
    monkeypatch, folded_directory, tokenizer, task_directory
):
    """A batch holds as many of the longest left as its logits allow; each document's likelihood stays its own."""
    data, shapes = task_directory / "pages.jsonl", []
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    pages = [" ".join(words[:count]) for count in (12, 3, 7, 4, 12, 3, 5)]
    data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    model = tensorfold.load(folded_directory)
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))

    def results(batch_size):
        shapes.clear()
        found = evaluate_tasks(
            model, tokenizer, ["tiny_pages", "tiny_last_word"], include_path=task_directory, batch_size=batch_size
        )
        return found.results, list(shapes)

    one, alone = results(1)
    assert {rows for rows, _ in alone} == {1}
    most = 2 * max(length for _, length in alone)
    monkeypatch.setattr(lm_eval, "_LOGITS_BYTES", 4 * model.config.vocab_size * most)
    together, batches = results(None)
    assert together == {task: pytest.approx(values, rel=1e-5) for task, values in one.items()}
    assert all(rows * length <= most or rows == 1 for rows, length in batches)
    assert max(rows for rows, _ in batches) > 2
    assert sum(rows for rows, _ in batches) == len(alone)


@needs_harness
def test_likelihoods_are_added_up_in_float32(folded_directory, tokenizer, task_directory):
    """Of a model in bfloat16 too, where a sum of tens of nats would be rounded to quarters."""
    model = tensorfold.load(folded_directory).bfloat16()
    found = evaluate_tasks(model, tokenizer, ["tiny_pages"], include_path=task_directory)
    scores = [log_likelihood(model, tokenizer, document)[0] for document in DOCUMENTS]
    words = sum(len(document.split()) for document in DOCUMENTS)
    assert found.perplexity == pytest.approx(math.exp(-sum(scores) / words), rel=1e-5)
