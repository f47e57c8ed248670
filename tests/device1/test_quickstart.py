"""The quickstart's promise: a model that knows nothing answers problems it has never seen."""

from pathlib import Path

from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.data.word_problems import is_held_out
from tptrain.train.journal import read_journal
from tptrain.train.run import train

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_word_problems.py"


def test_held_out_problems_are_answered_after_training_only(tmp_path):
    settings = ["topology=cpu-1", f"output_dir={tmp_path / 'run'}", "log.tensorboard=false"]
    result = train(plan_recipe(apply_overrides(load_recipe(RECIPE), settings)))
    assert len(result.before.exact.answers) == 200
    assert result.before.exact.rate < 0.05
    assert result.after.exact.rate >= 0.8
    assert len({record.compiles for record in read_journal(tmp_path / "run" / "journal.jsonl")}) == 1
    assert is_held_out((33, 3)), "the first problem that the quickstart shows"
    assert result.after.exact.answers[0].problem.question.startswith(
        "Finn has 33 shells. Noah has 3 times as many."
    )
