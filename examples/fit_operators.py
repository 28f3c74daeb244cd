"""Fit an adapter of every operator to one edit, without a generator: how many numbers can hold it?

    python examples/fit_operators.py FOLDER [--edits cool blur] [--steps 30] [--seeds 0] [--kinds 0 1 ...] [--part]
    python examples/fit_operators.py FOLDER --edits program:0 program:1      # edits on no list, as pairs show them

The numbers themselves are trained, on crops of training photographs through the frozen embedded base, for equal steps
at the better of two learning rates (by the loss of the last ten steps). Bases are random and stay. Scored on test
photographs. Writes operators-fitted.json and .png; finished fits are kept in FOLDER/fits, so that several processes can
each run some of the `--kinds` (places in `KINDS`) with `--part`, and a last one without it joins them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from openwu.adapters.inject import attach
from openwu.backbones.embedded.config import WEIGHTS
from openwu.data.programs import draw_program
from openwu.data.suite.photographs import load_test_photographs
from openwu.evaluation.cases import Case, draw_cases, encode, image_tensor, score
from openwu.evaluation.experiments.comparisons.operators import (
    BASE,
    KINDS,
    Kind,
    OperatorResults,
    Point,
    neutral_adapter,
)
from openwu.evaluation.experiments.pictures import draw_operators
from openwu.evaluation.experiments.results import ResultCache, TrialResult, write_findings
from openwu.images import read_picture
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

RATES, CROP, BATCH, TEST_SIDE = (3e-2, 1e-1), 64, 4, 128
TRAINING = ("bee", "calf", "dolphin", "heron", "macaque", "taj_mahal")
TEST = ("astronaut", "coffee", "flower")


def cases_of(edit: str, photographs: dict[str, Tensor], seed: int) -> list[Case]:
    """Return an edit's cases; `program:N` is the random program of this number, which no instruction names."""
    name, _, number = edit.partition(":")
    if name != "program":
        return draw_cases(photographs, [edit], seed)
    program = draw_program(torch.Generator().manual_seed(int(number)))
    draws = torch.Generator().manual_seed(seed)
    cases = []
    for photograph, picture in photographs.items():
        noise = torch.randn(1, *picture.shape[1:], generator=draws)
        answer = program(picture, noise)
        cases.append(Case(edit, "", (picture,), answer=answer, drawn_noise=noise, photograph=photograph))
    return cases


def crops(cases: list[Case], draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor, list[Case]]:
    """Draw pictures, targets and planes `[BATCH, 3, CROP, CROP]`, and the cases that they are cut from."""
    chosen = [cases[int(i)] for i in torch.randint(len(cases), (BATCH,), generator=draws)]
    parts: list[list[Tensor]] = [[], [], []]
    for case in chosen:
        top, left = (int(torch.randint(side - CROP + 1, (), generator=draws)) for side in case.picture.shape[1:])
        for part, whole in zip(parts, (case.picture, case.target, case.planes), strict=True):
            part.append(whole[:, top : top + CROP, left : left + CROP])
    pictures, targets, planes = (torch.stack(part) for part in parts)
    return pictures, targets, planes, chosen


def fitted(
    model: EmbeddedModel, cases: list[Case], kind: Kind, steps: int, seed: int, rate: float
) -> tuple[Adapter, float]:
    """Return a trained adapter, and its mean squared error over the last ten steps."""
    adapter, trained = neutral_adapter(model.config.generator, kind, torch.Generator().manual_seed(seed))
    model.handle.detach()
    model.handle = attach(model.backbone, adapter.targets)
    optimizer, draws, losses = torch.optim.Adam(trained, lr=rate), torch.Generator().manual_seed(seed), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (steps - step) / steps)
        pictures, targets, planes, chosen = crops(cases, draws)
        with torch.no_grad():
            text = encode(model, chosen)
        loss = (model.edit(pictures, planes, text, adapter) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return adapter.detach(), sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--edits", nargs="+", default=["cool", "blur"])
    parser.add_argument("--photos", type=Path, default=Path("photos"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", type=int, nargs="+", default=list(range(len(KINDS))))
    parser.add_argument("--part", action="store_true", help="fit only, write no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = EmbeddedModel.from_pretrained(WEIGHTS, dtype=torch.float32).requires_grad_(False)
    paths = sorted(path for path in options.photos.glob("*.jpg") if path.stem.startswith(TRAINING))
    training = {path.stem: half(image_tensor(read_picture(path).to_image())) for path in paths}
    test = {name: photo for name, photo in load_test_photographs(TEST_SIDE).items() if name in TEST}
    cache, points = ResultCache(options.folder / "fits"), []

    def run(kind: Kind | None, seed: int) -> TrialResult:
        scores, numbers, shared, rates = {}, 0, 0, {}
        for edit in options.edits:
            asked, adapter = cases_of(edit, test, seed), None
            if kind is not None:
                cases = cases_of(edit, training, seed)
                found = {rate: fitted(model, cases, kind, options.steps, seed, rate) for rate in RATES}
                rates[edit] = min(found, key=lambda rate: found[rate][1])
                adapter = found[rates[edit]][0]
                numbers, total = adapter.parameters_per_sample, sum(p[0].numel() for p in adapter.state_dict().values())
                shared = total - numbers
            with torch.inference_mode():
                values = score(model, asked, adapter)
            scores[edit] = sum(values) / len(values)
            sys.stdout.write(f"{kind.name if kind else BASE}, {edit}: {scores[edit]:.2f} dB\n")
            sys.stdout.flush()
        point = Point(kind.name if kind else BASE, seed, numbers, shared, scores)
        return TrialResult({**vars(point), "rates": rates})

    for seed in options.seeds:
        for kind in [None, *(KINDS[i] for i in options.kinds)]:
            name = f"{kind.name if kind else BASE}, {options.steps} steps, {'-'.join(options.edits)}, seed {seed}"
            values = dict(cache.get(name, lambda kind=kind, seed=seed: run(kind, seed)).values)
            values.pop("rates")
            points.append(Point(**values))
    if not options.part:
        results = OperatorResults(points)
        path = options.folder / "operators-fitted"
        chosen = {key: value for key, value in vars(options).items() if key not in ("folder", "photos", "part")}
        write_findings(
            path.with_suffix(".json"), {**chosen, "rates": RATES, "crop": CROP, "batch": BATCH}, results.to_json()
        )
        draw_operators(results, path.with_suffix(".png"))
        sys.stdout.write(results.table())


def half(photo: Tensor, side: int = 192) -> Tensor:
    """Scale a photograph to this longest side."""
    factor = side / max(photo.shape[1:])
    return torch.nn.functional.interpolate(photo[None], scale_factor=factor, mode="area")[0]


if __name__ == "__main__":
    main()
