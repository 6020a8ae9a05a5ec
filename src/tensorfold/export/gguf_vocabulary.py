"""Vocabularies of GGUF files: what llama.cpp needs to cut text into the tokens that the tokenizer cuts it into.

llama.cpp knows byte-level BPE by a name for the split that comes before the merges. A tokenizer whose split, or any
other part, is not among those that it knows would read other tokens there, so it is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tensorfold.data.tokens import table_rows
from tensorfold.errors import InputError

# Kinds of tokens in the file format.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}{_SLASHED}"
_GPT4O = rf"{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_SLASHED}"

_BYTES = ("ByteLevel", False)
# By the steps of the split, and whether a word that is a token is taken whole, whatever the merges say.
_SPLITS: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES), False): "smaug-bpe",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
    ((("Split", _GPT4O), _BYTES), False): "gpt-4o",
}


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as a GGUF file has it.

    ``tokens`` and their ``kinds`` have a row of the model's table each. ``special``: ids by the name that the writer
    gives them. ``adds``: whether ``bos`` and ``eos`` are put around a text.
    """

    split: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special: dict[str, int]
    adds: dict[str, bool]
    chat_template: Any

    def write(self, writer: Any) -> None:
        """Add it to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, value in self.special.items():
            getattr(writer, f"add_{name}_token_id")(value)
        for name, added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(added)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, model: PreTrainedModel) -> Vocabulary:
    """What llama.cpp needs of a tokenizer.

    Args:
        tokenizer: A fast one of transformers.
        model: Its table has a row a token; rows beyond the tokenizer's are unused tokens of the file.

    Raises:
        InputError: llama.cpp has no form of it, or none that is known here; or it has tokens without a row.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("missing" if tokenizer is None else f"a {type(tokenizer).__name__}, without a tokenizer.json")
    whole = json.loads(backend.to_str())
    bpe = whole["model"]
    if bpe["type"] != "BPE" or bpe.get("byte_fallback"):
        raise _refused(f"a {bpe['type']} model{' with byte fallback' if bpe.get('byte_fallback') else ''}")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if bpe.get(setting):
            raise _refused(f"{setting} = {bpe[setting]!r}")
    split = _split(whole, bool(bpe.get("ignore_merges")))
    tokens, kinds = _tokens(bpe["vocab"], whole["added_tokens"], table_rows(model) or model.config.vocab_size)
    special = _special(tokenizer, model, len(tokens))
    adds = {name: bool(ids) for name, ids in _around(tokenizer).items()}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return Vocabulary(split, tokens, kinds, _merges(bpe["merges"]), special, adds, template)


def _refused(got: str) -> InputError:
    return InputError(
        f"export --to gguf: the tokenizer is {got}; needed byte-level BPE as of GPT-2, SmolLM2, Llama 3, Qwen2 or "
        "Mistral NeMo, which llama.cpp knows by name. Take --to onnx or openvino, which keep the tokenizer as it is."
    )


def _split(whole: dict[str, Any], ignores_merges: bool) -> str:
    """The name that llama.cpp knows the steps before the merges by."""
    before = whole.get("pre_tokenizer") or {}
    steps = tuple(_step(part) for part in before.get("pretokenizers", [before]))
    name = _SPLITS.get((steps, ignores_merges))
    if name is None:
        merges = ", words that are tokens whole" if ignores_merges else ""
        raise _refused("split by " + (", ".join(f"{kind} {what}" for kind, what in steps) or "nothing") + merges)
    normalizer = whole.get("normalizer") or {}
    # llama.cpp does not normalise; texts come in NFC but for rare ones, and Qwen2's own files are made so.
    if normalizer and normalizer.get("type") != "NFC":
        raise _refused(f"one that normalises text by {normalizer.get('type')}")
    return name


def _step(part: dict[str, Any]) -> tuple[str, Any]:
    kind = part.get("type", "nothing")
    if kind == "ByteLevel":
        return kind, part.get("use_regex", True) if not part["add_prefix_space"] else "with a space before the text"
    if kind == "Digits":
        return kind, part["individual_digits"]
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return kind, next(iter(part["pattern"].values()))
    return kind, ", ".join(f"{name}={value!r}" for name, value in part.items() if name != "type")


def _tokens(vocabulary: dict[str, int], added: list[dict[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, one a row of the table."""
    tokens: dict[int, tuple[str, int]] = {index: (token, _NORMAL) for token, index in vocabulary.items()}
    for each in added:
        if each["lstrip"] or each["rstrip"] or each["single_word"]:
            raise _refused(f"one whose token {each['content']!r} takes the space beside it, or needs some")
        tokens[each["id"]] = (each["content"], _CONTROL if each["special"] else _USER_DEFINED)
    beyond = [token for index, (token, _) in tokens.items() if index >= rows]
    if beyond:
        raise InputError(
            f"export --to gguf: the tokenizer has the token {beyond[0]!r}, and the model's table, of {rows:,} rows, "
            f"none for it; needed a row for each: model.resize_token_embeddings({max(tokens) + 1})."
        )
    filled = [tokens.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(rows)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _merges(merges: list[Any]) -> list[str]:
    """Pairs with one space between; a space inside a part is written as bytes are in byte-level BPE."""
    pairs = [each.split(" ") if isinstance(each, str) else each for each in merges]
    return [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]


def _special(tokenizer: Any, model: PreTrainedModel, rows: int) -> dict[str, int]:
    """Ids of special tokens; where generation ends at several, the tokenizer's first."""
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad", "sep")}
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if ends and ids["eos"] not in ends:
        ids["eos"] = ends[0]
    others = [end for end in ends if end != ids["eos"]]
    ids["eot"] = others[0] if others else None
    return {name: value for name, value in ids.items() if value is not None and value < rows}


def _around(tokenizer: Any) -> dict[str, list[int]]:
    """What is put before and after a text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), len(whole))
    around = {"bos": whole[:start], "eos": whole[start + len(bare) :]}
    for name, ids in around.items():
        if ids not in ([], [getattr(tokenizer, f"{name}_token_id")]):
            raise _refused(f"one that puts the tokens {ids} {'before' if name == 'bos' else 'after'} a text")
    return around
