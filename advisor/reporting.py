"""What stands between the command line and a page: read reports or replay runs, write the page whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from advisor import profiling
from advisor.core.errors import BadQuestion, DamagedRecord, Unfit
from advisor.report.as_json import dumps, loads
from advisor.report.html import Source, page
from advisor.shell.store import write

# Nothing is asked of a recorded run but its own question.
_AS_RECORDED = profiling.Asked(
    model=None,
    ctx=None,
    osl=(1, None),
    workload="serve",
    concurrency=1,
    max_engines=None,
    thread_percentages="auto",
    min_gain=None,
    slo=None,
    dtype="auto",
    quantization=None,
    kv_cache_dtype="auto",
    gpu=None,
    weights="auto",
    out=None,
    resume=False,
    vllm=None,
)


def read(where: Path) -> Source:
    """A report that `profile --format json` wrote, or a run folder, which is replayed.

    Raises BadQuestion where nothing is there, Unfit where it cannot be read, is newer, or is no report or run.
    """
    try:
        text = None if where.is_dir() else where.read_bytes()
    except FileNotFoundError:
        raise BadQuestion(
            f"{where} does not exist; a report (profile --format json > FILE) or a run folder is expected"
        ) from None
    except OSError as error:
        raise Unfit(f"{where} cannot be read: {error.strerror}; a report or a run folder is expected") from error
    if text is None:
        return Source(profiling.replayed(_AS_RECORDED, str(where)), str(where), str(where))
    return Source(loads(text, str(where)), str(where))


def as_json(sources: Sequence[Source]) -> str:
    """One report as it is, several as a list."""
    texts = [dumps(one.report) for one in sources]
    return texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]"


def refuse_place(html: Path, sources: Sequence[Path]) -> None:
    """Raise BadQuestion where the page has no place, or would take the place of what it is made of."""
    try:
        _refuse_place(html, sources)
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise Unfit(_unwritable(html, error)) from error


def _refuse_place(html: Path, sources: Sequence[Path]) -> None:
    if html.is_dir():
        raise BadQuestion(f"--html is {html}, a folder; give the name of a file, for example {html / 'report.html'}")
    if not html.parent.is_dir():
        raise BadQuestion(f"--html is {html}, but the folder {html.parent} does not exist; make it first")
    # A device or a pipe would be replaced by a file, not written to.
    if html.exists() and not html.is_file():
        raise BadQuestion(f"--html is {html}, which is no ordinary file; give the name of one")
    if html.exists() and any(one.exists() and html.samefile(one) for one in sources):
        raise BadQuestion(f"--html is {html}, the report itself; choose another name for the page")


def write_page(sources: Sequence[Source], html: Path) -> None:
    """Write the page of these reports; what was there before stays until it is complete.

    Raises DamagedRecord for numbers that no machine has, Unfit where the page cannot be written.
    """
    try:
        write(html, page(sources).encode())
    except OverflowError as error:
        names = ", ".join(one.name for one in sources)
        raise DamagedRecord(f"{names}: {error}; take an undamaged copy or write it again") from error
    except OSError as error:
        raise Unfit(_unwritable(html, error)) from error


def _unwritable(html: Path, error: OSError) -> str:
    return f"{html} cannot be written: {error.strerror}; choose another place for --html"
