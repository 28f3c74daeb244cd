"""Blind votes: the plan, the server, the page in a browser, and statistics on simulated raters of known strength."""

from __future__ import annotations

import http.client
import io
import json
import math
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_record import case

from openwu import cli
from openwu.errors import OpenwuError
from openwu.evaluation.arena.gsb import analyse, as_markdown, davidson
from openwu.evaluation.arena.plan import (
    BOTH_BAD,
    BOTH_GOOD,
    BROKEN,
    IDENTICAL,
    LEFT,
    REAL,
    REPEAT,
    RIGHT,
    SPOILED,
    Arena,
    Comparison,
    Vote,
    make_comparisons,
)
from openwu.evaluation.arena.server import ArenaServer
from openwu.evaluation.stages.record import RunFolder
from openwu.evaluation.stages.run import plan_run, run_plan
from openwu.evaluation.systems.folder import OutputsFolder

SYSTEMS = {"openwu-secret": (200, 40, 40), "rival-secret": (40, 40, 200)}
COUNT = 12


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    run = RunFolder(tmp_path / "run")
    cases = [case(f"c{i}", photograph=f"p{i % 5}", shade=i / 20) for i in range(COUNT)]
    run.begin("b", cases)
    for name, (red, green, blue) in SYSTEMS.items():
        folder = tmp_path / name
        folder.mkdir()
        for i, each in enumerate(cases):
            size = (16, 12) if name.startswith("open") else (32, 24)
            Image.new("RGB", size, (red, green + i, blue)).save(folder / f"{each.key}.png", pnginfo=None)
        system = OutputsFolder(folder, name=name)
        run_plan(run, plan_run(run, cases, system), system)
    return Arena.create(tmp_path / "arena", run, repeats=0.25, planted=0.35, seed=1)


@contextmanager
def serving(arena: Arena) -> Iterator[ArenaServer]:
    with ArenaServer(arena) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(
    server: ArenaServer, path: str, body: Any = None, **headers: str
) -> tuple[int, bytes, list[tuple[str, str]]]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    given = {} if body is None else {"Content-Type": "application/json"}
    connection.request(method, path, data, {**given, **{k.replace("_", "-"): v for k, v in headers.items()}})
    reply = connection.getresponse()
    found = reply.status, reply.read(), reply.getheaders()
    connection.close()
    return found


def test_the_plan_has_repeats_and_planted_pairs_and_is_fixed(arena: Arena) -> None:
    kinds = [each.kind for each in arena.comparisons]
    assert [kinds.count(kind) for kind in (REAL, REPEAT, BROKEN, IDENTICAL)] == [12, 3, 2, 2]
    repeats = [each for each in arena.comparisons if each.kind == REPEAT]
    assert all((arena.by_id[each.of].left, arena.by_id[each.of].right) == (each.right, each.left) for each in repeats)
    orders = [[each.id for each in arena.order(rater)] for rater in ("ada", "ben", "ada")]
    assert orders[0] == orders[2] != orders[1]
    assert all(order.index(each.of) < order.index(each.id) for order in orders for each in repeats)
    sides = [each.left for each in arena.comparisons if each.kind == REAL]
    assert 0 < sides.count("openwu-secret") < 12
    with pytest.raises(OpenwuError, match="a plan is never changed"):
        Arena.create(arena.folder, arena.run)
    file = arena.folder / "shuffle.json"
    file.write_text(file.read_text().replace("openwu-secret", "rival-secret", 1))
    with pytest.raises(OpenwuError, match="not the one that was published"):
        Arena(arena.folder)
    with pytest.raises(OpenwuError, match="expected the folder of `openwu arena plan`"):
        Arena(arena.folder.parent)
    with pytest.raises(OpenwuError, match="two systems with pictures"):
        Arena.create(arena.folder / "x", arena.run, ["rival-secret"])


def test_nothing_that_the_browser_gets_names_a_system(arena: Arena) -> None:
    with serving(arena) as server:
        seen = [request(server, "/"), request(server, "/next?rater=ada")]
        state = json.loads(seen[1][1])
        assert set(state) == {"done", "total", "shuffle", "id", "instruction", "pictures"}
        assert (state["done"], state["total"], state["shuffle"]) == (0, 19, arena.digest)
        addresses = set()
        for each in arena.comparisons:
            tokens = [server.token(each, side) for side in ("source", "left", "right")]
            addresses |= set(tokens)
            replies = [request(server, f"/picture/{token}.png") for token in tokens]
            seen += replies
            images = [Image.open(io.BytesIO(data)) for _, data, _ in replies]
            assert {image.size for image in images} == {(16, 12)}
            assert all(not image.info for image in images)
            if each.kind == IDENTICAL:
                assert replies[1][1] == replies[2][1]
        assert len(addresses) == 3 * len(arena.comparisons)
        everything = b"".join(data + repr(headers).encode() for _, data, headers in seen).lower()
    assert b"secret" not in everything
    for kind in (REPEAT, IDENTICAL, BROKEN, SPOILED):
        assert kind.encode() not in json.dumps(state).encode()


def test_votes_are_kept_once_and_a_rater_goes_on_where_she_stopped(arena: Arena) -> None:
    with serving(arena) as server:
        state = json.loads(request(server, "/next?rater=ada")[1])
        vote = {"rater": "ada", "id": state["id"], "vote": LEFT, "seconds": 1.5}
        status, data, _ = request(server, "/vote", vote)
        assert status == 200
        assert json.loads(data)["id"] != state["id"]
        status, data, _ = request(server, "/vote", vote)
        assert (status, "given before" in data.decode()) == (400, True)
    with serving(Arena(arena.folder)) as server:
        assert json.loads(request(server, "/next?rater=ada")[1])["done"] == 1
        assert json.loads(request(server, "/next?rater=ben")[1])["done"] == 0
    (kept,) = Arena(arena.folder).votes()
    assert (kept.rater, kept.vote, kept.seconds) == ("ada", LEFT, 1.5)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/vote", {"rater": "ada", "id": "x", "vote": LEFT}, {}, 400),
        ("/vote", {"rater": "ada", "id": "ID", "vote": "better"}, {}, 400),
        ("/vote", {"rater": "", "id": "ID", "vote": LEFT}, {}, 400),
        ("/vote", {"rater": "a\nb", "id": "ID", "vote": LEFT}, {}, 400),
        ("/vote", {"rater": 5, "id": "ID", "vote": LEFT}, {}, 400),
        ("/vote", {"rater": "ada", "id": "ID", "vote": LEFT, "seconds": "x"}, {}, 400),
        ("/vote", [1], {}, 400),
        ("/vote", b"{", {}, 400),
        ("/vote", b"[" * 4000, {}, 400),
        ("/vote", b"x" * 5000, {}, 413),
        ("/other", {}, {}, 400),
        ("/vote", {"rater": "ada", "id": "ID", "vote": LEFT}, {"Origin": "https://evil.example"}, 403),
        ("/vote", {"rater": "ada", "id": "ID", "vote": LEFT}, {"Content_Type": "text/plain"}, 400),
        ("/next?rater=", None, {}, 400),
        ("/next?rater=" + "x" * 50, None, {}, 400),
        ("/", None, {"Host": "evil.example"}, 403),
        ("/picture/../../arena/shuffle.json", None, {}, 404),
        ("/picture/0.png", None, {}, 404),
        ("/shuffle.json", None, {}, 404),
    ],
)
def test_requests_that_are_not_ours_change_nothing(
    arena: Arena, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    if isinstance(body, dict) and body.get("id") == "ID":
        body["id"] = arena.comparisons[0].id
    with serving(arena) as server:
        assert request(server, path, body, **headers)[0] == status
        assert request(server, "/")[0] == 200
    assert arena.votes() == []


@pytest.mark.slow
def test_the_page_works_in_a_browser(arena: Arena) -> None:
    """Vote by keys and by buttons to the end, zoom in sync, flip to the original; an error is shown."""
    selenium = pytest.importorskip("selenium.webdriver")
    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver_path is None:
        pytest.skip("needs chromium and chromedriver")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = selenium.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,800"):
        options.add_argument(argument)
    with serving(arena) as server:
        driver = selenium.Chrome(options=options, service=Service(driver_path))
        try:
            wait = WebDriverWait(driver, 10, poll_frequency=0.02)
            driver.get(server.url)
            driver.find_element(By.ID, "name").send_keys("ada\n")
            wait.until(lambda d: d.find_element(By.ID, "count").text == "0 of 19")
            left, source = driver.find_element(By.ID, "left"), driver.find_element(By.ID, "source")
            wait.until(lambda d: d.execute_script("return arguments[0].naturalWidth", left) == 16)
            body = driver.find_element(By.TAG_NAME, "body")
            body.send_keys("+")
            transforms = {
                driver.find_element(By.ID, name).get_attribute("style") for name in ("source", "left", "right")
            }
            assert len(transforms) == 1
            assert "scale(1.5)" in transforms.pop()
            down = "dispatchEvent(new KeyboardEvent('{}', {{key: ' '}}))"
            before = left.get_attribute("src")
            driver.execute_script(down.format("keydown"))
            assert left.get_attribute("src") == source.get_attribute("src")
            driver.execute_script(down.format("keyup"))
            assert left.get_attribute("src") == before
            for i, key in enumerate("1234" * 4 + "14"):
                wait.until(lambda d, i=i: d.find_element(By.ID, "count").text == f"{i} of 19")
                wait.until(lambda d: not d.execute_script("return busy"))
                body.send_keys(key)
            wait.until(lambda d: d.find_element(By.ID, "count").text == "18 of 19")
            wait.until(lambda d: not d.execute_script("return busy"))
            driver.find_element(By.CSS_SELECTOR, "[data-vote='right']").click()
            wait.until(lambda d: "Thank you" in d.find_element(By.ID, "instruction").text)
            assert not driver.find_element(By.CSS_SELECTOR, "[data-vote='left']").is_enabled()
            driver.get(server.url)
            driver.find_element(By.ID, "name").send_keys("ada\n")
            wait.until(lambda d: "Thank you" in d.find_element(By.ID, "instruction").text)
            assert [each for each in driver.get_log("browser") if each["level"] == "SEVERE"] == []
        finally:
            driver.quit()
    votes = arena.votes()
    assert [vote.vote for vote in votes] == [LEFT, BOTH_GOOD, BOTH_BAD, RIGHT] * 4 + [LEFT, RIGHT, RIGHT]
    assert all(vote.seconds > 0 for vote in votes)


def test_counts_definitions_raters_and_fragility() -> None:
    """30 photographs, A wins 18, draws 5 and loses 7; ben disagrees with himself and overlooks what is broken."""
    outcomes = [LEFT] * 18 + [BOTH_GOOD] * 3 + [BOTH_BAD] * 2 + [RIGHT] * 7
    real = [Comparison(f"r{i}", f"c{i}", "A", "B", REAL) for i in range(30)]
    extra = [
        Comparison("again", "c0", "B", "A", REPEAT, "r0"),
        Comparison("same", "c1", "A", "A", IDENTICAL),
        Comparison("broken", "c2", SPOILED, "B", BROKEN),
    ]
    votes = [Vote("ada", each.id, vote) for each, vote in zip(real, outcomes, strict=True)]
    votes += [Vote("ada", "again", RIGHT), Vote("ada", "same", BOTH_GOOD), Vote("ada", "broken", RIGHT)]
    votes += [
        Vote("ben", "r0", LEFT),
        Vote("ben", "again", LEFT),
        Vote("ben", "same", LEFT),
        Vote("ben", "broken", LEFT),
    ]
    found = analyse([*real, *extra], votes, {})
    (pair,) = found.pairs
    assert (pair.good, pair.same, pair.bad) == (19, 5, 7)
    assert pair.shares == pytest.approx(((19 - 7) / 31, (19 + 2.5) / 31, 19 / 26))
    assert pair.to_turn == 7  # 12 to 14
    assert 0 < pair.to_lose < pair.to_turn
    assert pair.p < 0.05
    ada, ben = found.raters
    assert (ada.self_agreement, ada.identical_same, ada.broken_right) == (1, 1, 1)
    assert (ben.self_agreement, ben.identical_same, ben.broken_right) == (0, 0, 0)
    assert found.missing == 2 * 33 - len(votes)
    text = as_markdown(found)
    assert "A against B" in text
    assert "38.7 [" in text


def test_ties_alone_and_one_photograph_give_no_false_certainty() -> None:
    same = [Comparison(f"r{i}", f"c{i}", "A", "B", REAL) for i in range(5)]
    found = analyse(same, [Vote("a", each.id, BOTH_GOOD) for each in same], {})
    assert math.isnan(found.pairs[0].shares[2])
    assert (found.pairs[0].p, found.pairs[0].to_turn, found.pairs[0].to_lose) == (1, 1, 0)
    one = analyse(same, [Vote("a", each.id, LEFT) for each in same], dict.fromkeys((f"c{i}" for i in range(5)), "p"))
    assert math.isnan(one.pairs[0].intervals[0].low)
    assert one.pairs[0].p == 1
    as_markdown(one)


def probabilities(gap: Any, tie: float) -> Any:
    """Davidson's probabilities (win, tie, loss) of a gap in log strength."""
    first, second = np.exp(gap / 2), np.exp(-gap / 2)
    total = first + second + tie
    return np.stack([first / total, np.broadcast_to(tie / total, np.shape(gap)), second / total], -1)


def test_davidson_recovers_known_strengths() -> None:
    strengths, tie, votes = np.array([0.8, 0.0, -0.8]), 0.7, 1e6
    wins, ties = np.zeros((1, 3, 3)), np.zeros((1, 3, 3))
    for i in range(3):
        for j in range(i + 1, 3):
            win, same, loss = probabilities(strengths[i] - strengths[j], tie) * votes
            wins[0, i, j], wins[0, j, i], ties[0, i, j], ties[0, j, i] = win, loss, same, same
    found, nu = davidson(wins, ties)
    assert found[0] == pytest.approx(strengths, abs=1e-3)
    assert nu[0] == pytest.approx(tie, abs=1e-3)


def test_intervals_cover_simulated_raters_as_often_as_they_say() -> None:
    """Photographs differ in how hard they are, and three raters see each: votes on one are no three draws."""
    random = np.random.default_rng(5)
    photographs, tie, gap, spread, rounds = 40, 0.8, 0.4, 1.0, 120
    truth_effects = random.normal(0, spread, 200_000)
    win, same, loss = probabilities(gap + truth_effects, tie).mean(0)
    truth = (win - loss, win + same / 2, win / (win + loss))
    comparisons = [Comparison(f"r{i}", f"c{i}", "A", "B", REAL) for i in range(photographs)]
    names, covered = (LEFT, BOTH_GOOD, RIGHT), np.zeros(3)
    for i in range(rounds):
        chances = probabilities(gap + random.normal(0, spread, photographs), tie)
        votes = [
            Vote(rater, each.id, names[random.choice(3, p=chance)])
            for rater in "xyz"
            for each, chance in zip(comparisons, chances, strict=True)
        ]
        (pair,) = analyse(comparisons, votes, {}, seed=i).pairs
        covered += [edge.low <= value <= edge.high for edge, value in zip(pair.intervals, truth, strict=True)]
    assert (covered / rounds >= 0.90).all(), covered / rounds
    assert (covered / rounds <= 0.99).all(), covered / rounds


def test_intervals_of_strengths_cover_and_the_sign_test_keeps_its_level() -> None:
    random = np.random.default_rng(6)
    true = {"A": 0.5, "B": 0.0, "C": -0.5}
    pairs = [(a, b) for a in true for b in true if a < b]
    rounds, covered, false = 50, 0, 0
    for i in range(rounds):
        comparisons, votes = [], []
        for n in range(60):
            for a, b in pairs:
                name = f"{n}{a}{b}"
                comparisons.append(Comparison(name, f"c{n}", a, b, REAL))
                votes.append(
                    Vote("x", name, (LEFT, BOTH_BAD, RIGHT)[random.choice(3, p=probabilities(true[a] - true[b], 0.6))])
                )
        found = analyse(comparisons, votes, {}, seed=i)
        covered += sum(found.strengths[s][1].low <= v <= found.strengths[s][1].high for s, v in true.items())
        even = [Comparison(f"e{n}", f"c{n}", "A", "B", REAL) for n in range(40)]
        flips = [Vote("x", each.id, (LEFT, RIGHT)[random.integers(2)]) for each in even]
        false += analyse(even, flips, {}, seed=i).pairs[0].p < 0.05
    assert 0.90 <= covered / rounds / 3 <= 0.99
    assert false / rounds <= 0.10


def test_the_command_plans_and_reports(arena: Arena, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(arena.run.folder)
    assert cli.main(["arena", "plan", run, "--output", str(tmp_path / "new"), "--limit", "4"]) == 0
    assert "publish this before the first vote: shuffle " in capsys.readouterr().out
    assert cli.main(["arena", "report", str(tmp_path / "new")]) == 2
    assert cli.main(["arena", "plan", run, "--output", str(tmp_path / "x"), "--planted", "2"]) == 2
    new = Arena(tmp_path / "new")
    for each in new.order("ada"):
        new.add(Vote("ada", each.id, LEFT))
    assert cli.main(["arena", "report", str(tmp_path / "new")]) == 0
    assert "openwu-secret against rival-secret" in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "report" / "votes.json").read_text(encoding="utf-8"))
    assert found["by"] == f"votes of people, shuffle {new.digest}"
    assert cli.main(["arena", "report", run, "--judge", "pairs/m"]) == 1


def test_shares_of_what_is_added_are_as_asked() -> None:
    found = make_comparisons([(f"c{i}", "A", "B") for i in range(100)], repeats=0.2, planted=0.1, seed=0)
    kinds = [each.kind for each in found]
    assert [kinds.count(kind) for kind in (REAL, REPEAT, BROKEN, IDENTICAL)] == [100, 20, 5, 5]
    assert len({each.id for each in found}) == 130
    assert set(kinds[:50]) == {REAL}
