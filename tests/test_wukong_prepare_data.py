"""Wukong's data format made: icons rendered from small archives in npm's layout, and the committed set."""

import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow is in the extra 'examples'")

WUKONG = Path(__file__).resolve().parent.parent / "examples" / "wukong"
sys.path.insert(0, str(WUKONG))

import prepare_data  # noqa: E402
from data import load_folder, read_captions  # noqa: E402

SQUARE = '<path fill="{}" d="M0 0h8v16h-8z"/>'  # the left half of a 16 x 16 box


def archive(cache: Path, name: str, version: str, files: dict) -> None:
    cache.mkdir(exist_ok=True)
    with tarfile.open(cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", "w:gz") as tar:
        for member, content in {"package.json": {"name": name, "version": version}, **files}.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of four small packages in npm's layout, and no npm."""
    pytest.importorskip("resvg_py", reason="resvg-py is in the extra 'examples'")
    pytest.importorskip("tqdm", reason="tqdm is in the extra 'examples'")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    folder = tmp_path / "cache"
    labels = {"1F98A": ("狐狸", "fox", 3), "2764-FE0F": ("红心", "red heart", 0), "1F431": ("猫脸", "cat face", 3),
              "1F332": ("松树", "evergreen tree", 3), "1F697": ("汽车", "car", 5), "1F3FB": ("肤色", "skin", 2)}
    archive(folder, *prepare_data.NAMES, {
        f"{language}/data.json": [{"hexcode": "1F1E6", "label": "A"}] + [
            {"hexcode": code, "label": label[place], "group": label[2]} for code, label in labels.items()]
        for place, language in enumerate(("zh", "en"))} | {
        f"en/shortcodes/{table}.json": {"1F431": ["cat_face", "kitty"], "2764": "heart"} if table == "github" else {}
        for table in ("emojibase", "cldr", "github", "joypixels", "iamcal")})
    for style in ("solid", "noto-v1", "firefox"):  # sets without a table; the last one has two of the icons
        icons = {name: {"body": SQUARE.format("#0f0")} for name in ("Kitty", "Fox-Face", "redheart")}
        if style == "firefox":
            del icons["redheart"]
        archive(folder, *prepare_data.STYLES[style][:2], {
            "icons.json": {"icons": icons, "width": 16, "height": 16}, "chars.json": {}})
    for style, fill in (("noto", "#f00"), ("flat", "#00f"), ("contrast", "currentColor")):
        icons = {"fox": {"body": SQUARE.format(fill)}, "heart": {"body": SQUARE.format(fill), "width": 8, "height": 16},
                 "car": {"body": SQUARE.format(fill)}, "skin": {"body": ""}}
        chars = {"1f98a": "fox", "2764": "heart", "1f431": "cat", "1f697": "car", "1f3fb": "skin"}
        chars |= {"1f332": "fox"} if style == "noto" else {}
        aliases = {"cat": {"parent": "kitten", "hFlip": True}, "kitten": {"parent": "fox"}}
        archive(folder, *prepare_data.STYLES[style][:2], {
            "icons.json": {"icons": icons, "aliases": aliases, "width": 16, "height": 16}, "chars.json": chars})
    return folder


def prepared(cache: Path, out: Path, *flags: str) -> int:
    return prepare_data.main(["--cache", str(cache), "--out", str(out), "--size", "16", *flags])


def square(size: int, inside: tuple, outside: tuple = (255, 255, 255)) -> np.ndarray:
    """The ink drawing, size x size, of a square whose edges fall in the middle of the 8th and the 25th of 32 pixels."""
    zoom = size * prepare_data.INK_ZOOM // 64
    pixels = np.full((64, 64, 3), outside, np.uint8)
    pixels[15:49, 15:49] = inside
    drawn = prepare_data.ink(Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)))
    assert drawn.mode == "L"
    return np.asarray(drawn)


def framed(line: int, inside: int, outside: int) -> np.ndarray:
    expected = np.full((32, 32), outside, np.uint8)
    expected[7:25, 7:25] = line
    expected[8:24, 8:24] = inside
    return expected


class TestInk:
    @pytest.mark.parametrize(("colour", "tone"), [((255, 255, 0), 255), ((255, 0, 0), 159), ((0, 0, 128), 64)])
    def test_a_square_is_a_tone_in_a_black_frame_on_white(self, colour, tone):
        np.testing.assert_array_equal(square(32, colour), framed(0, tone, 255))

    def test_a_line_where_only_the_hue_changes(self):
        np.testing.assert_array_equal(square(32, (255, 0, 0), (0, 130, 0)), framed(0, 159, 159))

    @pytest.mark.parametrize(("blue", "line"), [(225, 255), (192, 125), (160, 0)])
    def test_a_small_change_of_colour_is_a_faint_line_or_none(self, blue, line):
        """30, 63 and 95 of 255 less: (e - 0.12) / 0.25 is below 0, 0.508, and above 1; 255 - 255 * 0.508 = 125."""
        np.testing.assert_array_equal(square(32, (255, 255, blue)), framed(line, 255, 255))

    def test_lines_grow_with_the_picture(self):
        expected = framed(0, 159, 255).repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(square(64, (255, 0, 0)), expected)


class TestPrepare:
    def test_folders_captions_names_and_pixels(self, cache, tmp_path, capsys):
        assert prepared(cache, tmp_path / "out") == 0
        out = tmp_path / "out"
        assert sorted(entry.name for entry in out.iterdir()) == [
            "contrast", "firefox", "flat", "names.json", "noto", "noto-v1", "solid"]
        assert "4 emoji stand in all of noto, flat, contrast; 3 of them" in capsys.readouterr().out
        assert (out / "noto" / "captions.csv").read_bytes().decode() == (
            "dir,text\n1f98a.png,狐狸，安卓\n2764.png,红心，安卓\n1f431.png,猫脸，安卓\n")
        some = ["1f98a.png", "1f431.png"]
        for style, files in (("solid", ["1f98a.png", "2764.png", "1f431.png"]), ("firefox", some)):
            assert [sample.path.name for sample in read_captions(out / style)[0]] == files
        assert read_captions(out / "firefox")[0][0].text == "狐狸，淡彩"
        names = json.loads((out / "names.json").read_text(encoding="utf-8"))
        assert names["2764.png"] == {"hexcode": "2764", "zh": "红心", "en": "red heart", "group": 0}
        for style, colour in (("noto", (255, 0, 0)), ("flat", (0, 0, 255)), ("contrast", (0, 0, 0))):
            expected = np.full((16, 16, 3), 255, np.uint8)
            expected[:, :8] = colour
            pixels = {file: np.asarray(Image.open(out / style / file).convert("RGB"))
                      for file in ("1f98a.png", "1f431.png", "2764.png")}
            np.testing.assert_array_equal(pixels["1f98a.png"], expected)
            np.testing.assert_array_equal(pixels["1f431.png"], expected[:, ::-1])
            np.testing.assert_array_equal(pixels["2764.png"], np.roll(expected, 4, axis=1))
        assert Image.open(out / "contrast" / "1f98a.png").mode == "L"
        images, texts, skipped = load_folder(out / "flat", 16)
        assert images.shape == (3, 3, 16, 16) and texts == ["狐狸，扁平", "红心，扁平", "猫脸，扁平"] and skipped == []

    def test_ink_is_drawn_from_flat(self, cache, tmp_path):
        """The edge is between two pixels; each has one black column of six: 64 * 5 / 6, and 255 * 5 / 6 = 212.5."""
        out = tmp_path / "out"
        assert prepared(cache, out, "--styles", "flat", "ink") == 0
        assert sorted(entry.name for entry in out.iterdir()) == ["flat", "ink", "names.json"]
        assert [sample.text for sample in read_captions(out / "ink")[0]] == ["狐狸，黑白", "红心，黑白", "猫脸，黑白"]
        row = np.array([64] * 7 + [53, 212] + [255] * 7, np.uint8)
        for file, expected in (("1f98a.png", row), ("1f431.png", row[::-1])):
            drawn = Image.open(out / "ink" / file)
            assert drawn.mode == "L"
            np.testing.assert_array_equal(np.asarray(drawn), np.tile(expected, (16, 1)))

    def test_split_is_the_same_in_any_order(self, cache, tmp_path, monkeypatch):
        codes = {f"1F{number:03X}" for number in range(500)} | set(prepare_data.DEMO)
        emoji = [prepare_data.Emoji(code, "", "", 3) for code in sorted(codes)]
        parts, again = prepare_data.split(emoji), prepare_data.split(emoji[::-1])
        assert {part: len(some) for part, some in parts.items()} == {"train": 300, "heldout": 100}
        assert all(set(parts[part]) == set(again[part]) for part in parts)
        assert set(prepare_data.DEMO) <= {one.hexcode for one in parts["heldout"]}
        monkeypatch.setattr(prepare_data, "TRAIN", 1)
        monkeypatch.setattr(prepare_data, "HELDOUT", 2)
        assert prepared(cache, tmp_path / "out", "--styles", "ink", "--split") == 0
        read = {part: read_captions(tmp_path / "out" / part)[0] for part in ("train", "heldout")}
        assert {part: {sample.text for sample in samples} for part, samples in read.items()} == {
            "train": {"红心，黑白"}, "heldout": {"狐狸，黑白", "猫脸，黑白"}}

    def test_too_few_to_split(self, cache, tmp_path, capsys):
        assert prepared(cache, tmp_path / "out", "--styles", "noto", "--split") == 2
        assert "--split needs 300 + 100 emoji, the chosen groups hold 3" in capsys.readouterr().err
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache"]

    def test_overwrites_only_its_own_and_only_with_force(self, cache, tmp_path, capsys):
        out = tmp_path / "out"
        assert prepared(cache, out) == 0
        assert prepared(cache, out, "--styles", "noto") == 2 and (out / "flat").is_dir()
        assert "give --force" in capsys.readouterr().err
        assert prepared(cache, out, "--styles", "noto", "--groups", "5", "--force") == 0
        with (out / "noto" / "captions.csv").open(encoding="utf-8") as stream:
            assert list(csv.reader(stream)) == [["dir", "text"], ["1f697.png", "汽车，安卓"]]
        assert sorted(entry.name for entry in out.iterdir()) == ["names.json", "noto"]
        (out / "thesis.txt").write_text("mine")
        assert prepared(cache, out, "--force") == 2 and (out / "thesis.txt").read_text() == "mine"
        assert "thesis.txt" in capsys.readouterr().err
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "out"]

    def test_nothing_half_written(self, cache, tmp_path, capsys, monkeypatch):
        def full(*_args):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(prepare_data, "render", full)
        assert prepared(cache, tmp_path / "out") == 2
        assert "No space left on device" in capsys.readouterr().err
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache"]

    @pytest.mark.parametrize(("damage", "said"), [
        (lambda file: file.unlink(), "npm is not installed"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "is broken"),
        (lambda file: archive(file.parent, *prepare_data.NAMES, {"package.json": {"name": "other", "version": "1"}}),
         "holds other@1, expected emojibase-data@17.0.0"),
    ], ids=["missing", "truncated", "other-version"])
    def test_bad_archive(self, cache, tmp_path, capsys, damage, said):
        damage(cache / "emojibase-data-17.0.0.tgz")
        assert prepared(cache, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("flags", ["--size 1e-5", "--size 0", "--groups 2", "--styles contrst", "--split"])
    def test_wrong_flags(self, flags, capsys):
        with pytest.raises(SystemExit) as caught:
            prepare_data.main(flags.split())
        assert caught.value.code == 2 and "error:" in capsys.readouterr().err


class TestCommittedSet:
    def test_counts_split_and_names(self):
        names = json.loads((WUKONG / "data" / "names.json").read_text(encoding="utf-8"))
        seen = {}
        for part, count in (("train", 300), ("heldout", 100)):
            images, texts, skipped = load_folder(WUKONG / "data" / part, 32)
            files = [sample.path.name for sample in read_captions(WUKONG / "data" / part)[0]]
            assert skipped == [] and images.shape == (count, 3, 32, 32)
            assert texts == [f"{names[file]['zh']}，黑白" for file in files]
            assert (images[:, 0] == images[:, 1]).all() and (images[:, 0] == images[:, 2]).all()
            assert images.std(axis=(1, 2, 3)).min() > 0.05      # the least is a white thought bubble of faint lines
            seen[part] = set(files)
        assert not seen["train"] & seen["heldout"] and seen["train"] | seen["heldout"] == names.keys()
        assert {f"{code.lower()}.png" for code in prepare_data.DEMO} <= seen["heldout"]
        apple = Image.open(WUKONG / "data" / "heldout" / "1f34e.png")
        values, counts = np.unique(np.asarray(apple), return_counts=True)
        assert apple.mode == "L" and values[np.argsort(-counts)[:3]].tolist() == [159, 255, 0]     # red, paper, line
        assert names["1f98a.png"] == {"hexcode": "1F98A", "zh": "狐狸", "en": "fox", "group": 3}
        assert sum(len(set(entry)) == 4 for entry in names.values()) == 400


def test_no_mindspore_needed(tmp_path):
    code = "import sys, data, prepare_data; sys.exit('mindspore' in sys.modules)"
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(WUKONG)}, check=True)
