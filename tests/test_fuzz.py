"""A few rounds of the fuzz, the same each time; `make fuzz` goes on. And that it can fail."""

import inspect
import random

import fuzz
import fuzz_arguments
import pytest
import torch
from fuzz_modules import MODULES

import focalops
from focalops import reference

# A little of everything, in some seconds.
SEEDS = range(6)


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_every_path_of_every_function_agrees(name, capsys):
    found = [
        fuzz.main(["--only", name, "--seed", f"{seed}", "--seconds", "0", "--compile", "0"])
        for seed in SEEDS
    ]
    assert not any(found), capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(fuzz.NAMES) - set(MODULES)))
def test_every_argument_is_made(name):
    random.seed(0)
    torch.manual_seed(0)
    made = {argument for _ in range(60) for argument in fuzz_arguments.MAKERS[name]()}
    parameters = inspect.signature(getattr(focalops, name)).parameters.values()
    named = {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
    assert named - made <= {"inplace_backward"}  # which the rounds add


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    return fuzz.main([*options, "--seconds", "0", "--compile", "0"]), capsys.readouterr().out


def test_a_wrong_number_is_printed_with_what_repeats_it(monkeypatch, capsys):
    exact = reference.encode_boxes

    def wrong(*args, **options):
        return exact(*args, **options) * 1.001

    monkeypatch.setitem(fuzz.REFERENCES, "encode_boxes", wrong)
    seeds = [s for s in range(20) if run(capsys, "--only", "encode_boxes", "--seed", str(s))[0]]
    assert len(seeds) > 3
    _, said = run(capsys, "--only", "encode_boxes", "--seed", str(seeds[0]))
    assert "encode_boxes, cpu against the reference: result or gradient 0 differs in" in said
    assert f"again: python tests/fuzz.py --only encode_boxes --seed {seeds[0]} --seconds 0" in said


def test_a_sentence_of_one_path_alone_is_printed(monkeypatch, capsys):
    def other(boxes, anchors, weights):
        where = "there" if boxes.is_meta else "here"
        raise ValueError(f"boxes are wrong {where}")

    monkeypatch.setattr(focalops, "encode_boxes", other)
    said = "".join(run(capsys, "--only", "encode_boxes", "--seed", str(s))[1] for s in range(20))
    assert "meta: says 'boxes are wrong there', cpu 'boxes are wrong here'" in said
