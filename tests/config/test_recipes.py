"""The recipes of the repository: each plans as it is on 1, 4, 8 and 16 devices, and imports no framework."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tptrain.config import Plan
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.errors import ProblemsError
from tptrain.family import stored_rows

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "recipes").glob("*.py"))
NAMES = [path.stem for path in SCRIPTS]


def _plan(name: str, *overrides: str) -> Plan:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.py")
    return plan_recipe(apply_overrides(recipe, overrides), {"HF_HOME": "/nowhere"})


def test_the_recipes_are_there() -> None:
    assert {"llama3_8b_gsm8k", "tiny_gsm8k", "tiny_word_problems"} <= set(NAMES)


@pytest.mark.parametrize("devices", [1, 4, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_works_without_edits(name: str, devices: int) -> None:
    plan = _plan(name, f"topology=cpu-{devices}")
    assert plan.num_devices == devices
    assert plan.micro_rows % plan.batch_shards == 0


@pytest.mark.parametrize("name", NAMES)
def test_is_named_after_its_file_and_short(name: str) -> None:
    script = ROOT / "recipes" / f"{name}.py"
    assert load_recipe(script).name == name
    text = script.read_text()
    assert len(text.splitlines()) <= 60
    assert f"recipes/{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_torch_backend(name: str) -> None:
    assert _plan(name, "backend=torch").num_devices == 1


def test_llama3_8b_on_the_slice_it_is_for() -> None:
    plan = _plan("llama3_8b_gsm8k", "topology=v5p-32")
    assert plan.mesh.axis_sizes == {"data": 1, "fsdp": 16, "expert": 1, "context": 1, "tensor": 1}
    assert sum(row.num_elements for row in stored_rows(plan.table)) == 8_030_261_248
    two = _plan("llama3_8b_gsm8k", "topology=2xv5p-32", "mesh.fsdp=8", "mesh.tensor=2")
    assert two.mesh.axis_sizes == {"data": 2, "fsdp": 8, "expert": 1, "context": 1, "tensor": 2}


@pytest.mark.parametrize("name", ["tiny_gsm8k", "tiny_word_problems"])
def test_tiny_recipes_on_fsdp_and_tensor(name: str) -> None:
    plan = _plan(name, "topology=cpu-8", "mesh.fsdp=4", "mesh.tensor=2")
    assert plan.mesh.describe() == "fsdp=4 x tensor=2"


@pytest.mark.parametrize("name", NAMES)
def test_local_data_takes_the_place_of_the_hub(name: str) -> None:
    plan = _plan(name, "topology=cpu-1", "data.path=somewhere/train.jsonl", "eval.path=somewhere/test.jsonl")
    assert plan.recipe.data.path == "somewhere/train.jsonl"


def test_found_by_name_in_the_recipes_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_recipe("tiny_gsm8k").name == "tiny_gsm8k"
    for wrong, guess in (
        ("tiny_gsmk", "recipes/tiny_gsm8k.py"),
        ("recipes/tiny_gsm8.py", "recipes/tiny_gsm8k.py"),
    ):
        with pytest.raises(ProblemsError) as caught:
            load_recipe(wrong)
        (problem,) = caught.value.problems
        assert (problem.setting, problem.value) == ("recipe", wrong)
        assert "is not a recipe script that exists" in problem.rule
        assert "tiny_gsm8k" in problem.other
        assert problem.fix.startswith(guess)


def test_a_recipe_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "my_sizes.py").write_text("ROWS = 24\n")
    script = tmp_path / "mine.py"
    script.write_text(
        "from my_sizes import ROWS\nfrom tptrain.config import *\n"
        'RECIPE = Recipe(name="mine", data=DataSection(batch_rows=ROWS))\n'
    )
    before = list(sys.path)
    assert load_recipe(script).data.batch_rows == 24
    assert sys.path == before


def test_importing_recipes_imports_no_framework() -> None:
    heavy = [
        "torch",
        "jax",
        "transformers",
        "datasets",
        "orbax",
        "torch_xla",
        "numpy",
        "tokenizers",
        "huggingface_hub",
    ]
    code = (
        "import sys\nfrom tptrain.config.recipe_file import load_recipe\n"
        f"for path in {[str(path) for path in SCRIPTS]!r}: load_recipe(path)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
