"""Long runs in short: memory, compiled programs, open files and threads do not grow with steps and calls."""

import pytest
from robustness import long_run
from test_train import TINY, tiny  # noqa: F401


def test_growth_is_recognized():
    rows = [
        dict(done=i, process=1, megabytes=500.0 + i % 3, programs=9, files=20 + i % 2, threads=8) for i in range(40)
    ]
    assert all(values["flat"] for values in long_run.growth(rows).values())
    for name, leak in (("megabytes", 2.0), ("programs", 0.2), ("files", 0.5), ("threads", 0.1)):
        leaking = [row | {name: row[name] + int(leak * row["done"])} for row in rows]
        flat = {key: values["flat"] for key, values in long_run.growth(leaking).items()}
        assert flat == {key: key != name for key in flat}
    with pytest.raises(ValueError):
        long_run.growth(rows[:5])
    # The processes before the newest do not count.
    assert long_run.growth([dict(rows[0], process=0, files=900), *rows]) == long_run.growth(rows[-len(rows) :])
