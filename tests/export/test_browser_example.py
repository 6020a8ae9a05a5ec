"""The page of ``examples/browser``: its server, and in Chromium the tokens that onnxruntime gives for the same file."""

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

import tensorfold
from browser import CHROMIUM
from tensorfold import LowRank, Recipe, Rule
from tensorfold.export.engine_model import open_exported
from tensorfold.export.graphs import export_onnx
from tensorfold.export.tracing import PACKAGES

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "browser"
TRANSFORMERS = FOLDER / "node_modules" / "@huggingface" / "transformers" / "dist" / "transformers.min.js"
PROMPT = "Once upon the wall"


@pytest.fixture
def serve(tmp_path):
    """``serve(directory)``: the process of the server, and the address that it prints."""
    running = []

    def start(directory):
        command = [sys.executable, str(FOLDER / "serve.py"), str(directory), "--port", "0"]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1], running[-1].stdout.readline().strip()

    yield start
    for server in running:
        server.kill()
        server.wait()
        server.stdout.close()
        server.stderr.close()


def get(address):
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.status, dict(answer.headers), answer.read()


@pytest.mark.skipif(not TRANSFORMERS.is_file(), reason="needs npm install --prefix examples/browser")
def test_it_serves_its_folders_and_nothing_else(serve, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("model.onnx", "tokenizer.json", "config.json"):
        (directory / name).write_text("{}")
    (tmp_path / "secret").write_text("mine")
    _, address = serve(directory)
    status, headers, page = get(f"{address}/?prompt=x")
    assert status == 200
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"  # threads need it
    assert b"transformers.min.js" in page
    assert get(f"{address}/model/config.json")[2] == b"{}"
    assert get(f"{address}/transformers/transformers.min.js")[0] == 200
    for path in ("model/../secret", "model/%2e%2e/secret", "serve.py", "package.json", "model/", "other/x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{address}/{path}")


def test_what_is_missing_is_said(serve, dense_directory):
    server, _ = serve(dense_directory)
    assert "has no model.onnx; needed what tensorfold export --to onnx wrote" in server.stderr.read()
    assert server.wait() == 1


@pytest.mark.skipif(not TRANSFORMERS.is_file(), reason="needs npm install --prefix examples/browser")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_folded_model_generates_in_chromium(serve, tiny, tokenizer, tmp_path):
    for package in PACKAGES["onnx"]:
        pytest.importorskip(package)
    model = tiny("llama", num_hidden_layers=1)
    for parameter in set(model.parameters()):
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    tensorfold.fold(model, Recipe((Rule(["mlp"], LowRank(keep=0.5)),)))  # the table is packed as it is
    path = tmp_path / "out"
    export_onnx(model, path, tokenizer, bits=8)
    server, address = serve(path)
    browser = subprocess.Popen(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
            f"{address}/?prompt={quote(PROMPT)}&tokens=12&threads=1",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    late = threading.Timer(240, server.kill)  # of a page that says nothing
    late.start()
    try:
        found = json.loads(server.stdout.readline())
    finally:
        late.cancel()
        browser.terminate()
        browser.wait(20)
    assert "error" not in found, found
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    expected = open_exported(path).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=1
    )
    assert found["ids"] == expected[0, ids.shape[1] :].tolist()
    assert found["prompt_tokens"] == ids.shape[1]
    assert found["text"].startswith(PROMPT)
    assert found["bits"] == 8
    assert found["bytes"] == (path / "model.onnx").stat().st_size
    assert found["tokens_a_second"] > 0
