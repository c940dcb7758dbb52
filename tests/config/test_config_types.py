import peft
import pytest

from inlay.config import PeftType, TaskType


@pytest.mark.parametrize(("ours", "theirs"), [(PeftType, peft.PeftType), (TaskType, peft.TaskType)])
def test_members_are_pefts(ours, theirs):
    assert [(m.name, m.value) for m in ours] == [(m.name, m.value) for m in theirs]
    assert all(isinstance(member, str) for member in ours)
