"""`openwu arena`: plan a blind comparison of a run's systems, serve its voting page, report the votes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from openwu.cli.console import Parser, UsageError, say


def run(arguments: list[str]) -> int:
    """Run the command; return the exit code."""
    options = _parser().parse_args(arguments)
    found: int = options.run(options)
    return found


def plan(options: argparse.Namespace) -> int:
    """Fix all comparisons, and print the digest to publish before the first vote."""
    from openwu.evaluation.arena.plan import Arena
    from openwu.evaluation.stages.record import RunFolder

    run_folder = RunFolder(options.folder)
    run_folder.settings()
    for name in ("repeats", "planted"):
        if not 0 <= getattr(options, name) <= 1:
            raise UsageError(f"--{name}: expected a share from 0 to 1, got {getattr(options, name)}")
    arena = Arena.create(
        options.output,
        run_folder,
        options.systems,
        limit=options.limit,
        repeats=options.repeats,
        planted=options.planted,
    )
    say(f"{len(arena.comparisons)} comparisons -> {options.output}")
    say(f"publish this before the first vote: shuffle {arena.digest}")
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serve the voting page until Ctrl-C."""
    from openwu.evaluation.arena.plan import Arena
    from openwu.evaluation.arena.server import ArenaServer
    from openwu.evaluation.stages.journal import locked

    arena = Arena(options.arena)
    with locked(arena.folder), ArenaServer(arena, host=options.host, port=options.port) as server:
        say(f"{server.url} (shuffle {arena.digest}); Ctrl-C ends, votes are kept")
        server.serve_forever()
    return 0


def report(options: argparse.Namespace) -> int:
    """Report the votes of an arena, or the answers of a run's comparing judge."""
    from openwu.evaluation.arena.gsb import analyse, as_markdown
    from openwu.evaluation.arena.plan import Arena, judge_votes
    from openwu.evaluation.stages.record import RunFolder
    from openwu.files.writing import finite_values, write_json, write_text

    if options.judge:
        run_folder = RunFolder(options.folder)
        comparisons, votes = judge_votes(run_folder, options.judge)
        who = f"judge {options.judge}: no person voted"
    else:
        arena = Arena(options.folder)
        run_folder, comparisons, votes = arena.run, arena.comparisons, arena.votes()
        who = f"votes of people, shuffle {arena.digest}"
    if not votes:
        raise UsageError(f"{options.folder}: expected votes, got none; `openwu arena serve` collects them")
    found = analyse(comparisons, votes, {case.key: case.cluster for case in run_folder.cases()})
    compared = len({each.case for each in comparisons})
    whole = run_folder.settings().get("whole", len(run_folder.cases()))
    scope = f"NOT THE WHOLE: {compared} of {whole} cases were compared." if compared < whole else ""
    text = "\n\n".join([who, *([f"**{scope}**"] if scope else []), as_markdown(found)])
    sys.stdout.write(text)
    output = Path(options.output or Path(options.folder) / "report")
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "votes.md", text)
    write_json(output / "votes.json", {"by": who, "scope": scope, **finite_values(dataclasses.asdict(found))})
    say(f"-> {output / 'votes.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    top = Parser(prog="openwu arena", description="Blind votes on which of two edits is better.")
    verbs = top.add_subparsers(dest="what", required=True, metavar="WHAT")
    planning = verbs.add_parser("plan", help="fix and shuffle all comparisons", allow_abbrev=False)
    planning.set_defaults(run=plan)
    planning.add_argument("folder", metavar="RUN", help="folder of `openwu eval run` with two systems or more")
    planning.add_argument("--output", required=True, metavar="ARENA", help="a new folder")
    planning.add_argument("--only", action="append", dest="systems", metavar="SYSTEM", help="only this; repeatable")
    planning.add_argument("--limit", type=int, metavar="N", help="N cases, drawn at random")
    planning.add_argument("--repeats", type=float, default=0.1, metavar="S", help="share asked twice (default: 0.1)")
    planning.add_argument("--planted", type=float, default=0.05, metavar="S", help="share planted (default: 0.05)")
    serving = verbs.add_parser("serve", help="serve the voting page", allow_abbrev=False)
    serving.set_defaults(run=serve)
    serving.add_argument("arena", metavar="ARENA", help="folder of `openwu arena plan`")
    serving.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: 127.0.0.1)")
    serving.add_argument("--port", type=int, default=8123, metavar="N", help="default: 8123")
    reporting = verbs.add_parser("report", help="report the votes", allow_abbrev=False)
    reporting.set_defaults(run=report)
    reporting.add_argument("folder", metavar="FOLDER", help="arena; or with --judge a run")
    reporting.add_argument("--judge", metavar="NAME", help="a comparing judge's answers, as pairs/MODEL")
    reporting.add_argument("--output", metavar="FOLDER", help="where to write (default: FOLDER/report)")
    return top
