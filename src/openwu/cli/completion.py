"""Run `openwu completion`: print a script for bash, zsh or fish, written from the parsers of all verbs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from openwu.backbones.embedded.catalogue import package_edits
from openwu.cli.console import Parser
from openwu.cli.parser import build_parser
from openwu.registry import BASES


@dataclass(frozen=True)
class Option:
    """One option of a verb."""

    name: str
    help: str
    takes_value: bool
    values: tuple[str, ...]
    """What the value may be; empty for a file or free text."""


@dataclass(frozen=True)
class Verb:
    """One verb; those that read their own arguments have no options here."""

    name: str
    help: str
    options: tuple[Option, ...]
    words: tuple[str, ...]
    """What its first argument may be; empty for a file or free text."""


def run(arguments: argparse.Namespace) -> int:
    """Print the script as it is: lines that a shell reads are not escaped as our messages are."""
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[arguments.shell](_verbs()), end="", flush=True)
    return 0


def _verbs() -> list[Verb]:
    parsers = next(each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    helps = {each.dest: each.help or "" for each in parsers._choices_actions}
    return [_verb(name, helps[name], parser) for name, parser in parsers.choices.items()]


def _verb(name: str, help: str, parser: Parser) -> Verb:
    known = {"--edit": tuple(package_edits()), "--model": tuple(BASES)}
    options = tuple(
        Option(
            each.option_strings[-1],
            (each.help or "").replace("%%", "%"),
            each.nargs != 0,
            known.get(each.option_strings[-1], tuple(map(str, each.choices or ()))),
        )
        for each in parser._actions
        if each.option_strings
    )
    words = next((each.choices for each in parser._actions if not each.option_strings and each.choices), ())
    return Verb(name, help, options, tuple(map(str, words or ())))


def _bash(verbs: Sequence[Verb]) -> str:
    values = [
        f"        {verb.name}:{option.name}) words={shlex.quote(' '.join(option.values))};;"
        for verb in verbs
        for option in verb.options
        if option.values
    ]
    others = [
        f"        {verb.name}:{option.name}) return;;"
        for verb in verbs
        for option in verb.options
        if option.takes_value and not option.values
    ]
    options = [
        f"            {verb.name}) words={shlex.quote(' '.join(option.name for option in verb.options))};;"
        for verb in verbs
        if verb.options
    ]
    firsts = [f"            {verb.name}) words={shlex.quote(' '.join(verb.words))};;" for verb in verbs if verb.words]
    lines = [
        "_openwu() {",
        '    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" verb="${COMP_WORDS[1]}" words=""',
        "    COMPREPLY=()",
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f"        words={shlex.quote(' '.join([*(verb.name for verb in verbs), '--help', '--version']))}",
        "    else",
        '        case "$cur" in -*) case "$verb" in',
        *options,
        '        esac;; *) case "$verb" in',
        *firsts,
        "        esac;; esac",
        "    fi",
        '    case "$verb:$prev" in',
        *values,
        *others,
        "    esac",
        '    [ -n "$words" ] && COMPREPLY=($(compgen -W "$words" -- "$cur"))',
        "}",
        "complete -o bashdefault -o default -F _openwu openwu",  # where nothing fits: names of files
    ]
    return "\n".join(lines) + "\n"


def _zsh(verbs: Sequence[Verb]) -> str:
    lines = ["#compdef openwu", "_openwu() {", "    local -a verbs=("]
    lines += [f"        {shlex.quote(f'{verb.name}:{verb.help}')}" for verb in verbs]
    lines += [
        "    )",
        "    if (( CURRENT == 2 )); then _describe verb verbs; return; fi",
        "    shift words; (( CURRENT-- ))",
        '    case "$words[1]" in',
    ]
    for verb in verbs:
        lines.append(f"    {verb.name}) _arguments \\")
        lines += [f"        {shlex.quote(_zsh_option(option))} \\" for option in verb.options]
        lines.append(
            f"        {shlex.quote('1:word:(' + ' '.join(verb.words) + ')' if verb.words else '*:file:_files')};;"
        )
    lines += ["    esac", "}", 'if [ "$funcstack[1]" = _openwu ]; then _openwu "$@"; else compdef _openwu openwu; fi']
    return "\n".join(lines) + "\n"


def _zsh_option(option: Option) -> str:
    words = "".join(f"\\{each}" if each in "[]:\\" else each for each in option.help)
    text = f"*{option.name}[{words}]"
    if not option.takes_value:
        return text
    return f"{text}:value:{'(' + ' '.join(option.values) + ')' if option.values else '_files'}"


def _fish(verbs: Sequence[Verb]) -> str:
    lines = []
    for verb in verbs:
        lines.append(f"complete -c openwu -f -n __fish_use_subcommand -a {verb.name} -d {_fish_quoted(verb.help)}")
        inside = f"complete -c openwu -n {_fish_quoted(f'__fish_seen_subcommand_from {verb.name}')}"
        if verb.words:
            lines.append(f"{inside} -f -a {_fish_quoted(' '.join(verb.words))}")
        for option in verb.options:
            value = f" -x -a {_fish_quoted(' '.join(option.values))}" if option.values else " -r" * option.takes_value
            lines.append(f"{inside} -l {option.name.removeprefix('--')}{value} -d {_fish_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
