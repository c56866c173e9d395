"""Wukong's data format read: rows, pixels and batches, against values known by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow is in the extra 'examples'")

WUKONG = Path(__file__).resolve().parent.parent / "examples" / "wukong"
sys.path.insert(0, str(WUKONG))

from data import DataError, bucket_shapes, load_buckets, load_folder, load_image, read_captions  # noqa: E402

RED, WHITE = [1.0, -1.0, -1.0], [1.0, 1.0, 1.0]


def png(path: Path, pixels, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path)
    return path


def folder_of(tmp_path: Path, text: str | bytes, images=("a.png", "b.png")) -> Path:
    for index, name in enumerate(images):
        png(tmp_path / name, np.full((4, 4), 10 * (index + 1)))
    (tmp_path / "captions.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def rows_of(folder: Path) -> list[tuple[str, str]]:
    return [(sample.path.name, sample.text) for sample in read_captions(folder)[0]]


class TestReadCaptions:
    @pytest.mark.parametrize("text", [
        "dir,text\na.png,狐狸\nb.png,猫\n",
        "\ufeffdir,text\r\na.png,狐狸\r\nb.png,猫\r\n",
        'dir,text\n"a.png","狐狸"\nb.png,猫',
        "text,dir\n狐狸,a.png\n猫,./b.png\n",
        "id,dir, text\n1,a.png, 狐狸 \n\n2,b.png,猫\n\n",
    ], ids=["plain", "bom-crlf", "quotes-no-last-newline", "other-order", "more-columns-blank-lines"])
    def test_spellings(self, tmp_path, text):
        folder = folder_of(tmp_path, text)
        samples, skipped = read_captions(folder)
        assert [(sample.path.parent, sample.path.name, sample.text) for sample in samples] == [
            (folder, "a.png", "狐狸"), (folder, "b.png", "猫")]
        assert skipped == []

    def test_quoted_comma_quote_and_line_break(self, tmp_path):
        folder = folder_of(tmp_path, 'dir,text\na.png,"一, ""二"""\nb.png,"三\n四"\n')
        assert rows_of(folder) == [("a.png", '一, "二"'), ("b.png", "三 四")]

    def test_every_csv_in_order_of_names_and_subfolders(self, tmp_path):
        png(tmp_path / "deep" / "er" / "c.png", np.zeros((2, 2)))
        folder = folder_of(tmp_path, "dir,text\nb.png,b\n")
        (folder / "A.CSV").write_text("dir,text\ndeep/er/c.png,c\ndeep\\er\\c.png,c2\n")
        (folder / "._captions.csv").write_bytes(b"\x00\x05\xff")
        assert rows_of(folder) == [("c.png", "c"), ("c.png", "c2"), ("b.png", "b")]

    def test_bad_rows_are_named_by_file_and_line_and_the_rest_is_kept(self, tmp_path):
        lines = ["dir,text", "a.png,good", "a.png", "a.png,", ",猫", "a.png,1,2", "none.png,猫", "", "../out.png,猫",
                 "/etc/hostname,猫", "sub,猫", 'a.png,"open', "a\0.png,猫", "b.png,也好", "x" * 5000 + ",猫"]
        (tmp_path / "in" / "sub").mkdir(parents=True)
        png(tmp_path / "out.png", np.zeros((2, 2)))
        folder = folder_of(tmp_path / "in", "\n".join(lines))
        (folder / "link.png").symlink_to(tmp_path / "out.png")
        (folder / "z.csv").write_text("dir,text\nlink.png,猫\n", encoding="utf-8")
        samples, skipped = read_captions(folder)
        assert [(sample.text, sample.where) for sample in samples] == [
            ("good", "captions.csv line 2"), ("也好", "captions.csv line 14")]
        # How a NUL is refused differs between Pythons.
        expected = {3: "found 1", 4: "no value for text", 5: "no value for the image", 6: "found 3",
                    7: "no image none.png", 9: "leaves the data folder", 10: "leaves the data folder",
                    11: "no image sub", 12: "not CSV", 13: "", 15: "is no path"}
        assert len(skipped) == len(expected) + 1
        for message, (line, reason) in zip(skipped, expected.items(), strict=False):
            assert message.startswith(f"captions.csv line {line}: ") and reason in message
        assert skipped[-1] == "z.csv line 2: link.png leaves the data folder"

    @pytest.mark.parametrize(("text", "said"), [
        (None, "no CSV file in"),
        ("", "found 'an empty file'"),
        ("path,caption\na.png,猫\n", "found 'path,caption'"),
        ("a.png,猫\n", "columns dir,text"),
        ("dir,dir,text\na.png,a.png,猫\n", "columns dir,text"),
        ("dir,text\n", "not a single usable row"),
        ("dir,text\nnone.png,猫\n", "captions.csv line 2: no image none.png"),
        ("dir,text\na.png,狐狸\n".encode("gbk"), "is not UTF-8"),
    ])
    def test_unusable_folders(self, tmp_path, text, said):
        if text is not None:
            folder_of(tmp_path, text)
        with pytest.raises(DataError) as caught:
            read_captions(tmp_path)
        assert said in str(caught.value) and "\n" not in str(caught.value)

    def test_no_folder(self, tmp_path):
        with pytest.raises(DataError, match="no data folder"):
            read_captions(tmp_path / "none")


class TestLoadImage:
    def test_values_are_the_bytes(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
        image = load_image(png(tmp_path / "a.png", pixels), 5, 5)
        assert image.dtype == np.float32 and image.flags.c_contiguous
        np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1)
        assert load_image(png(tmp_path / "b.png", np.full((2, 2), 255)), 2, 2).min() == 1
        assert load_image(png(tmp_path / "c.png", np.zeros((2, 2))), 2, 2).max() == -1

    @pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "I;16"])
    def test_other_modes(self, tmp_path, mode):
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        if mode == "I;16":
            Image.fromarray(np.array([[0, 65535]] * 2, np.uint16)).save(path)
        else:
            png(path, [[0, 255]] * 2, mode)
        np.testing.assert_array_equal(load_image(path, 2, 2), np.broadcast_to([-1.0, 1.0], (3, 2, 2)))

    def test_alpha_on_white(self, tmp_path):
        path = png(tmp_path / "a.png", [[[255, 0, 0, 255], [0, 0, 0, 0]], [[0, 0, 0, 51], [255, 0, 0, 0]]])
        image = load_image(path, 2, 2)
        grey = np.float32(204) / np.float32(127.5) - 1
        np.testing.assert_array_equal(image.transpose(1, 2, 0), [[RED, WHITE], [[grey] * 3, WHITE]])

    def test_transparent_palette_on_white(self, tmp_path):
        image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.save(tmp_path / "a.png", transparency=0)
        pixels = load_image(tmp_path / "a.png", 2, 2).transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels, [[WHITE, RED], [RED, WHITE]])

    @pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
    def test_middle_square(self, tmp_path, shape):
        pixels = np.arange(36, dtype=np.uint8).reshape(shape)
        middle = pixels[:, 2:6] if shape[0] == 4 else pixels[2:6]
        image = load_image(png(tmp_path / "a.png", pixels), 4, 4)
        np.testing.assert_array_equal(image, np.stack([middle.astype(np.float32) / np.float32(127.5) - 1] * 3))

    @pytest.mark.parametrize("size", [3, 64])
    def test_scaled(self, tmp_path, size):
        pixels = np.zeros((30, 50), np.uint8)
        pixels[:, 25:] = 255
        image = load_image(png(tmp_path / "a.png", pixels), size, size)
        assert image.shape == (3, size, size) and image.min() == -1 and image.max() == 1
        np.testing.assert_array_equal(image[0, 0], image[2, -1])
        np.testing.assert_allclose(image[0, 0], -image[0, 0, ::-1], atol=0.01)

    @pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n0000"])
    def test_unreadable(self, tmp_path, content):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match="unreadable image .*a.png"):
            load_image(tmp_path / "a.png", 4, 4)

    def test_truncated(self, tmp_path):
        path = png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
        path.write_bytes(path.read_bytes()[:4000])
        with pytest.raises(DataError, match="unreadable image"):
            load_image(path, 64, 64)


class TestLoadFolder:
    def test_unreadable_image_is_a_named_skip(self, tmp_path):
        folder = folder_of(tmp_path, "dir,text\nbroken.png,坏\na.png,甲\nb.png\nb.png,乙\n")
        (folder / "broken.png").write_bytes(b"no image")
        images, texts, skipped = load_folder(folder, 4)
        assert texts == ["甲", "乙"] and images.shape == (2, 3, 4, 4) and images.dtype == np.float32
        np.testing.assert_array_equal(images[:, 0, 0, 0], np.float32([10, 20]) / np.float32(127.5) - 1)
        assert len(skipped) == 2 and skipped[0].startswith("captions.csv line 4: ")
        assert skipped[1].startswith("captions.csv line 2: unreadable image")

    def test_not_one_readable(self, tmp_path):
        folder = folder_of(tmp_path, "dir,text\na.png,甲\n")
        (folder / "a.png").write_bytes(b"")
        with pytest.raises(DataError, match="not a single usable row.*captions.csv line 2: unreadable image"):
            load_folder(folder, 4)


class TestMetadata:
    def test_hugging_faces_list_is_read_like_ours(self, tmp_path):
        folder = folder_of(tmp_path, "dir,text\n")
        (folder / "captions.csv").unlink()
        lines = ['{"file_name": "a.png", "text": " 甲 ", "more": [1]}', "", '{"file_name": "b.png"}', "[1]", "{",
                 '{"file_name": "a.png", "text": 3}', '{"file_name": "none.png", "text": "乙"}',
                 '{"file_name": "b.png", "text": "乙"}']
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        samples, skipped = read_captions(folder)
        assert [(sample.path.name, sample.text, sample.where) for sample in samples] == [
            ("a.png", "甲", "metadata.jsonl line 1"), ("b.png", "乙", "metadata.jsonl line 8")]
        said = "not a JSON object with the texts file_name and text"
        assert skipped == [f"metadata.jsonl line {line}: {said}" for line in (3, 4, 5, 6)] + [
            "metadata.jsonl line 7: no image none.png"]


class TestBuckets:
    def test_shapes_are_multiples_of_at_most_the_area(self):
        assert bucket_shapes(64, 1, 8) == [(64, 64)]
        for side, count, multiple in ((64, 5, 8), (512, 9, 64), (32, 3, 8)):
            shapes = bucket_shapes(side, count, multiple)
            assert 3 <= len(shapes) <= count and len(set(shapes)) == len(shapes) and (side, side) in shapes
            assert all(h % multiple == 0 and w % multiple == 0 and h * w <= side * side for h, w in shapes)
            assert shapes == sorted(shapes) and {(w, h) for h, w in shapes} == set(shapes)
        assert bucket_shapes(512, 5, 64) == [(320, 768), (384, 640), (512, 512), (640, 384), (768, 320)]

    def test_each_image_goes_to_the_nearest_shape(self, tmp_path):
        rows = ["dir,text"]
        for name, (height, width) in {"wide": (10, 20), "square": (9, 10), "tall": (30, 14)}.items():
            pixels = np.zeros((height, width), np.uint8)
            pixels[:, width // 2:] = 255
            png(tmp_path / f"{name}.png", pixels)
            rows.append(f"{name}.png,{name}")
        (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
        buckets, skipped = load_buckets(tmp_path, [(8, 16), (8, 8), (16, 8)])
        assert skipped == [] and [one.texts for one in buckets] == [["wide"], ["square"], ["tall"]]
        assert [one.images.shape for one in buckets] == [(1, 3, 8, 16), (1, 3, 8, 8), (1, 3, 16, 8)]
        for one in buckets:
            half = one.images.shape[-1] // 2
            np.testing.assert_allclose(one.images[0, :, :, :half - 1], -1, atol=0.02)
            np.testing.assert_allclose(one.images[0, :, :, half + 1:], 1, atol=0.02)
        assert [one.texts for one in load_buckets(tmp_path, [(8, 8)])[0]] == [["wide", "square", "tall"]]
