"""Real damage, restorers and measures of fidelity."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from test_record import case

from openwu.errors import OpenwuError
from openwu.evaluation.benchmarks import real, sensors
from openwu.evaluation.cases import Case
from openwu.evaluation.judges import EDITED, FAILED, SCORED, TARGET, Question
from openwu.evaluation.judges.fidelity import BASIC, MEASURES, fidelity_judge
from openwu.evaluation.metrics import psnr
from openwu.evaluation.stages.record import StoredCase
from openwu.evaluation.systems import SystemOptions
from openwu.registry import SYSTEMS, resolve

STORED = StoredCase("k", "codec", "x", "en", "p", (), ())


@pytest.fixture(scope="module")
def clean() -> Image.Image:
    from skimage import data

    return Image.fromarray(data.astronaut()[:161, 150:311])


@pytest.mark.slow
def test_codecs_damage_photographs_and_keep_their_size(monkeypatch: pytest.MonkeyPatch, clean: Image.Image) -> None:
    """Sizes are odd here: 4:2:0 holds even ones alone."""
    pytest.importorskip("imageio_ffmpeg")
    source = torch.from_numpy(np.array(clean)).permute(2, 0, 1).float() / 255
    monkeypatch.setattr(real, "load_test_photographs", lambda _: {"a": source, "b": source.flip(-1), "c": source})
    monkeypatch.setattr(real, "OPENCV_DOC", Path("/nowhere"))
    cases = real.load(None, Path(), partial=True)
    assert {"h264", "webp"} <= {each.task for each in cases}
    assert {each.photograph for each in cases} == {"a", "b"}
    for each in cases:
        assert each.image().size == clean.size
        assert 15 < float(psnr(each.picture, each.target)) < 38
    with pytest.raises(OpenwuError, match=r"found no vtest\.avi"):
        real.load(Path(__file__).parent, Path())


def profiles_of(folder: Path, scale: float = 1.0) -> Path:
    """A file as darktable's, with invented numbers."""
    isos = [
        {
            "name": f"iso {iso}",
            "iso": iso,
            "a": [2e-7 * iso * scale, 1e-7 * iso * scale, 2e-7 * iso * scale],
            "b": [1e-6] * 3,
        }
        for iso in (6400, 100, 1600)
    ]
    makers: dict[str, list[dict[str, object]]] = {}
    for maker, model in sensors.SENSORS:
        makers.setdefault(maker, []).append({"model": model, "profiles": isos})
    file = folder / "noiseprofiles.json"
    listed = [{"maker": maker, "models": models} for maker, models in makers.items()]
    file.write_text(json.dumps({"version": 0, "noiseprofiles": listed}))
    return file


def test_a_sensors_noise_grows_with_its_sensitivity(tmp_path: Path, clean: Image.Image) -> None:
    source = torch.from_numpy(np.array(clean)).permute(2, 0, 1).float() / 255
    profiles = sensors.read_profiles(profiles_of(tmp_path))
    assert [name for _, name in sensors.SENSORS] == list(profiles)
    low, middle, high = profiles["D90"]
    assert [each.iso for each in (low, middle, high)] == [100, 1600, 6400]
    truth = sensors.taken(source, None)
    quality = [float(psnr(sensors.taken(source, each, seed=1)[None], truth[None])) for each in (low, middle, high)]
    assert quality[0] > quality[1] + 5 > quality[2] + 8
    assert torch.equal(sensors.taken(source, high, seed=1), sensors.taken(source, high, seed=1))
    assert not torch.equal(sensors.taken(source, high, seed=1), sensors.taken(source, high, seed=2))
    assert 20 < float(psnr(truth[None], source[None])) < 45  # a pattern of colours was put together again
    grey = torch.full((3, 17, 23), 0.4)
    torch.testing.assert_close(sensors.taken(grey, None), grey, rtol=0, atol=1e-4)


def test_photographs_at_two_sensitivities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clean: Image.Image) -> None:
    source = torch.from_numpy(np.array(clean)).permute(2, 0, 1).float() / 255
    file = profiles_of(tmp_path)
    monkeypatch.setattr(sensors, "PROFILES", file)
    monkeypatch.setattr(real, "load_test_photographs", lambda _: {"a": source, "b": source.flip(-1)})
    monkeypatch.setattr(real, "OPENCV_DOC", Path("/nowhere"))
    monkeypatch.setattr(real, "_codecs", lambda *_: [])
    cases = {each.key: each for each in real.load(None, Path())}
    assert sorted(cases) == ["iso-highest-a", "iso-highest-b", "iso1600-a", "iso1600-b"]
    for name in "ab":
        middle, high = (
            float(psnr(cases[key].picture, cases[key].target)) for key in (f"iso1600-{name}", f"iso-highest-{name}")
        )
        assert middle > high > 15
    assert cases["iso1600-a"].target.shape == source.shape


@pytest.mark.parametrize("text", ["", "[]", '{"noiseprofiles": [{"maker": "LGE", "models": []}]}'])
def test_what_holds_no_profiles_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(OpenwuError, match=r"p\.json: expected darktable's noise profiles with the cameras"):
        sensors.read_profiles(tmp_path / "p.json")


@pytest.mark.slow
def test_a_still_cameras_frames_have_their_median_as_truth(tmp_path: Path) -> None:
    """What moves is no noise: there the frame is the truth itself. Blurred photographs have no truth."""
    pytest.importorskip("imageio_ffmpeg")
    random = np.random.default_rng(0)
    scene = random.uniform(60, 180, (8, 12, 3)).repeat(32, 0).repeat(48, 1)
    for i in range(real.FRAMES):
        frame = scene + random.normal(0, 6, scene.shape)
        frame[:40, i * 10 : i * 10 + 40] = 255
        Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i:03}.png")
    real.ffmpeg("-i", "%03d.png", "-c:v", "mpeg4", "-q:v", "1", "vtest.avi", folder=tmp_path)
    Image.new("RGB", (600, 300), "grey").save(tmp_path / "text_motion.jpg")
    cases = real.camera_cases(tmp_path, 128)
    camera = [each for each in cases if each.task == "camera"]
    assert len(camera) == 5
    for each in camera:
        error = (each.picture - each.target).abs()
        assert float(error.max()) <= real.STEADY + 0.01
        assert 0.002 < float(error.mean()) < 0.03
    (shake,) = [each for each in cases if each.task == "shake"]
    assert shake.answer is None
    assert shake.image().size == (256, 128)
    (tmp_path / "vtest.avi").write_bytes(b"no video")
    with pytest.raises(OpenwuError):
        real.camera_cases(tmp_path)


def test_restorers_do_what_they_are_for(clean: Image.Image) -> None:
    random = np.random.default_rng(0)
    truth = np.asarray(clean, np.float64) / 255
    noisy = np.clip(truth + random.normal(0, 0.08, truth.shape), 0, 1)
    given = Case("x", "x", (torch.from_numpy(noisy).permute(2, 0, 1).float(),), key="k")
    target = torch.from_numpy(truth).permute(2, 0, 1).float()

    def quality(name: str) -> float:
        system = resolve(SYSTEMS[name])(SystemOptions(name))
        try:
            system.check()
        except OpenwuError as error:
            pytest.skip(str(error))
        image = system.edit(given)
        assert image.size == clean.size
        return float(psnr(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, target))

    before = quality("input")
    assert quality("nlm") > before + 3
    assert quality("unsharp") < before
    assert before - 3 < quality("realesrgan-small") == quality("realesrgan-small")


@pytest.mark.slow
def test_measures_agree_that_more_damage_is_worse(clean: Image.Image) -> None:
    for package in ("ssimulacra2", "flip_evaluator", "imageio_ffmpeg"):
        pytest.importorskip(package)
    judge = fidelity_judge(tuple(MEASURES))
    judge.respondent.check()
    (question,) = judge.rubric.questions(STORED)
    found = []
    for radius in (0, 1, 3):
        edited = clean.filter(ImageFilter.GaussianBlur(radius))
        answer = judge.respondent.answer(question, STORED, {EDITED: edited, TARGET: clean})
        assert answer.status == SCORED
        found.append(answer.scores)
    for name in MEASURES:
        assert found[0][name] > found[1][name] > found[2][name], name
    assert found[0]["PSNR"] == 60
    assert found[0]["SSIM"] == pytest.approx(1)
    assert found[0]["ssimulacra2"] == pytest.approx(100, abs=0.5)
    assert found[0]["1 - FLIP"] == pytest.approx(1, abs=1e-3)


def test_cases_without_truth_and_of_another_size_have_no_scores(clean: Image.Image) -> None:
    judge = fidelity_judge()
    question: Question = judge.rubric.questions(STORED)[0]
    assert judge.respondent.answer(question, STORED, {EDITED: clean}).status == FAILED
    small = clean.resize((20, 20))
    assert judge.respondent.answer(question, STORED, {EDITED: clean, TARGET: small}).status == FAILED
    assert tuple(judge.rubric.metrics) == BASIC
    assert case("c").answer is None
