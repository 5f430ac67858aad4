"""What is said while a command loads."""

from moe_replay.cli.stages import Progress


def test_d6_progress_of_long_work_is_said(capsys):
    progress = Progress(every_s=0.0)
    progress("measuring the prompts of p.jsonl", 5000, 200000)
    assert capsys.readouterr().err == "measuring the prompts of p.jsonl: 5,000 of 200,000\n"


def test_d6_nothing_is_said_of_short_work(capsys):
    Progress(every_s=1e6)("measuring", 1, 2)
    assert capsys.readouterr().err == ""
