"""How much of an example's own change its adapter makes: the check that says when an example is not understood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from openwu.errors import ExampleError
from openwu.images import Photo
from openwu.images.colour import Pixels

SIDE = 224
"""Longest side in pixels at which the example's own picture is edited; larger ones skip pixels, so grain stays."""
ACCEPTED = 0.3
"""Share of the change below which an example is refused; docs/editing.md has the curve that it was chosen on."""
CLEAR = 0.6
"""Share below which a note says that the example is only partly understood."""
REFINED_ACCEPTED = 0.6
"""The same where the share is that after training on the example, which says less about other photographs."""
DECIDES = "the example decides; words beside it only name what it shows: ask for anything else in a second edit"
NAMED = 0.3
"""Least cosine of the change that an example shows with the one that words beside it ask for. Words that name it have
0.5 or more as a rule, its opposite less than 0."""
VISIBLE = 1 / 255
"""Root mean square of a change, of 1, below which two pictures show none."""
ANYWAY = "try anyway with --allow-out-of-scope (allow_out_of_scope=True)"
TEACHABLE = (
    "examples teach tone and colour, vignettes, light from one side and glow, and something of blur, sharpening and "
    "local contrast: not grain, posterising, drawing or retouching"
)


@dataclass(frozen=True)
class Reproduction:
    """The edited picture before against the picture after, over all pairs of an example."""

    changes: tuple[float, ...]
    """Root mean square of the change that each pair shows, of 1."""
    errors: tuple[float, ...]
    """Root mean square of what the edited picture before is away from the picture after."""
    before: float | None = None
    """Of a refined adapter: the share that the generated one reproduced."""
    told: bool = False
    """Whether words stand beside the example: that they change nothing is said."""

    @property
    def share(self) -> float:
        """Share of the change that is reproduced: 1 all of it, 0 or below none."""
        return 1 - _pooled(self.errors) / max(_pooled(self.changes), VISIBLE)

    @property
    def psnr(self) -> float:
        """dB of the edited pictures before against the pictures after."""
        return -20 * math.log10(max(_pooled(self.errors), 1e-5))

    @property
    def note(self) -> str | None:
        """What to say about an example that is only partly understood, or has words beside it; None for others."""
        if self.share >= CLEAR:
            return DECIDES if self.told else None
        return f"the example is only partly understood ({_percent(self.share)}% of its change); {TEACHABLE}"

    def untrained_note(self, steps: int) -> str:
        """Return what to say about a generated adapter that was to be trained on the example, and was not."""
        found = f"refine: the adapter was not trained; without --dry-run it is, for {steps} steps on the example"
        if self.share >= ACCEPTED:
            return found
        return f"{found}, and accepted from {_percent(REFINED_ACCEPTED)}% of the change on"

    def __str__(self) -> str:
        """Return this for people: "example: 86% of its change reproduced (31.2 dB)", of a refined one "86% -> 97%"."""
        before = "" if self.before is None else f"{_percent(self.before)}% -> "
        return f"example: {before}{_percent(self.share)}% of its change reproduced ({self.psnr:.1f} dB)"

    def check(self) -> None:
        """Raise ExampleError for an example that shows no change, or one of which too little is reproduced."""
        self.check_change()
        generated = self.share if self.before is None else self.before
        refined = self.before is not None and self.share >= REFINED_ACCEPTED
        if generated >= ACCEPTED or refined:
            return
        shares = [1 - error / max(change, VISIBLE) for error, change in zip(self.errors, self.changes, strict=True)]
        each = ", ".join(f"pair {i}: {max(0.0, share):.0%}" for i, share in enumerate(shares, 1))
        first = "Train on it (--refine, refine=30), show" if self.before is None else "Refine for more steps, show"
        trained = "" if self.before is None else f" after training on it, {_percent(REFINED_ACCEPTED)}% are needed"
        several = f" ({each}; all must show the same edit)" if len(shares) > 1 else ""
        raise ExampleError(
            f"example: not understood, {_percent(self.share)}% of its change can be reproduced{trained}{several}; "
            f"{TEACHABLE}. {first} another pair, say the edit in words, or {ANYWAY}"
        )

    def check_change(self) -> None:
        """Raise ExampleError for an example that shows no change."""
        _check_visible(self.changes)


def check_change(pairs: Sequence[tuple[Photo, Photo]]) -> None:
    """Raise ExampleError for an example that shows no change, before anything is generated from it."""
    _check_visible([_distance(reduced(before), reduced(after)) for before, after in pairs])


def _check_visible(changes: Sequence[float]) -> None:
    if max(changes) < VISIBLE:
        raise ExampleError(
            "example: expected a picture before an edit and one after it, got two that look alike; choose others, "
            f"or {ANYWAY}"
        )


def check_named(pairs: Sequence[tuple[Photo, Photo]], edited: Sequence[Photo], words: str) -> None:
    """Raise ExampleError where words beside an example ask for another edit than it shows.

    `pairs`: reduced. `edited`: what the words by themselves make of the pictures before.
    """
    shown = np.concatenate([(after.floats() - before.floats()).ravel() for before, after in pairs])
    asked = np.concatenate(
        [(made.floats() - before.floats()).ravel() for made, (before, _) in zip(edited, pairs, strict=True)]
    )
    alike = float(shown @ asked) / max(float(np.linalg.norm(shown) * np.linalg.norm(asked)), 1e-12)
    if alike < NAMED:
        raise ExampleError(
            f"example: the words beside it, {words!r}, ask for another edit than it shows; words beside an example can "
            f"only name the edit that it shows. Leave them out and ask for the rest in a second edit, or {ANYWAY}"
        )


def reproduction(pairs: Sequence[tuple[Photo, Photo]], edit: Callable[[list[Photo]], Sequence[Photo]]) -> Reproduction:
    """Edit the small pictures before as `edit` does and compare them with the pictures after."""
    small = [(reduced(before), reduced(after)) for before, after in pairs]
    edited = edit([before for before, _ in small])
    return Reproduction(
        tuple(_distance(before, after) for before, after in small),
        tuple(_distance(photo, after) for photo, (_, after) in zip(edited, small, strict=True)),
    )


def reduced(photo: Photo, *, between: bool = False) -> Photo:
    """Return the photo with every n-th pixel and nothing else; `between`: of the pixels half-way between those."""
    step = -(-max(photo.pixels.shape[:2]) // SIDE)
    first = step // 2 if between and min(photo.pixels.shape[:2]) > step else 0
    return Photo(cast(Pixels, np.ascontiguousarray(photo.pixels[first::step, first::step])), grey=photo.grey)


def _percent(share: float) -> int:
    return round(100 * max(0.0, share))


def _pooled(each: Sequence[float]) -> float:
    """Root of the mean square."""
    return math.sqrt(sum(value * value for value in each) / len(each))


def _distance(first: Photo, second: Photo) -> float:
    """Root mean square difference, of 1."""
    return float(np.sqrt(np.mean(np.square(first.floats() - second.floats()))))
