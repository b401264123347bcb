"""The evaluation text is held out: it shares no passage with the calibration text."""

import re
from collections import Counter
from importlib import resources

import pytest

FILES = ["code", "dialogue", "languages", "mathematics", "prose", "structured"]
# A word, or one character of a script that is written without spaces.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def _read(package: str, name: str) -> str:
    return (resources.files(package) / "corpus" / f"{name}.txt").read_text("utf-8")


def _sequences(text: str) -> Counter[tuple[str, ...]]:
    """How often each run of eight words occurs; runs do not cross from one text to the next."""
    found: Counter[tuple[str, ...]] = Counter()
    for document in text.split("\n%%\n"):
        words = _WORD.findall(document.lower())
        found.update(zip(*(words[start:] for start in range(8)), strict=False))
    return found


def _all(package: str) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for name in FILES:
        found.update(_sequences(_read(package, name)))
    return found


def test_a_passage_that_recurs_is_found() -> None:
    line = "the cat sat on the mat and purred"
    assert _sequences(f"{line}\n%%\n{line.upper()}!")[tuple(line.split())] == 2
    assert _sequences("今日は雨が降った")[tuple("今日は雨が降った")] == 1


@pytest.mark.parametrize("package", ["moequant.evaluate", "moequant.calibrate"])
def test_the_files_are_these_six(package: str) -> None:
    folder = resources.files(package) / "corpus"
    assert sorted(file.name for file in folder.iterdir()) == [f"{name}.txt" for name in FILES]


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_whole(name: str) -> None:
    text = _read("moequant.evaluate", name)
    assert len(text.encode()) > 6000
    assert all(document.strip() for document in text.split("\n%%\n"))
    assert text.endswith("\n") and "\ufffd" not in text


def test_no_eight_words_in_a_row_are_also_calibrated_on() -> None:
    assert not _all("moequant.evaluate").keys() & _all("moequant.calibrate").keys()


def test_no_eight_words_in_a_row_occur_twice() -> None:
    assert [run for run, times in _all("moequant.evaluate").items() if times > 1] == []
