"""The fenced blocks of README and docs, and what stands in for what is too slow for a test."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]

# Commands that are only parsed, and why. Everything else is run.
PARSED = {
    r"tensorfold demo": "folds the real model, for minutes; tests/cli/test_demo.py runs it on a tiny one",
    r"tensorfold bench": "times things for minutes; tests/benchmark/test_bench_command.py runs it",
    r"tensorfold export .*--to (onnx|openvino)": "traces for many seconds; tests/export/test_graphs.py runs it",
    r"tensorfold compress .*--to (onnx|openvino)": "traces for many seconds; tests/cli/test_compress.py",
    r"tensorfold (sample|bench) for-openvino": "needs what is not exported here; tests/export/test_graphs.py runs it",
    r"tensorfold (sample|eval) as-onnx": "needs what is not exported here; tests/export/test_graphs.py runs it",
    r"--protocol lm-eval": "needs an extra; tests/evaluation/test_harness.py runs it",
    r"--install-completion": "writes into the home directory",
    r"tensorfold \w+ +gpt2 ": "needs the hub; tests/folding/test_krony.py plans every recipe",
    r"tensorfold \w+ +(MODEL|DIR|\[NAME)": "a synopsis",
}

# What is written there -> what is run in its place. DENSE is a tiny model's directory, TEXT a small file.
SUBSTITUTES = {
    "smollm2-135m": "DENSE",
    "Qwen/Qwen3-30B-A3B": "MIXTURE",
    "python-docs": "TEXT",
    "WIKITEXT-2-VALID": "TEXT",
    "--train TRAIN": "--train TEXT",
    "wikitext-2": "TEXT",
    "--tokens 24000": "--tokens 300",
    "notes.txt": "TEXT",
    "--size 0.9 ": "--size 0.9 --tokens 600 --max-tokens 256 ",
    "--size 0.5 ": "--size 0.5 --tokens 600 --max-tokens 256 --effort low ",
    "--bytes 460MB": "--bytes 90kB --tokens 600 --max-tokens 256",
    "--minutes 10": "--minutes 0.001",
    "tokenizer, 24000": "tokenizer, 600",
    '"cuda"': '"cpu"',
    "--set precision=bf16 --out": "--out",
    "--recipe low-rank-80": "--recipe low-rank-80 --calibrate TEXT --tokens 300",
    "--max-tokens 8192": "--max-tokens 256 --protocol disjoint-64",
    "--steps 240": "--steps 2",
    "--block 512": "--block 32",
    "--blockwise-tokens 65536": "--blockwise-tokens 256 --block 32",
    "warmup=20": "warmup=1",
    '["calibration text …"]': "[open('TEXT').read()]",
    "max_tokens=8192": "max_tokens=256, protocol='disjoint-64'",
}

# What a document's Python may take for granted: names that its text introduces.
GIVEN = {
    "README.md": "from tensorfold.hf.sources import find_model\n"
    "model, tokenizer = find_model('smollm2-135m').model(), find_model('smollm2-135m').tokenizer()\n",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line it begins on."""

    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        """Shell commands, one a line, without comments; none where the block is no shell."""
        if self.language not in ("", "bash"):
            return []
        joined = self.text.replace("\\\n", " ")
        lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if re.match(r"(tensorfold|python|pip|make|torchrun|\.venv/bin/pip)\b", line)]


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1].partition(" ")[0], match[2], text[: match.start()].count("\n") + 1) for match in found]


def stand_in(text: str, dense: Path, sample: Path) -> str:
    for written, run in SUBSTITUTES.items():
        text = text.replace(written, run)
    return text.replace("DENSE", str(dense)).replace("TEXT", str(sample))


def reason_to_parse_only(command: str) -> str | None:
    return next((why for pattern, why in PARSED.items() if re.search(pattern, f"{command} ")), None)


def words(command: str) -> list[str]:
    """Of a synopsis the options alone, without brackets and bars."""
    return shlex.split(re.sub(r"[\[\]|]", " ", command))
