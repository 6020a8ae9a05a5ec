"""Write the table of what ``unseen.py`` has done into README.md: python studies/smollm2/unseen_table.py"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from pages import write_sections
from unseen import TOKENS, Run, entries, planned


def table() -> str:
    """Markdown: the runs that are done, in the order planned."""
    done = entries()
    dense = done[Run("none", 1.0, "dense").name]["test"]
    rows = [
        "| targets | kept | effort | text | parameters | wikitext-2-test | Tiny Shakespeare | unseen ratio | minutes |"
    ]
    rows += ["|---|---:|---|---|---:|---:|---:|---:|---:|"]
    for run in planned():
        entry = done.get(run.name)
        if entry is None:
            continue
        unseen = [name for name in entry["test"] if name != "wikitext-2-test.txt"]
        ratio = math.exp(sum(math.log(entry["test"][name] / dense[name]) for name in unseen) / len(unseen))
        text = run.text if run.tokens == TOKENS else f"{run.text}, {run.tokens:,} tokens"
        shown = [f"{entry['test'][name]:.2f}" for name in ("wikitext-2-test.txt", "tinyshakespeare")]
        rows.append(
            f"| {run.targets} | {run.keep} | {run.effort} | {text} | {entry['parameters']:,} | "
            f"{' | '.join(shown)} | {ratio:.3f} | {entry['fold_seconds']['cpu'] / 60:.1f} |"
        )
    return "\n".join(rows)


def sections() -> dict[str, str]:
    return {"unseen": table()}


if __name__ == "__main__":
    write_sections(Path(__file__).with_name("README.md"), sections())
