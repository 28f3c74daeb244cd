"""The record of an evaluation: cases, edited pictures by their digest, and judgements, in one folder.

    RUN/run.json          what is measured: the benchmark, how many cases it has, and the version that began it
    RUN/cases.jsonl       one case a line
    RUN/outputs.jsonl     one edited picture, or why there is none, a line; append-only
    RUN/judgements.jsonl  one answer of a judge, or why there is none, a line; append-only
    RUN/pictures/ab/...   PNG files named by the SHA-256 of their bytes

A key covers everything that a line depends on, so a repeated command does only what is missing.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from openwu.errors import OpenwuError, PictureError
from openwu.evaluation.cases import Case, as_image, picture_digest
from openwu.evaluation.stages.journal import Journal
from openwu.files.hashing import of_bytes, of_json
from openwu.files.origin import origin
from openwu.files.writing import atomic_file, write_json

VERSION = 1
"""Of the record's layout and keys."""
DONE, MISSING, REFUSED, FAILED = "done", "missing", "refused", "failed"
SCORED, UNPARSED = "scored", "unparsed"
REPLY = 20_000
"""Characters of a reply that are kept."""


@dataclass(frozen=True)
class Output:
    """What an editor made of a case, or why there is nothing."""

    key: str
    case: str
    system: str
    status: str
    """DONE, MISSING, REFUSED or FAILED."""
    picture: str = ""
    """SHA-256 of the picture's file."""
    size: tuple[int, int] = (0, 0)
    """(width, height) as the editor returned it."""
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Judgement:
    """A judge's answer to one question about one picture or pair, or why there is none."""

    key: str
    case: str
    systems: tuple[str, ...]
    """One system, or two in the order in which the judge saw them."""
    pictures: tuple[str, ...]
    """Digests of their pictures."""
    judge: str
    question: str
    """Name and version."""
    repeat: int
    status: str
    """SCORED, UNPARSED, REFUSED or FAILED."""
    scores: Mapping[str, float] = field(default_factory=dict)
    reply: str = ""
    note: str = ""


@dataclass(frozen=True)
class StoredCase:
    """What the record keeps of a case: enough for reports and for judges, without the benchmark's files."""

    key: str
    task: str
    instruction: str
    language: str
    cluster: str
    tags: tuple[str, ...]
    pictures: tuple[str, ...]
    """Digests of PNG files in the record."""
    answer: str = ""
    digest: str = ""
    """Of the case as the benchmark has it, to find out when it changed."""


class RunFolder:
    """One evaluation's folder; a writer holds `journal.locked` around it."""

    def __init__(self, folder: str | Path) -> None:
        """`folder`: it need not exist before `begin`."""
        self.folder = Path(folder)
        self._outputs = Journal(self.folder / "outputs.jsonl")
        self._judgements = Journal(self.folder / "judgements.jsonl")
        self._cases = Journal(self.folder / "cases.jsonl")

    def begin(self, benchmark: str, cases: Sequence[Case], whole: int | None = None) -> list[StoredCase]:
        """Create the folder, or check that it is of the same benchmark; store cases that are new to it.

        `whole`: how many cases the complete benchmark has, so that reports can say what part of it was run.
        Raises OpenwuError for a folder of another benchmark or version, or a case that changed under the same key.
        """
        check_keys(cases)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "run.json").exists():
            settings = self.settings()
            known = settings["benchmark"]
            if known != benchmark:
                raise OpenwuError(
                    f"{self.folder}: expected a run of {benchmark!r}, got one of {known!r}; choose another"
                )
        else:
            settings = {"record": VERSION, "benchmark": benchmark, **origin()}
            write_json(self.folder / "run.json", settings)
        if whole is not None and settings.get("whole") != whole:
            write_json(self.folder / "run.json", {**settings, "whole": whole})
        stored = {case.key: case for case in self.cases()}
        return [self._store(case, stored.get(case.key)) for case in cases]

    def settings(self) -> dict[str, Any]:
        """Read `run.json`. Raises OpenwuError for a folder that is no run, or of another version."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            if found["record"] != VERSION:
                raise OpenwuError(f"{self.folder}: expected a record of version {VERSION}, got {found['record']}")
            found["benchmark"] = str(found["benchmark"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OpenwuError(f"{self.folder}: expected the folder of `openwu eval run` ({error!r})") from error
        return found

    def _store(self, case: Case, known: StoredCase | None) -> StoredCase:
        answer = None if case.answer is None else picture_digest(case.answer)
        digest = of_json([case.identity(), case.task, case.language, answer], sort_keys=True).hexdigest()
        if known is not None:
            if known.digest != digest:
                raise OpenwuError(
                    f"{self.folder}: case {case.key!r} is another one than before; choose another --output"
                )
            if all(self.has_picture(each) for each in (*known.pictures, *filter(None, [known.answer]))):
                return known
        stored = StoredCase(
            case.key,
            case.task,
            case.instruction,
            case.language,
            case.cluster,
            tuple(sorted(case.tags)),
            tuple(self.add_picture(as_image(each)) for each in case.pictures),
            "" if case.answer is None else self.add_picture(as_image(case.answer)),
            digest,
        )
        if known is None:
            self._cases.append(asdict(stored))
        return stored

    def cases(self) -> list[StoredCase]:
        """Read the stored cases."""
        return [_read(StoredCase, line, self._cases) for line in self._cases.lines()]

    def outputs(self) -> dict[str, Output]:
        """Read the last output of every key, in the order in which they were recorded."""
        found: dict[str, Output] = {}
        for line in self._outputs.lines():
            each = _read(Output, line, self._outputs)
            found.pop(each.key, None)
            found[each.key] = each
        return found

    def judgements(self) -> dict[str, Judgement]:
        """Read the judgement of every key: the last one that scored, else the last one."""
        found: dict[str, Judgement] = {}
        for line in self._judgements.lines():
            each = _read(Judgement, line, self._judgements)
            if each.status == SCORED or each.key not in found or found[each.key].status != SCORED:
                found[each.key] = each
        return found

    def add_output(self, output: Output) -> None:
        """Record an output; its picture was added before. Raises OpenwuError on a full disk."""
        self._outputs.append(asdict(output))

    def add_judgement(self, judgement: Judgement) -> None:
        """Record a judgement. Raises OpenwuError on a full disk."""
        self._judgements.append({**asdict(judgement), "reply": judgement.reply[:REPLY]})

    def add_picture(self, image: Image.Image) -> str:
        """Store a picture as PNG without metadata; return its digest. Raises OpenwuError on a full disk."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG", compress_level=4)
        data = buffer.getvalue()
        digest = of_bytes([data]).hexdigest()
        file = self._file(digest)
        if not file.exists():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(file) as part:
                    part.write_bytes(data)
            except OSError as error:
                raise OpenwuError(
                    f"{file}: cannot be written ({error.strerror or error}); make room and repeat the command to go on"
                ) from error
        return digest

    def picture(self, digest: str) -> Image.Image:
        """Read a stored picture. Raises PictureError where it is missing or its bytes changed."""
        try:
            data = self._file(digest).read_bytes()
        except OSError as error:
            raise PictureError(f"{self._file(digest)}: cannot be read ({error.strerror or error})") from error
        if of_bytes([data]).hexdigest() != digest:
            raise PictureError(
                f"{self._file(digest)}: its bytes are not those that were stored; delete it and run again"
            )
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")

    def has_picture(self, digest: str) -> bool:
        """Whether a stored picture is there, unchanged."""
        try:
            return of_bytes([self._file(digest).read_bytes()]).hexdigest() == digest
        except OSError:
            return False

    def _file(self, digest: str) -> Path:
        return self.folder / "pictures" / digest[:2] / f"{digest}.png"


def output_key(case: Case, system: Mapping[str, object]) -> str:
    """Return the key of an output: the request, and everything that the system's pictures depend on."""
    return of_json([VERSION, case.key, case.identity(), dict(system)], sort_keys=True).hexdigest()[:32]


def judgement_key(
    case: StoredCase,
    outputs: Sequence[Output],
    judge: Mapping[str, object],
    question: Mapping[str, object],
    repeat: int,
) -> str:
    """Return the key of a judgement: the whole question, the judge, the systems' pictures in order, and the repeat.

    Systems count: two that made the same picture have a judgement each.
    """
    shown = [[output.system, output.picture] for output in outputs]
    asked = [VERSION, case.key, case.instruction, case.pictures, case.answer, shown]
    return of_json([*asked, dict(judge), dict(question), repeat], sort_keys=True).hexdigest()[:32]


def check_keys(cases: Iterable[Case]) -> None:
    """Refuse cases without a key, or two with the same. Raises OpenwuError that lists the keys."""
    counts = Counter(case.key for case in cases)
    if not counts:
        raise OpenwuError("cases: expected at least one, got none; choose other --task, --language or --limit")
    twice = sorted(key for key, count in counts.items() if count > 1)
    if twice or "" in counts:
        raise OpenwuError.listing(
            "cases: expected a key of its own for each", (f"{key!r} is not unique" for key in twice or [""])
        )


def _read(kind: type[Any], line: Mapping[str, Any], journal: Journal) -> Any:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in line.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise OpenwuError(f"{journal.path}: expected lines of record version {VERSION} ({error})") from error
