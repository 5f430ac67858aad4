"""`train --dry-run --elsewhere`: what only another machine can answer is listed, not refused."""

from moe_replay.cli.main import main
from moe_replay.grpo.start import preflight

LEAN = {"use_precision_aware_optimizer": True}


def test_an_option_that_needs_transformer_engine_is_left_to_the_other_machine(write_recipe, capsys):
    recipe = str(write_recipe(megatron={"optimizer": LEAN}))
    assert main(["train", recipe, "--dry-run"]) == 2
    assert "this machine lacks what the recipe needs" in capsys.readouterr().err
    assert main(["train", recipe, "--dry-run", "--elsewhere"]) == 0
    said = capsys.readouterr()
    left = "left to the machine that trains: megatron.optimizer.use_precision_aware_optimizer"
    assert left in said.out + said.err


def test_a_missing_package_is_left_to_the_other_machine(write_recipe, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "installed", lambda name: None if name == "torch" else "999")
    monkeypatch.setattr(preflight, "_declared_ranges", lambda: {"torch": ">=2"})
    recipe = str(write_recipe())
    assert main(["train", recipe, "--dry-run"]) == 2
    capsys.readouterr()
    assert main(["train", recipe, "--dry-run", "--elsewhere"]) == 0
    said = capsys.readouterr()
    assert "left to the machine that trains: torch is missing" in said.out + said.err


def test_the_number_format_is_that_of_a_gpu(write_recipe, capsys):
    assert main(["train", str(write_recipe()), "--dry-run", "--elsewhere"]) == 0
    assert 'dtype = "bfloat16"' in capsys.readouterr().out.partition("[data]")[0]


def test_an_optimizer_on_the_host_goes_with_the_number_format_of_a_gpu(write_recipe, capsys):
    recipe = str(write_recipe(megatron={"optimizer": {"optimizer_cpu_offload": True}}))
    assert main(["train", recipe, "--dry-run", "--elsewhere"]) == 0
    assert "optimizer_cpu_offload = true" in capsys.readouterr().out


def test_what_is_wrong_anywhere_is_still_refused(write_recipe, capsys):
    recipe = str(write_recipe(megatron={"optimizer": LEAN | {"no_such_field": 1}}))
    assert main(["train", recipe, "--dry-run", "--elsewhere"]) == 2
    assert "no_such_field" in capsys.readouterr().err
