"""Settings given instead of a profile's values: named, typed and in range, or refused before anything runs."""

import pytest

from lightmedvlm_utils.cli import main
from lightmedvlm_utils.config import PROFILES
from lightmedvlm_utils.errors import UserError
from lightmedvlm_utils.settings import changes, describe, from_assignments, from_file, names, resolve, to_yaml


@pytest.mark.parametrize("profile", PROFILES)
def test_every_value_of_a_profile_is_a_setting_that_its_own_rules_accept(profile, tmp_path):
    (tmp_path / "all.yaml").write_text(to_yaml(PROFILES[profile]))
    read, given = from_file(tmp_path / "all.yaml")
    assert read == profile and set(given) == set(names())
    assert resolve(profile, given) == PROFILES[profile] and changes(resolve(profile, given)) == {}


def test_given_values_take_the_place_of_the_profiles_and_no_others():
    given = from_assignments(["stage2.epochs=3", "stage1.disease_warmup=0", "stage1.connector_lr=1e-4", "vision=swin"])
    profile = resolve("smoke", given)
    assert (profile.stage2.epochs, profile.stage1.disease_warmup, profile.vision) == (3, 0, "swin")
    assert profile.stage1.connector_lr == 1e-4  # YAML 1.1 takes this for a text
    assert changes(profile) == given | {"stage1.connector_lr": 1e-4}
    assert any("stage2.epochs = 3" in line and ": 1)" in line for line in describe(profile))
    assert resolve("smoke", {"stage2": {"epochs": 3}}) == resolve("smoke", {"stage2.epochs": 3})
    assert resolve("smoke", "{stage2.epochs: 3}") == resolve("smoke", {"stage2.epochs": 3})


def test_an_option_of_one_connector_leaves_its_others_alone():
    profile = resolve("laptop", from_assignments(["connector_options.sasa.conv=false"]))
    assert profile.connector_options["sasa"] == PROFILES["laptop"].connector_options["sasa"] | {"conv": False}


def test_a_folder_is_given_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "swin").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("smoke", {"vision": "swin"}).vision == str(tmp_path / "swin")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("stage1.epoch=2", "did you mean 'stage1.epochs'"),
        ("epochs=2", "epochs'?"),
        ("zzz=1", "lightmedvlm config"),
        ("name=x", "no setting 'name'"),
        ("stage2.epochs=-1", "greater than or equal to 0"),
        ("stage2.epochs=.nan", "stage2.epochs"),
        ("stage2.epochs=.inf", "stage2.epochs"),
        ("stage2.epochs=true", "takes a number"),
        ("stage2.batch_size=0", "greater than or equal to 1"),
        ("stage2.batch_size=2.5", "integer"),
        ("stage2.learns=[language]", "'vision', 'connector', 'detector' or 'lora'"),
        ("stage2.learns=[]", "at least 1"),
        ("stage2=3", "stage2.epochs"),
        ("vision=7", "string"),
        ("vision=", "string"),
        ("balance=fair", "'inverse-frequency'"),
        ("precision=float8", "'bfloat16'"),
        ("lora_dropout=1.5", "less than or equal to 1"),
        ("connector_options=3", "dictionary"),
        ("stage2.epochs", "NAME=VALUE"),
        ("vision={a", "YAML"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_runs(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTMEDVLM_OUTPUTS", str(tmp_path))
    assert main(["run", "--profile", "smoke", "--set", given]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "connector_options.sasa.convs=true"], "no option 'convs'"),
        (["--set", "connector_options.sass.conv=true"], "did you mean 'sasa'"),
        (["--set", "num_queries=3"], "one per label"),
        (["-p", "connectors", '["sassa"]'], "did you mean 'sasa'"),
        (["--set", "plugins=[no_such_module]"], "no_such_module"),
        (["--seed", "-1"], "seed"),
        (["--data-root", "."], "phantom"),
        (["--run-name", "reference"], "part of the project"),
    ],
)
def test_what_only_the_model_knows_is_checked_before_anything_runs(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTMEDVLM_OUTPUTS", str(tmp_path))
    assert main(["run", "--profile", "smoke", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_config_prints_what_config_reads(tmp_path, capsys):
    assert main(["config", "--profile", "smoke", "--set", "stage2.epochs=3"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert main(["config", "--config", str(tmp_path / "mine.yaml"), "--set", "stage3.epochs=2"]) == 0
    printed = capsys.readouterr().out
    assert printed == to_yaml(resolve("smoke", {"stage2.epochs": 3, "stage3.epochs": 2}))
    assert main(["config", "--config", str(tmp_path / "mine.yaml"), "--profile", "laptop"]) == 2
    assert "drop --profile" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["- 1\n- 2", "a: [", "stage2: 3", "stage2:\n  epoch: 3", "\x00"])
def test_a_settings_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError):
        resolve("smoke", from_file(tmp_path / "bad.yaml")[1])


def test_a_result_depends_on_the_values_that_were_read():
    reads: set[str] = set()
    profile = PROFILES["laptop"].noting(reads)
    assert (profile.stage1.epochs, profile.vision) == (PROFILES["laptop"].stage1.epochs, "small")
    assert reads == {"stage1.epochs", "vision"}
    assert profile == PROFILES["laptop"]
