"""The example of the diagnosis page runs, and its output is what the page says."""

from pathlib import Path

from .test_library import run

PAGE = Path(__file__).parents[2] / "docs" / "diagnose.md"


def test_example_of_the_diagnosis_page_runs_and_prints_what_it_says(capsys):
    run(PAGE.read_text(), None, {})
    cause, named = capsys.readouterr().out.splitlines()
    assert cause == "misalignment"
    assert named.startswith("sample prompt 5: token shift +1 of log-probabilities: ")
