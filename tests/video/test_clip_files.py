"""What a clip holds is read off the program's words, bad ones are refused by name, and segments join into one file."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from clip_cases import PICTURES, SLOPES, SOUND, clip, make, pictures, times

from openwu.errors import OpenwuError, PictureError
from openwu.video.frames import frames, key_frame, median_like
from openwu.video.probe import Clip, Survey, is_clip, probe, survey
from openwu.video.program import DEMUXERS, running
from openwu.video.write import (
    Metadata,
    check_clip_output,
    join,
    metadata_of,
    stamps_expression,
    write_segment,
)


def rewritten(path: Path, output: Path, length: int = 4, metadata: Metadata = "no_location") -> tuple[str, ...]:
    """Decode a clip, and encode it again in segments of some frames."""
    found = probe(path)
    seen = survey(found)
    photos = frames(found, seen)
    segments = []
    for start in range(0, len(seen), length):
        stop = min(start + length, len(seen))
        part = output.parent / f"part-{start}.mp4"
        write_segment(part, (photo.pixels for photo in islice(photos, stop - start)), found, seen, start, stop)
        segments.append((part, start))
    return join(output, segments, found, seen, metadata)


def opened(path: Path) -> tuple[Clip, Survey]:
    found = probe(path)
    return found, survey(found)


def test_a_clip_comes_back_with_its_times_sound_and_metadata(tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mp4", "-metadata", "title=harbour", "-metadata", "location=+48.1+011.5/", sound=True)
    notes = rewritten(source, tmp_path / "b.mp4")
    assert np.abs(pictures(source).astype(int) - pictures(tmp_path / "b.mp4")).mean() < 3
    assert times(tmp_path / "b.mp4") == times(source) == [round(i * 0.04, 4) for i in range(10)]
    result, seen = opened(tmp_path / "b.mp4")
    assert result.sounds == 1
    assert seen.last * seen.base == pytest.approx(0.04)
    kept = metadata_of(tmp_path / "b.mp4")
    assert kept["title"] == "harbour"
    assert not any("location" in name for name in kept)
    assert any("where it was taken is left out" in note for note in notes)


@pytest.mark.parametrize(("metadata", "names"), [("keep", {"title", "location"}), ("strip", set())])
def test_metadata_is_kept_or_left_out_as_asked(tmp_path: Path, metadata: Metadata, names: set[str]) -> None:
    source = clip(tmp_path / "a.mp4", "-metadata", "title=harbour", "-metadata", "location=+48.1+011.5/")
    rewritten(source, tmp_path / "b.mp4", 10, metadata)
    assert {name for name in metadata_of(tmp_path / "b.mp4") if name in ("title", "location")} == names


def test_times_of_a_variable_rate_stay(tmp_path: Path) -> None:
    """Also across segments, and where the first frame is late."""
    source = clip(
        tmp_path / "a.mkv", "-vf", "setpts='(N+if(gt(N,2),3,0)+if(gt(N,6),N,0)+2)/25/TB'", "-fps_mode", "passthrough"
    )
    expected = times(source)
    steps = {round(b - a, 3) for a, b in pairwise(expected)}
    assert len(steps) > 2
    rewritten(source, tmp_path / "b.mp4")
    assert times(tmp_path / "b.mp4") == pytest.approx(expected, abs=2e-4)


def test_a_rate_that_is_no_whole_number_stays(tmp_path: Path) -> None:
    odd = f"{SLOPES}:size=32x24:rate=30000/1001:duration=0.3"
    source = make(tmp_path / "a.avi", "-f", "lavfi", "-i", odd, "-c:v", "mpeg4")
    rewritten(source, tmp_path / "b.mov")
    assert times(tmp_path / "b.mov") == pytest.approx([i * 1001 / 30000 for i in range(9)], abs=1e-4)


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", None])
@pytest.mark.parametrize("range_", ["tv", "pc"])
def test_colours_and_their_tags_stay(tmp_path: Path, matrix: str | None, range_: str) -> None:
    """A file that says nothing of its colours says nothing afterwards; those that a player shows are the same."""
    tags = f",setparams=colorspace={matrix}:color_primaries=bt709:color_trc=bt709" if matrix else ""
    scaled = f"scale=out_color_matrix={matrix or 'smpte170m'}:out_range={range_},format=yuv420p{tags}"
    plain = "color=c=0xC04020:size=32x24:rate=25:duration=0.08"
    source = make(tmp_path / "a.mp4", "-f", "lavfi", "-i", plain, "-vf", scaled)
    rewritten(source, tmp_path / "b.mp4")
    before, after = probe(source), probe(tmp_path / "b.mp4")
    assert (before.matrix, before.tags, before.full_range) == (after.matrix, after.tags, after.full_range)
    assert before.full_range == (range_ == "pc")
    for path in (source, tmp_path / "b.mp4"):
        assert np.abs(pictures(path).astype(int) - [0xC0, 0x40, 0x20]).max() <= 4


def test_a_turned_clip_comes_upright(tmp_path: Path) -> None:
    flat = clip(tmp_path / "flat.mp4")
    source = make(tmp_path / "a.mp4", "-display_rotation", "90", "-i", str(flat), "-c", "copy")
    found, seen = opened(source)
    assert (found.rotation, seen.width, seen.height) == (90, 24, 32)
    assert any("upright" in note for note in found.notes)
    rewritten(source, tmp_path / "b.mp4", 10)
    result, upright = opened(tmp_path / "b.mp4")
    assert (result.rotation, upright.width, upright.height) == (0, 24, 32)
    assert np.abs(pictures(source).astype(int) - pictures(tmp_path / "b.mp4")).mean() < 3
    assert np.abs(np.rot90(pictures(flat)[0]).astype(int) - pictures(tmp_path / "b.mp4")[0]).mean() < 3


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_high_dynamic_range_is_refused(tmp_path: Path, transfer: str, name: str) -> None:
    tagged = f"setparams=color_primaries=bt2020:color_trc={transfer}:colorspace=bt2020nc"
    source = make(tmp_path / "a.mkv", *PICTURES, "-vf", f"{tagged},format=yuv420p10le", "-c:v", "ffv1")
    with pytest.raises(PictureError, match=rf"HDR \({name}\).*SDR"):
        probe(source)


def test_ten_bits_are_converted_and_told(tmp_path: Path) -> None:
    source = make(tmp_path / "a.mkv", *PICTURES, "-pix_fmt", "yuv420p10le", "-c:v", "ffv1")
    assert "converted from 10 to 8 bits per channel" in probe(source).notes
    rewritten(source, tmp_path / "b.mkv", 10)
    assert np.abs(pictures(source).astype(int) - pictures(tmp_path / "b.mkv")).mean() < 3


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "a.mp4", *SOUND)
    with pytest.raises(PictureError, match="expected a clip with pictures, got one with audio alone"):
        probe(source)


def test_a_cover_is_no_picture_of_a_clip(tmp_path: Path) -> None:
    cover = make(tmp_path / "cover.png", *PICTURES, "-frames:v", "1")
    source = make(
        tmp_path / "a.mp4",
        *(*SOUND, "-i", str(cover), "-map", "0", "-map", "1", "-c:v", "png", "-disposition:v", "attached_pic"),
    )
    with pytest.raises(PictureError, match="expected a clip with pictures"):
        probe(source)


@pytest.mark.parametrize("content", [b"", b"no clip\n" * 50, b"#EXTM3U\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n"])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    """A playlist, too: it would make the program read other files."""
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(PictureError, match=r"a\.mp4: (the file is empty|expected a video file)"):
        probe(tmp_path / "a.mp4")
    assert "hls" not in DEMUXERS
    assert "concat" not in DEMUXERS


def test_a_missing_clip_is_said_as_for_photographs(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="no such file"):
        probe(tmp_path / "a.mp4")


def test_what_decodes_of_a_truncated_clip_is_taken_and_told(tmp_path: Path) -> None:
    whole = clip(tmp_path / "whole.mkv", "-g", "1")
    data = whole.read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: len(data) * 6 // 10])
    _, seen = opened(tmp_path / "a.mkv")
    assert 1 <= len(seen) < 10
    assert seen.notes == (f"damaged or cut off: the {len(seen)} frames that decode are edited",)
    rewritten(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert len(pictures(tmp_path / "b.mp4")) == len(seen)


def test_an_index_that_is_cut_off_is_told_too(tmp_path: Path) -> None:
    """At the end of the file stands the list of its sound: frames are all there, and the sound is not."""
    data = clip(tmp_path / "whole.mp4", "-shortest", sound=True).read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) - (len(data) - data.rindex(b"trak")) * 9 // 10])
    found, seen = opened(tmp_path / "a.mp4")
    assert (len(seen), found.sounds) == (10, 0)
    assert seen.notes == ("damaged or cut off: the 10 frames that decode are edited",)


def test_a_clip_of_one_frame(tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mp4", "-frames:v", "1")
    found, seen = opened(source)
    number, photo = key_frame(found, seen)
    assert (number, photo.size, len(seen)) == (0, (32, 24), 1)
    rewritten(source, tmp_path / "b.mp4")
    assert times(tmp_path / "b.mp4") == [0]


def test_odd_sides_are_filled_with_their_last_row_and_column(tmp_path: Path) -> None:
    odd = f"{SLOPES}:size=33x25:rate=25:duration=0.12"
    source = make(tmp_path / "a.mkv", "-f", "lavfi", "-i", odd, "-c:v", "ffv1")
    rewritten(source, tmp_path / "b.mp4")
    result = pictures(tmp_path / "b.mp4")
    assert result.shape == (3, 26, 34, 3)
    assert np.abs(result[:, :25, :33].astype(int) - pictures(source)).mean() < 4


def test_subtitles_are_left_out_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:00,300\nhello\n")
    source = make(tmp_path / "a.mkv", *PICTURES, "-i", str(tmp_path / "a.srt"), "-map", "0", "-map", "1")
    assert probe(source).notes == ("left out: subtitles (1)",)


def test_sound_that_a_container_cannot_hold_is_encoded_again(tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mkv", "-c:a", "wmav1", sound=True)
    notes = rewritten(source, tmp_path / "b.mp4", 10)
    assert any("AAC" in note for note in notes), notes
    assert probe(tmp_path / "b.mp4").sounds == 1


def test_the_key_frame_is_no_black_one(tmp_path: Path) -> None:
    """The middle is black; the frames around it are alike."""
    black = "drawbox=c=black:t=fill:enable='between(n,4,6)'"
    source = clip(tmp_path / "a.mp4", "-vf", black)
    number, photo = key_frame(*opened(source))
    assert number in (1, 3, 7, 9)
    assert photo.pixels.mean() > 50
    same = np.zeros((4, 5, 3), np.uint8)
    assert median_like([same, same, same]) == 1


def test_a_decoder_stops_with_its_reader(tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mp4")
    photos = frames(*opened(source))
    next(photos)
    photos.close()
    with running(["-f", "lavfi", "-i", "testsrc", "-f", "rawvideo", "-"]) as process:
        process.stdout.read(10)
    assert process.wait() != 0


@pytest.mark.parametrize("stamps", [[5], [0, 1, 2, 3], [0, 40, 90, 100, 500, 501], [7, 8, 20, 21, 22, 30]])
def test_the_expression_of_times_gives_each_frame_its_own(stamps: list[int]) -> None:
    expression = stamps_expression(stamps)
    names = {"if_": lambda condition, yes, no: yes if condition else no, "lt": lambda a, b: a < b}
    found = [eval(expression.replace("if(", "if_("), {**names, "N": n}) for n in range(len(stamps))]
    assert found == [stamp - stamps[0] for stamp in stamps]


@pytest.mark.parametrize(
    ("name", "words"),
    [("b.gif", "to end in"), ("none/b.mp4", "does not exist"), ("a.mp4", "already exists"), ("d.mp4", "is a folder")],
)
def test_an_output_that_could_not_be_written_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "d.mp4").mkdir()
    with pytest.raises(OpenwuError, match=words):
        check_clip_output(tmp_path / name, overwrite=False)


def test_a_failed_encoder_leaves_nothing(tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mp4")
    found, seen = opened(source)
    (tmp_path / "part.mp4").mkdir()
    with pytest.raises(OSError, match=r"part\.mp4"):
        write_segment(tmp_path / "part.mp4", (photo.pixels for photo in frames(found, seen)), found, seen, 0, 10)
    assert not (tmp_path / "draft.mp4").exists()


def test_clips_are_known_by_their_names() -> None:
    assert is_clip("A.MOV")
    assert not is_clip("a.png")
