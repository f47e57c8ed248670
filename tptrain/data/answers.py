"""GSM8K's scoring rule: the number after "####", commas apart, must be the reference's.

Source: `extract_answer` and `is_correct` in grade_school_math/dataset.py of openai/grade-school-math.
"""

from __future__ import annotations

import re

_FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def extract_answer(text: str) -> str | None:
    """The final answer: the number after the first "#### ", without commas; None when there is none.

    >>> extract_answer("1000+234 = <<1000+234=1234>>1234\\n#### 1,234")
    '1234'
    """
    match = _FINAL_ANSWER.search(text)
    return match[1].replace(",", "") if match else None


def exact_match(generated: str, reference: str) -> bool:
    """Whether a generated text gives the reference's final answer.

    A reference that has none (any other prompt and completion) is matched as a whole, outer whitespace aside.
    """
    wanted = extract_answer(reference)
    if wanted is None:
        return generated.strip() == reference.strip()
    return extract_answer(generated) == wanted
