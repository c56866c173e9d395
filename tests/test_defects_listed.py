"""docs/mindpet.md names a test for each of MindPet's defects 1 to 20, and each of them exists."""
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("page", ["mindpet.md", "mindpet_CN.md"])
def test_every_defect_has_its_tests(page):
    text = (TESTS.parent / "docs" / page).read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \|(.*)$", text, re.MULTILINE))
    assert list(rows) == [str(number) for number in range(1, 21)]
    for number, row in rows.items():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, f"defect {number} has no test"
        for file, test in named:
            assert test.startswith(f"test_defect_{int(number):02}_"), f"defect {number} names {test}"
            assert f"\ndef {test}(" in (TESTS / file).read_text(encoding="utf-8"), f"{file} has no {test}"


def test_every_such_test_is_listed():
    text = (TESTS.parent / "docs" / "mindpet.md").read_text(encoding="utf-8")
    written = {name for path in TESTS.glob("test_*.py")
               for name in re.findall(r"^def (test_defect_\d\d_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {name for name in written if f"::{name}`" not in text} == set()
