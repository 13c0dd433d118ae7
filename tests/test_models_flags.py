"""Every field of a recipe and of its model is an option of train, made from the field itself."""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_models_ranges import EFFICIENTDET_FIELDS, MODEL_FIELDS, NEEDED, RECIPE_FIELDS

from models.__main__ import main
from models.command_line import parser
from models.commands.flags import add_fields, comments, given_fields
from models.commands.train import configs, recipe_options, with_options
from models.efficientdet import EfficientDetConfig
from models.ranges import option, real, several, switch, whole
from models.recipes import Recipe

# The first holds the others, the data have the rest.
NO_OPTION = {"model", "num_classes", "class_frequencies"}
FIELDS = {n: row for n, row in (RECIPE_FIELDS | MODEL_FIELDS).items() if n not in NO_OPTION}
# Bad in Python, and as words the good 5, 0.1, (0.5,) and (1.0,).
GOOD_AS_WORDS = {("steps", "5"), ("learning_rate", "0.1"), ("drops", 0.5), ("aspect_ratios", 1.0)}


def words(name: str, value: Any) -> list[str]:
    """A field and its value as they are typed."""
    if isinstance(value, bool):
        return [option(name) if value else option(f"no_{name}")]
    if isinstance(value, tuple):
        return [
            option(name),
            *(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value),
        ]
    return [f"{option(name)}={'none' if value is None else value}"]  # also of -1e-05


def parsed(*more: str) -> dict[str, Any]:
    return recipe_options(parser().parse_args(["train", "--data", "d", "--out", "o", *more]))


def test_no_field_is_without_an_option() -> None:
    for config, _ in configs():
        names = {field.name for field in dataclasses.fields(config)} - NO_OPTION
        assert names <= {*FIELDS, *EFFICIENTDET_FIELDS}
    with pytest.raises(SystemExit):
        parsed("--num-classes", "3")


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_sets_its_field_alone(name: str) -> None:
    good, _ = FIELDS[name]
    given = parsed(*words(name, good))
    assert given == {name: good}
    base = NEEDED.get(name, Recipe())
    if name == "crop":
        good = {"crop": good, "min_size": None}  # crops keep their size
    changed = with_options(base, given)
    for config, before in ((changed, base), (changed.model, base.model)):
        for field in dataclasses.fields(config):
            expected = good if isinstance(good, dict) else {name: good}
            if field.name != "model":
                value = expected.get(field.name, getattr(before, field.name))
                assert getattr(config, field.name) == value


@pytest.mark.parametrize("name", sorted({*EFFICIENTDET_FIELDS} - {*FIELDS} - NO_OPTION))
def test_an_option_of_one_detector_alone(name: str) -> None:
    good, _ = EFFICIENTDET_FIELDS[name]
    given = parsed(*words(name, good))
    assert given == {name: good}
    changed = with_options(Recipe(model=EfficientDetConfig()), given)
    assert getattr(changed.model, name) == good
    with pytest.raises(ValueError, match=f"{option(name)} is nothing that a retinanet has"):
        with_options(Recipe(), given)


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_value_is_a_sentence(name: str, tmp_path: Path, capsys) -> None:
    good, bad = FIELDS[name]
    for value in [] if isinstance(good, bool) else [*bad, "x"]:
        if (name, value) in GOOD_AS_WORDS:
            continue
        out = tmp_path / "run"
        typed = words(name, str(value) if isinstance(value, bool) else value)
        command = ["train", "--data", "none", "--out", str(out), *typed]
        assert main([*command, "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert re.match(rf"(?=.*{option(name)}[ ,])error: .* must .* got ", error), error
        assert error.count("\n") == 1 and not out.exists()


def test_what_is_given() -> None:
    assert parsed() == {}
    assert parsed("--clip-norm", "none") == {"clip_norm": None}
    assert parsed("--min-size", "640") == {"min_size": 640}
    assert parsed("--min-size", "640", "800") == {"min_size": (640, 800)}
    assert parsed("--min-size", "none") == {"min_size": None}
    assert parsed("--anchor-sizes", "16,20", "32,40") == {"anchor_sizes": ((16, 20), (32, 40))}
    assert repr(parsed("--learning-rate", "1")) == "{'learning_rate': 1.0}"
    assert parsed("--compile", "--no-symmetries") == {"compile": True, "symmetries": False}


def test_names_of_options_are_no_values(tmp_path: Path, capsys) -> None:
    """steps and gamma are options, and words that a schedule and a value may be."""
    command = ["train", "--data", "d", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--steps", "5", "--schedule", "linear"]) == 1
    assert capsys.readouterr().err == (
        "error: --schedule must be one of steps, cosine, got 'linear'\n"
    )
    assert main([*command, "--steps", "gamma", "--gamma", "1"]) == 1
    assert capsys.readouterr().err.endswith(
        "--steps must be a whole number at least 1, got 'gamma'\n"
    )


@dataclass
class Base:
    size: int = 3  # at 100 %
    both: int = 1  # of the base


@dataclass
class Derived(Base):
    # A title of what follows
    rates: tuple[float, ...] = ()
    both: int = 2  # of the derived
    flag: bool = False  # on or off


def test_help_is_the_comment_and_the_range() -> None:
    assert comments(Derived) == {"size": "at 100 %", "both": "of the derived", "flag": "on or off"}
    assert comments(Base)["both"] == "of the base"
    tried = argparse.ArgumentParser()
    ranges = {
        "size": whole(1),
        "both": whole(0),
        "rates": several(real(), least=0),
        "flag": switch(),
    }
    add_fields(tried, Derived, ranges, ["size", "rates", "flag"])
    said = " ".join(tried.format_help().split())
    assert "--size NUMBER at 100 %; a whole number at least 1" in said
    assert "--rates [NUMBER ...] 0 or more values, each a finite number" in said
    assert "--flag, --no-flag on or off" in said
    assert given_fields(tried.parse_args(["--rates", "--flag"]), Derived) == {
        "rates": (),
        "flag": True,
    }
