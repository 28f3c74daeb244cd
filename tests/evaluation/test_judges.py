"""Judges over HTTP against a server that misbehaves in every way; rubrics' versions; what counts as an answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from stub_server import Reply, chat, error, ok, serving, slow

from openwu.errors import OpenwuError
from openwu.evaluation.http import CallError, CallRefusedError, Endpoint, EndpointError
from openwu.evaluation.judges import FAILED, REFUSED, SCORED, UNPARSED, Question, rubric_digest
from openwu.evaluation.judges.chat import ChatModel
from openwu.evaluation.judges.rubrics import IMGEDIT_CRITERIA, FourDimensions, GEdit, ImgEdit, Pairs
from openwu.evaluation.stages.record import StoredCase

pytest.importorskip("httpx")
KEY = "sk-secret-0123456789"
CASE = StoredCase("k", "add", "add a hat", "en", "p", (), ())
QUESTION = Question("q", "1", "how good?", ("source", "edited"), {"a": (1, 5), "b": (1, 5)})
PICTURES = {"source": Image.new("RGB", (6, 4)), "edited": Image.new("RGB", (6, 4), "red")}
GOOD = json.dumps({"reason": "fine", "a": 4, "b": 2})


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return


def endpoint(url: str, waits: list[float], **options: object) -> Endpoint:
    return Endpoint(url, "JUDGE_KEY", sleep=waits.append, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (chat(GOOD), SCORED),
        (chat(f"```json\n{GOOD}\n```"), SCORED),
        (chat("  " + GOOD + "\n"), SCORED),
        (chat('{"a": 4.0, "b": 2}'), SCORED),
        (chat(GOOD + GOOD), UNPARSED),
        (chat(f"First: {GOOD}"), UNPARSED),
        (chat(GOOD + " I hope this helps."), UNPARSED),
        (chat("I would give it a 4 and a 2."), UNPARSED),
        (chat('{"a": 4, "b": 2, "a": 5}'), UNPARSED),
        (chat('{"a": 4}'), UNPARSED),
        (chat('{"a": 4, "b": 2, "c": 1}'), UNPARSED),
        (chat('{"a": 4, "b": 6}'), UNPARSED),
        (chat('{"a": 4, "b": 0}'), UNPARSED),
        (chat('{"a": 4, "b": 2.5}'), UNPARSED),
        (chat('{"a": 4, "b": "2"}'), UNPARSED),
        (chat('{"a": 4, "b": true}'), UNPARSED),
        (chat('{"a": 4, "b": NaN}'), UNPARSED),
        (chat('{"a": 4, "b": Infinity}'), UNPARSED),
        (chat('{"a": [4], "b": 2}'), UNPARSED),
        (chat("[4, 2]"), UNPARSED),
        (chat("[" * 100_000), UNPARSED),
        (chat(GOOD[:20]), UNPARSED),
        (chat(GOOD, reason="length"), UNPARSED),
        (chat(""), UNPARSED),
        (chat(None), UNPARSED),
        (chat(None, refusal="I cannot judge this."), REFUSED),
        (chat(None, reason="content_filter"), REFUSED),
        (ok({"choices": []}), UNPARSED),
        (ok({"choices": [{"message": {"content": GOOD}}, {"message": {"content": GOOD}}]}), UNPARSED),
        (ok({"choices": [{"message": "text"}]}), UNPARSED),
        (ok({}), UNPARSED),
        (ok([1]), FAILED),
        ((200, {}, b'{"choices": [{"mess'), FAILED),
        (error(400, "content_policy_violation"), REFUSED),
        (error(400, "too many images"), FAILED),
        (error(500, "sorry"), FAILED),
        ((0, {}, b""), FAILED),
        ((302, {"location": "http://127.0.0.1:1/"}, b""), FAILED),
    ],
)
def test_every_kind_of_reply_has_its_status_and_only_scores_are_scores(reply: Reply, status: str) -> None:
    waits: list[float] = []
    with serving(lambda *_: reply) as stub:
        answer = ChatModel(endpoint(stub.url, waits), "m").answer(QUESTION, CASE, PICTURES)
    assert answer.status == status, answer
    assert dict(answer.scores) == ({"a": 4, "b": 2} if status == SCORED else {})
    assert KEY not in repr(answer)
    assert len(stub.calls) == (5 if reply[0] in (0, 500) else 1)
    assert len(waits) == len(stub.calls) - 1


def test_a_request_has_schema_pictures_and_key_and_the_key_is_nowhere_else(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(lambda *_: error(401, f"wrong key {KEY}")) as stub:
        model = ChatModel(endpoint(stub.url, []), "m")
        with pytest.raises(EndpointError, match=r"status 401: wrong key \[key\]") as raised:
            model.answer(QUESTION, CASE, PICTURES)
    path, headers, body = stub.calls[0]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    sent = json.loads(body)
    assert sent["response_format"]["json_schema"]["schema"]["required"] == ["reason", "a", "b"]
    kinds = [part["type"] for part in sent["messages"][0]["content"]]
    assert kinds == ["text", "text", "image_url", "text", "image_url"]
    shown = [repr(raised.value), repr(model.endpoint), json.dumps(model.identity()), caplog.text, *capfd.readouterr()]
    assert not any(KEY in text for text in shown)
    assert KEY.encode() not in body


def test_busy_servers_are_asked_again_as_they_wish_and_not_for_ever() -> None:
    replies = [
        error(429, "slow down", **{"retry-after": "7"}),
        (0, {}, b""),
        error(503, "x", **{"retry-after": "soon"}),
    ]
    waits: list[float] = []
    with serving(lambda *_: replies.pop(0) if replies else chat(GOOD)) as stub:
        assert ChatModel(endpoint(stub.url, waits), "m").answer(QUESTION, CASE, PICTURES).status == SCORED
    assert len(stub.calls) == 4
    assert waits[0] == 7
    with (
        serving(lambda *_: error(429, "slow", **{"retry-after": "1e9"})) as stub,
        pytest.raises(CallError, match="5 att"),
    ):
        endpoint(stub.url, waits).post("/x", body={})
    assert max(waits) <= 60
    with serving(lambda *_: error(429, "insufficient_quota")) as stub, pytest.raises(EndpointError, match="no credit"):
        endpoint(stub.url, waits).post("/x", body={})
    with serving(lambda *_: slow(1.0, chat(GOOD))) as stub, pytest.raises(CallError, match="2 attempts"):
        endpoint(stub.url, waits, timeout=0.1, attempts=2).post("/x", body={})


def test_addresses_and_keys_are_checked_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("ftp://a.b", "a.b/v1", "https://user:pw@a.b", "https://a.b/?key=1", "http://"):
        with pytest.raises(OpenwuError, match="endpoint: expected") as raised:
            Endpoint(url)
        assert "pw" not in str(raised.value)
        assert "key=1" not in str(raised.value)
    with pytest.raises(OpenwuError, match="expected https"):
        Endpoint("http://example.org/v1", "JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(EndpointError, match="environment variable JUDGE_KEY"):
        ChatModel(Endpoint("https://example.org/v1", "JUDGE_KEY"), "m").check()
    monkeypatch.setenv("JUDGE_KEY", "a\nb")
    with pytest.raises(EndpointError, match="without line breaks"):
        Endpoint("https://example.org/v1", "JUDGE_KEY").key()
    with serving(lambda *_: error(404, "no such model")) as stub, pytest.raises(EndpointError, match="no such model"):
        Endpoint(stub.url).post("/x", body={})
    with serving(lambda *_: error(400, "moderation_blocked")) as stub, pytest.raises(CallRefusedError):
        Endpoint(stub.url).post("/x", body={})
    assert "authorization" not in stub.calls[0][1]


def test_wordings_keep_their_version() -> None:
    """A change of any wording needs a new version, since old judgements are answers to other words."""
    questions = [*GEdit().questions(CASE), *FourDimensions().questions(CASE), *Pairs().questions(CASE)]
    questions += [
        q for task in IMGEDIT_CRITERIA for q in ImgEdit().questions(StoredCase("k", task, "x", "en", "", (), ()))
    ]
    assert {question.version for question in questions} == {"1"}
    assert rubric_digest(questions) == "3c6b4066a868baa9"


def test_metrics_of_rubrics() -> None:
    found = GEdit().combine({"gedit-sc": {"s": 9, "p": 4}, "gedit-pq": {"n": 9, "a": 10}})
    assert found == {"SC": 4, "PQ": 9, "O": 6}
    scores = {"compliance": 2, "seamlessness": 5, "fidelity": 1}
    found = ImgEdit().combine({"imgedit-add": scores})
    assert (found["overall"], found["capped"]) == pytest.approx((8 / 3, 5 / 3))
    with pytest.raises(OpenwuError, match="expected a task of"):
        ImgEdit().questions(StoredCase("k", "unknown", "x", "en", "", (), ()))


def test_a_key_that_a_server_sends_back_is_in_no_record(tmp_path: Path) -> None:
    """The record of a judged picture holds address and model, never the key."""
    from test_record import Painter, case

    from openwu.evaluation.judges import Judge
    from openwu.evaluation.stages.judge import plan_judge, run_judge
    from openwu.evaluation.stages.record import RunFolder
    from openwu.evaluation.stages.run import plan_run, run_plan

    record = RunFolder(tmp_path)
    cases = [case("c0")]
    record.begin("b", cases)
    run_plan(record, plan_run(record, cases, Painter()), Painter())
    with serving(lambda *_: chat(f"your key is {KEY}")) as stub:
        judge = Judge(FourDimensions(), ChatModel(endpoint(stub.url, []), "m"))
        assert run_judge(record, plan_judge(record, judge), judge) == {UNPARSED: 1}
    held = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY.encode() not in held
