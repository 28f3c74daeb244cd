"""`openwu eval run | judge | report | audit` from end to end: files, costs told first, resumption, wrong usage."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from stub_server import chat, ok, picture, serving

from openwu import cli
from openwu.evaluation.benchmarks.own import write_own

pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def case_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own(tmp_path_factory.mktemp("set"), partial=True, side=32).parent


def run(*arguments: str) -> int:
    return cli.main(["eval", *arguments])


def test_three_stages_end_in_a_page_that_can_be_looked_at(
    case_set: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our editor and a folder of someone else's pictures, measured and judged over HTTP; a repeat does nothing."""
    out, made = str(tmp_path / "run"), tmp_path / "made"
    made.mkdir()
    keys = [json.loads(line)["key"] for line in (case_set / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
    some = [key for key in keys if not key.startswith("take_")][::12]
    for key in some[1:]:
        Image.open(case_set / f"pictures/{key}.target.png").save(made / f"{key}.png")
    tasks = [argument for key in some for argument in ("--task", key.split("-")[0])]
    base = ["run", "cases", "--data", str(case_set), "--output", out, *tasks]
    ours = [*base, "--model", str(model_folder)]
    assert run(*base, "--outputs", str(made), "--name", "<b>their|s</b>") == 0
    assert f"{len(some) - 1} done, 1 missing" in capsys.readouterr().out
    assert run(*ours, "--dry-run") == 0
    assert f"{len(some)} pictures to make, 0 recorded already" in capsys.readouterr().err
    for expected in (f"{len(some)} done", "nothing to do"):
        assert run(*ours) == 0
        assert expected in capsys.readouterr().out
    assert run("judge", out, "--instrument") == 0
    good = json.dumps({"reason": "r", "alignment": 4, "consistency": 5, "structure": 3, "quality": 4})
    replies = [chat("no"), chat(None, refusal="no")]
    with serving(lambda *_: replies.pop() if replies else chat(good)) as stub:
        assert run("judge", out, "--endpoint", stub.url, "--model", "m", "--workers", "2") == 0
    assert re.search(r"1 refused, \d+ scored, 1 unparsed", capsys.readouterr().out)
    assert run("report", out) == 0
    text = capsys.readouterr().out
    assert f"({len(some) - 1}/{len(some)};" in text
    page = Path(out) / "report" / "instrument-measures" / "report.html"
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/jpeg") >= 3 * len(some) - 1
    assert "&lt;b&gt;their|s&lt;/b&gt;" in html
    assert "<b>" not in html
    with Image.open(page.with_name("report.jpg")) as sheet:
        assert sheet.size[0] > 400
    found = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    theirs = next(row for row in found["rows"] if row["system"] == "<b>their|s</b>")
    assert theirs["overall"]["overall"]["value"] == pytest.approx(5, abs=0.05)
    assert theirs["statuses"] == {"scored": len(some) - 1, "missing": 1}
    assert (Path(out) / "report" / "four-dimensions-m" / "report.md").is_file()


def test_costs_are_told_before_the_first_paid_call(
    case_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can be asked here, so paid calls need --yes; --dry-run only looks."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nobody")
    monkeypatch.setattr("openwu.evaluation.http.Endpoint._send", lambda *_: pytest.fail("called"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    arguments = ["run", "cases", "--data", str(case_set), "--output", str(tmp_path), "--system", "gpt-image-1.5"]
    assert run(*arguments, "--limit", "5", "--price", "0.2", "--dry-run") == 0
    assert (
        "5 pictures to make, 0 recorded already; paid calls, each tried up to 5 times; 1.00" in capsys.readouterr().err
    )
    assert run(*arguments, "--limit", "5") == 2
    assert "price unknown" in (text := capsys.readouterr().err)
    assert "expected --yes" in text
    judge = ["audit", "--endpoint", "https://example.org/v1", "--model", "m", "--cases", "4", "--side", "32"]
    assert run(*judge) == 2
    assert "about 48 questions; paid calls" in capsys.readouterr().err


def test_any_server_with_our_request_format_can_be_run(case_set: Path, tmp_path: Path) -> None:
    with serving(lambda *_: ok({"data": [{"b64_json": picture(20, 20)}]})) as stub:
        arguments = ["run", "cases", "--data", str(case_set), "--output", str(tmp_path), "--limit", "3"]
        assert run(*arguments, "--endpoint", stub.url, "--name", "served", "--workers", "3") == 0
    assert len(stub.calls) == 3
    assert run("judge", str(tmp_path), "--instrument") == 0


def test_a_run_of_some_cases_is_marked_in_every_output(
    case_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until the rest is run, too; cases that no judge was asked about are said as well."""
    made = tmp_path / "made"
    made.mkdir()
    for line in (case_set / "cases.jsonl").read_text(encoding="utf-8").splitlines():
        Image.new("RGB", (32, 32)).save(made / f"{json.loads(line)['key']}.png")
    out, card = tmp_path / "run", tmp_path / "card.md"
    card.write_text("<!-- cases: begin -->\n<!-- cases: end -->\n", encoding="utf-8")
    base = ["run", "cases", "--data", str(case_set), "--output", str(out), "--outputs", str(made)]
    assert run(*base, "--limit", "5", "--name", "a") == 0
    assert run(*base, "--limit", "5", "--name", "b") == 0
    assert run("judge", str(out), "--instrument", "--limit", "2") == 0
    capsys.readouterr()
    assert run("report", str(out), "--against", "b", "--card", str(card)) == 0
    said = "NOT THE WHOLE: 5 of 60 cases were run; 2 of 5 cases have a score."
    assert said in (text := capsys.readouterr().out)
    assert "b minus a" in text
    files = [out / f"report/instrument-measures/report.{kind}" for kind in ("md", "json", "svg", "html")]
    assert all(said in file.read_text(encoding="utf-8") for file in (*files, card))
    assert run("report", str(out), "--against", "c") == 2
    assert "--against: expected one of ['a', 'b'], got 'c'" in capsys.readouterr().err
    assert run("report", str(out), "--judge", "c") == 2
    assert "--judge: expected one of ['instrument/measures'], got 'c'" in capsys.readouterr().err
    assert run(*base, "--name", "a") == 0
    assert run("judge", str(out), "--instrument", "--only", "a") == 0
    assert run("report", str(out)) == 0
    assert "NOT THE WHOLE" not in files[1].read_text(encoding="utf-8")


def test_pairs_are_judged_in_both_orders(case_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["run", "cases", "--data", str(case_set), "--output", str(tmp_path), "--limit", "3"]
    for name, colour in (("a", (1, 2, 3)), ("b", (3, 2, 1))):
        with serving(lambda *_, colour=colour: ok({"data": [{"b64_json": picture(20, 20, colour)}]})) as stub:
            assert run(*base, "--endpoint", stub.url, "--name", name) == 0
    with serving(lambda *_: chat('{"reason": "", "preference": 1}')) as stub:
        assert run("judge", str(tmp_path), "--rubric", "pairs", "--endpoint", stub.url, "--model", "m") == 0
    assert len(stub.calls) == 6
    capsys.readouterr()
    assert run("report", str(tmp_path)) == 0
    assert "compares pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "gedit", "--output", "{out}", "--outputs", "{out}"], 2, "expected --data FOLDER"),
        (["run", "own", "--output", "{out}", "--outputs", "x", "--system", "flux2-dev"], 2, "got both"),
        (
            ["run", "cases", "--data", "{set}", "--output", "{out}", "--outputs", "{out}", "--task", "x"],
            1,
            "got no case",
        ),
        (["run", "gedit", "--data", "{set}", "--output", "{out}", "--outputs", "{set}"], 1, "is not complete"),
        (["run", "own", "--output", "{out}", "--endpoint", "https://u:p@x"], 1, "without user, password"),
        (["judge", "{set}", "--instrument"], 1, "expected the folder of `openwu eval run`"),
        (["report"], 2, "expected the folder of a run"),
        (["report", "--scores", "{set}"], 2, "--benchmark gedit"),
        (["report", "--scores", "{set}", "--benchmark", "gedit"], 1, "expected one file"),
        (["audit"], 2, "--endpoint URL and --model NAME"),
        (["audit", "--instrument", "--cases", "0"], 2, "above 0"),
        (["unknown"], 2, "invalid choice"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], code: int, message: str, case_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [each.format(set=case_set, out=tmp_path) for each in arguments]
    try:
        found = run(*filled)
    except SystemExit as stopped:
        found = int(str(stopped.code))
    error = capsys.readouterr().err
    assert (found, message in error) == (code, True), error
    assert "Traceback" not in error


def test_the_audit_of_the_instrument_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", "--instrument", "--cases", "24", "--side", "64") == 0
    text = capsys.readouterr().out
    assert text.count("sees it") == 6
    assert re.search(r"instrument/measures: trusted, by 24 of \d+ right edits", text)
