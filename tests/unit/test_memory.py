"""Main memory is asked for before it is taken."""

import pytest

from utils.memory import available_memory, require_memory
from utils.program import UserError


def group(folder, limit: str, used: int, caches: int = 0):
    folder.mkdir()
    contents = {"max": limit, "current": str(used), "stat": f"anon 1\ninactive_file {caches}\nactive_file 0"}
    for name, content in contents.items():
        (folder / f"memory.{name}").write_text(content + "\n")
    return folder


def test_available_is_what_the_machine_and_a_container_leave(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:  1000 kB\n")
    assert available_memory(meminfo, tmp_path / "none") == 1_024_000
    assert available_memory(meminfo, group(tmp_path / "tight", "500000", 400_000, caches=50_000)) == 150_000
    assert available_memory(meminfo, group(tmp_path / "over", "500000", 600_000)) == 0
    assert available_memory(meminfo, group(tmp_path / "wide", "9000000", 400_000)) == 1_024_000
    assert available_memory(meminfo, group(tmp_path / "unlimited", "max", 400_000)) == 1_024_000


def test_more_than_there_is_gets_a_sentence(monkeypatch):
    monkeypatch.setattr("utils.memory.available_memory", lambda: 3 << 30)
    require_memory(3 << 30, "a batch", "use less")
    with pytest.raises(UserError, match=r"^a batch takes 2.0 TiB of memory, and 3.0 GiB are free; use less\.$"):
        require_memory(2 << 40, "a batch", "use less")
