from __future__ import annotations

import copy
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from qface.data.augmentation import AugmentationConfig
from qface.data.images import ImageSource, TensorImages
from qface.distillation import LR_PER_RMS_DISTANCE, DistillConfig, check_run
from qface.distillation import distill as distill_with_progress
from qface.distillation.batches import batches_of
from qface.distillation.distill_config import MIN_STEPS
from qface.errors import CheckpointError, ConfigError, ExportError, ImagesError, TrainingError
from qface.files import alone_in
from qface.parallel import Parallel, SingleProcess
from qface.preprocessing import Preprocessing, with_preprocessing
from qface.progress import Lines, displayed

from .networks import CPU, WIDE, Interrupted, changed, face_images, log, same_weights, tiny_network, weights


def distill(*arguments: Any, **options: Any) -> nn.Module:
    return distill_with_progress(*arguments, progress=False, **options)


# Learning


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_teacher_in_another_type_teaches_the_same(dtype: torch.dtype) -> None:
    first, second = tiny_network(0), tiny_network(0)
    distill(first, tiny_network(1), face_images(), CPU)
    distill(second, tiny_network(1).to(dtype), face_images(), CPU)
    for one, other in zip(weights(first), weights(second), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    assert {value.dtype for value in second.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"losses": {"embedding_loss": None}},
        {"losses": {"embedding_loss": "mse", "ekd_weight": 0.0}},
        {"losses": {"ekd_surrogate": "linear"}},
        {"optimizer": {"name": "adamw", "learning_rate": 0.01}},
        {"optimizer": {"name": "relative_adam", "learning_rate": 0.02}},
        {"losses": {"class_head": True}},
        {"optimizer": {"max_gradient_norm": 1.0}},
    ],
    ids=str,
)
def test_the_student_comes_closer_to_the_teacher(options: dict[str, Any], tmp_path: Path) -> None:
    config = changed(CPU, epochs=15, horizontal_flip=False, schedule={"name": "constant"}, **options)
    distill(tiny_network(0), tiny_network(1), face_images(), config, tmp_path)
    losses = [record["loss"] for record in log(tmp_path)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_loss_of_the_class_head_has_a_weight(tmp_path: Path) -> None:
    terms = []
    for weight in (1.0, 0.25):
        config = changed(CPU, losses={"class_head": True, "class_head_weight": weight}, max_steps=1)
        distill(tiny_network(0), tiny_network(1), face_images(), config, tmp_path / str(weight))
        terms.append(log(tmp_path / str(weight))[0]["class_head"])
    assert terms[1] == pytest.approx(0.25 * terms[0])


def test_the_student_comes_back_trained_in_place_and_the_teacher_unchanged() -> None:
    student, teacher = tiny_network(0), tiny_network(1)
    before, taught = weights(teacher), copy.deepcopy(student)
    assert distill(student, teacher, face_images(), CPU) is student
    assert not same_weights(student, taught)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(teacher), strict=True))
    assert all(parameter.grad is None for parameter in [*student.parameters(), *teacher.parameters()])


def test_each_network_sees_the_crop_it_wants() -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return self.scale * images.mean((2, 3))

    crops = torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    student = with_preprocessing(Recorder(), Preprocessing(size=(8, 8), color="BGR"))
    distill(student, Recorder(), crops, changed(CPU, batch_size=4, max_steps=1))
    teacher_view, student_view = seen[-2:]
    assert tuple(student_view.shape[2:]) == (8, 8)
    assert tuple(teacher_view.shape[2:]) == (112, 112)
    small = nn.functional.interpolate(teacher_view.flip(1), (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(student_view, small, atol=1e-5, rtol=0)


class Seen(nn.Module):
    """A network that keeps how the images that it saw lay in memory; ``across`` takes a view across their channels."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.across, self.linear, self.formats = across, nn.Linear(192, 8), list[bool]()
        with_preprocessing(self, WIDE)

    def forward(self, images: Tensor) -> Tensor:
        self.formats.append(images.is_contiguous(memory_format=torch.channels_last))
        return self.linear(images.view(len(images), -1) if self.across else images.flatten(1))


@pytest.mark.parametrize("crossing", ["neither", "student", "teacher"])
def test_networks_read_channels_last_where_both_can(crossing: str) -> None:
    student, teacher = Seen(crossing == "student"), Seen(crossing == "teacher")
    before = weights(student)
    distill(student, teacher, face_images(), changed(CPU, max_steps=2))
    assert student.formats[-2:] == teacher.formats[-2:] == [crossing == "neither"] * 2
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(student), strict=True))


def test_ekd_alone_takes_embeddings_of_different_length() -> None:
    student = tiny_network(0, size=6)
    before = copy.deepcopy(student)
    distill(student, tiny_network(1), face_images(), changed(CPU, losses={"embedding_loss": None}))
    assert not same_weights(student, before)


def test_an_embedding_loss_refuses_embeddings_of_different_length_before_it_trains() -> None:
    student = tiny_network(0, size=6)
    before = copy.deepcopy(student)
    with pytest.raises(TrainingError, match=r"6 values \(student\) and 8 \(teacher\)"):
        distill(student, tiny_network(1), face_images(), CPU)
    assert same_weights(student, before)


# Images of all kinds


def test_unlabeled_images_work_without_positives(tmp_path: Path) -> None:
    distill(tiny_network(0), tiny_network(1), face_images().images, CPU, tmp_path)
    assert all(record["ekd"] > 0 for record in log(tmp_path))


def test_one_person_alone_works() -> None:
    distill(tiny_network(0), tiny_network(1), face_images(people=1, each=8), CPU)


def test_fewer_images_than_a_batch_are_one_batch(tmp_path: Path) -> None:
    distill(
        tiny_network(0),
        tiny_network(1),
        face_images(people=2),
        changed(CPU, batch_size=64, epochs=2),
        tmp_path,
    )
    assert len(log(tmp_path)) == 2


def test_a_single_image_is_refused() -> None:
    with pytest.raises(ImagesError, match="too few"):
        distill(tiny_network(0), tiny_network(1), torch.zeros(1, 3, 8, 8), CPU)


@pytest.mark.parametrize("option", ["class_head", "reference_ekd"])
def test_what_needs_identities_refuses_images_without(option: str) -> None:
    with pytest.raises((ConfigError, TrainingError), match="identit"):
        distill(tiny_network(0), tiny_network(1), face_images().images, changed(CPU, losses={option: True}))


def test_a_class_head_says_what_it_needs_in_the_place_of_a_loader() -> None:
    faces = face_images()
    loader = DataLoader(TensorDataset(faces.images, faces.labels), batch_size=8)
    with pytest.raises(TrainingError, match=r"which a loader does not tell: .* a tensor with labels"):
        distill(tiny_network(0), tiny_network(1), loader, changed(CPU, losses={"class_head": True}))


def test_a_loader_is_read_in_order_with_its_labels(tmp_path: Path) -> None:
    faces = face_images()
    loader = DataLoader(TensorDataset(faces.images, faces.labels), batch_size=8)
    config = changed(CPU, horizontal_flip=False)
    stream = batches_of_loader(loader, config)
    first, second = next(stream), next(stream)
    assert torch.equal(first.images, faces.images[:8])
    assert torch.equal(second.labels, faces.labels[8:16])
    distill(tiny_network(0), tiny_network(1), loader, config, tmp_path)
    assert len(log(tmp_path)) == 12


def batches_of_loader(loader: Any, config: DistillConfig) -> Iterator[Any]:
    from qface.data.images import LoaderImages

    return batches_of(LoaderImages(loader), config, SingleProcess(torch.device("cpu"))).stream(range(2))


def test_a_generator_an_empty_loader_and_strange_batches_are_refused() -> None:
    networks = tiny_network(0), tiny_network(1)
    images = face_images().images
    with pytest.raises(ImagesError, match="one pass"):
        distill(*networks, (images for _ in range(3)), CPU)
    with pytest.raises(ImagesError, match="no batches"):
        distill(*networks, [], CPU)
    with pytest.raises(ImagesError, match="got str"):
        distill(*networks, ["batch"], CPU)
    with pytest.raises(ImagesError, match="labels of shape"):
        distill(*networks, [(images[:8], torch.zeros(8, 2))], CPU)


class InOrder(ImageSource):
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        return iter(face_images().images.split(batch_size))


def test_a_source_of_unknown_length_needs_max_steps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        distill(tiny_network(0), tiny_network(1), InOrder(), CPU)
    distill(tiny_network(0), tiny_network(1), InOrder(), changed(CPU, max_steps=5), tmp_path)
    assert len(log(tmp_path)) == 5


@pytest.mark.parametrize(
    ("images", "max_steps", "expected"),
    [(32, None, MIN_STEPS), (32, 5, 5), (16 * (MIN_STEPS + 2), None, MIN_STEPS + 2), (16 * (MIN_STEPS + 2), 6, 6)],
)
def test_without_a_number_of_epochs_few_images_are_seen_often(
    images: int, max_steps: int | None, expected: int, tmp_path: Path
) -> None:
    faces = face_images(images // 4).images.clamp(-6, 6)
    distill(tiny_network(0), tiny_network(1), faces, changed(CPU, epochs=None, max_steps=max_steps), tmp_path)
    assert len(log(tmp_path)) == expected


def test_a_loader_too_is_read_often_if_it_is_short(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(face_images().images), batch_size=8)
    distill(tiny_network(0), tiny_network(1), loader, changed(CPU, epochs=None), tmp_path)
    assert len(log(tmp_path)) == MIN_STEPS


def test_ranks_read_their_own_halves_of_the_batch_of_one_process() -> None:
    class Rank(SingleProcess):
        def __init__(self, rank: int) -> None:
            super().__init__(torch.device("cpu"))
            self.rank, self.world_size = rank, 2

    def first(parallel: Parallel) -> Any:
        return next(batches_of(face_images(), CPU, parallel).stream(range(3, 4)))

    whole, halves = first(SingleProcess(torch.device("cpu"))), [first(Rank(0)), first(Rank(1))]
    assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
    assert all(torch.equal(whole.labels, half.labels) for half in halves)
    with pytest.raises(ConfigError, match="multiple"):
        batches_of(face_images(), changed(CPU, batch_size=15), Rank(0))


# Modes and schedules


@pytest.mark.parametrize("fails", [False, True])
def test_modes_come_back_as_they_were(fails: bool) -> None:
    student, teacher = tiny_network(0).train(), tiny_network(1).train()
    student[1].eval()
    images = Interrupted(face_images(), reads=4 if fails else 99)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            distill(student, teacher, images, CPU)
    else:
        distill(student, teacher, images, CPU)
    assert [module.training for module in student] == [True, False, True, True, True, True]
    assert all(module.training for module in teacher.modules())


@pytest.mark.parametrize(("steps", "updates"), [(0, 0), (2, 2), (None, 6)])
def test_batch_norm_statistics_freeze_on_schedule(steps: int | None, updates: int) -> None:
    student = tiny_network(0)
    distill(student, tiny_network(1), face_images(), changed(CPU, bn_statistics_steps=steps))
    assert student[1].num_batches_tracked == updates


def test_weight_decay_spares_biases_norms_and_slopes() -> None:
    from qface.distillation.optim import optimizer_for

    student = tiny_network(0)
    groups = optimizer_for(CPU.optimizer, 0.05, student, nn.Module()).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(student[0].weight), id(student[5].weight)}


def test_the_learning_rate_falls_as_a_cosine(tmp_path: Path) -> None:
    distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path)
    rates = [record["learning_rate"] for record in log(tmp_path)]
    assert rates[0] == 0.05
    assert rates[3] == pytest.approx(0.025)
    assert rates == sorted(rates, reverse=True)


def test_the_learning_rate_grows_over_the_warm_up(tmp_path: Path) -> None:
    distill(
        tiny_network(0),
        tiny_network(1),
        face_images(),
        changed(CPU, schedule={"name": "constant", "warmup_steps": 3}),
        tmp_path,
    )
    rates = [record["learning_rate"] for record in log(tmp_path)]
    assert rates == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05])


def test_the_learning_rate_is_in_parts_of_the_distance_where_none_is_given(tmp_path: Path) -> None:
    student, teacher, images = tiny_network(0), tiny_network(1), face_images()
    config = changed(CPU, optimizer={"name": "relative_adam", "learning_rate": None})
    with torch.no_grad():
        found, wanted = (F.normalize(model.eval()(images.images)) for model in (student, teacher))
    distance = float((found - wanted).square().sum(1).mean().sqrt())
    distill(student, teacher, images, config, tmp_path / "run")
    rates = [record["learning_rate"] for record in log(tmp_path / "run")]
    assert rates[0] == pytest.approx(LR_PER_RMS_DISTANCE * distance, rel=1e-4)

    with pytest.raises(KeyboardInterrupt):
        distill(tiny_network(0), teacher, Interrupted(images, reads=4), config, tmp_path / "stopped")
    distill(tiny_network(0), teacher, images, config, tmp_path / "stopped", resume=True)
    assert log(tmp_path / "stopped") == log(tmp_path / "run")


def test_a_frozen_student_and_a_student_that_is_its_own_teacher_are_refused() -> None:
    student = tiny_network(0)
    with pytest.raises(TrainingError, match="deepcopy"):
        distill(student, student, face_images(), CPU)
    with pytest.raises(TrainingError, match="requires a gradient"):
        distill(student.requires_grad_(False), tiny_network(1), face_images(), CPU)
    with pytest.raises(TrainingError, match="no output"):
        distill(with_preprocessing(tiny_network(0)[:2], WIDE), tiny_network(1), face_images(), CPU)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_a_network_that_makes_no_numbers_is_named(broken: str) -> None:
    networks = {"student": tiny_network(0), "teacher": tiny_network(1)}
    nn.init.constant_(networks[broken][5].bias, float("nan"))
    with pytest.raises(TrainingError, match=f"embeddings of the {broken} are not finite"):
        distill(networks["student"], networks["teacher"], face_images(), CPU)


def test_a_loss_that_is_not_finite_names_the_step_and_the_cure() -> None:
    with pytest.raises(TrainingError, match=r"at step \d+: choose a learning_rate below 1e\+30"):
        distill(tiny_network(0), tiny_network(1), face_images(), changed(CPU, optimizer={"learning_rate": 1e30}))


# Run folders


@pytest.mark.parametrize("reads", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize(
    "options", [{}, {"optimizer": {"name": "adamw"}, "losses": {"class_head": True}, "bn_statistics_steps": 3}]
)
def test_a_resumed_run_ends_with_the_same_weights(reads: int, options: dict[str, Any], tmp_path: Path) -> None:
    config = changed(CPU, **options)
    straight, resumed = tiny_network(0), tiny_network(0)
    distill(straight, tiny_network(1), face_images(), config, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        distill(resumed, tiny_network(1), Interrupted(face_images(), reads), config, tmp_path / "stopped")
    resumed = tiny_network(0)
    distill(resumed, tiny_network(1), face_images(), config, tmp_path / "stopped", resume=True)
    assert same_weights(straight, resumed)
    assert log(tmp_path / "straight") == log(tmp_path / "stopped")


@pytest.mark.parametrize("reads", [2, None])
def test_a_run_goes_on_with_more_epochs_than_it_was_begun_with(
    reads: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Finished or stopped; with a constant rate it ends where a long run ends."""
    constant = changed(CPU, schedule={"name": "constant"})
    longer = changed(constant, epochs=CPU.epochs + 2)
    straight, resumed = tiny_network(0), tiny_network(0)
    distill(straight, tiny_network(1), face_images(), longer, tmp_path / "straight")
    images = face_images() if reads is None else Interrupted(face_images(), reads)
    with nullcontext() if reads is None else pytest.raises(KeyboardInterrupt):
        distill(resumed, tiny_network(1), images, constant, tmp_path / "short")
    resumed = tiny_network(0)
    distill(resumed, tiny_network(1), face_images(), longer, tmp_path / "short", resume=True)
    assert same_weights(straight, resumed)
    assert log(tmp_path / "straight") == log(tmp_path / "short")
    assert reads is not None or any("continues to epochs=5" in message for message in caplog.messages)


def test_a_cosine_goes_on_at_the_rates_of_the_longer_schedule(tmp_path: Path) -> None:
    longer = changed(CPU, epochs=CPU.epochs + 1)
    distill(tiny_network(0), tiny_network(1), face_images(), longer, tmp_path / "straight")
    distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path / "short")
    short = len(log(tmp_path / "short"))
    distill(tiny_network(0), tiny_network(1), face_images(), longer, tmp_path / "short", resume=True)
    rates = [[line["learning_rate"] for line in log(tmp_path / run)] for run in ("straight", "short")]
    assert len(rates[0]) == len(rates[1]) and rates[0][short:] == rates[1][short:] != []
    with pytest.raises(ConfigError, match=r"epochs=4.*epochs=3.*more epochs are allowed"):
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path / "short", resume=True)


def test_a_resumed_loader_goes_on_where_it_was(tmp_path: Path) -> None:
    loader = list(face_images().images.split(8))
    straight, resumed = tiny_network(0), tiny_network(0)
    distill(straight, tiny_network(1), loader, CPU)
    with pytest.raises(ImagesError):
        distill(resumed, tiny_network(1), [*loader[:3], "broken"], CPU, tmp_path)
    resumed = tiny_network(0)
    distill(resumed, tiny_network(1), loader, CPU, tmp_path, resume=True)
    assert same_weights(straight, resumed)


@pytest.mark.parametrize("labeled", [True, False])
def test_a_finished_run_returns_its_weights_at_once(labeled: bool, tmp_path: Path) -> None:
    finished, again = tiny_network(0), tiny_network(0)
    images = face_images() if labeled else TensorImages(face_images().images)
    distill(finished, tiny_network(1), images, CPU, tmp_path)
    with pytest.raises(ConfigError, match="resume=True"):
        distill(again, tiny_network(1), Interrupted(images, reads=0), CPU, tmp_path)
    distill(again, tiny_network(1), Interrupted(images, reads=0), CPU, tmp_path, resume=True)
    assert same_weights(finished, again)
    assert len(log(tmp_path)) == 6
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoint.pt", "log.jsonl"}


def test_a_run_folder_is_not_overwritten(tmp_path: Path) -> None:
    distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path)
    with pytest.raises(ConfigError, match="resume=True"):
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path)
    with pytest.raises(ConfigError, match="run_dir"):
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, resume=True)


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    student, teacher, images = tiny_network(0), tiny_network(1), face_images()
    distill(student, teacher, images, CPU, tmp_path)
    others: dict[str, dict[str, Any]] = {
        r"with seed=0, not seed=1": {"seed": 1},
        r"with optimizer.learning_rate=0.05, seed=0, not optimizer.learning_rate=0.1, seed=1": {
            "seed": 1,
            "optimizer": {"learning_rate": 0.1},
        },
        r"with losses.ekd_weight=0.1, not losses.ekd_weight=0.2": {"losses": {"ekd_weight": 0.2}},
        r"with schedule.name='cosine', not schedule.name='constant'": {"schedule": {"name": "constant"}},
        r"with augmentation.misalignment=None": {"augmentation": AugmentationConfig()},
    }
    for cause, fields in others.items():
        with pytest.raises(ConfigError, match=re.escape(cause)):
            distill(student, teacher, images, changed(CPU, **fields), tmp_path, resume=True)
    with pytest.raises(TrainingError, match="student"):
        distill(tiny_network(0, size=9), tiny_network(1, size=9), images, CPU, tmp_path, resume=True)
    with pytest.raises(TrainingError, match="student"):
        distill(tiny_network(5), teacher, images, CPU, tmp_path, resume=True)
    with pytest.raises(TrainingError, match="teacher"):
        distill(student, tiny_network(2), images, CPU, tmp_path, resume=True)
    with pytest.raises(TrainingError, match="images"):
        distill(student, teacher, face_images(people=9), CPU, tmp_path, resume=True)
    with pytest.raises(TrainingError, match="images"):
        distill(student, teacher, TensorImages(1 - images.images, images.labels), CPU, tmp_path, resume=True)
    one_other = images.images.clone()
    one_other[5] += 1
    with pytest.raises(TrainingError, match="images"):
        distill(student, teacher, TensorImages(one_other, images.labels), CPU, tmp_path, resume=True)
    distill(
        student, teacher, images, changed(CPU, checkpoint_every=1, device=None, num_workers=1), tmp_path, resume=True
    )
    begun = distill(tiny_network(0), teacher, images, CPU, tmp_path, resume=True)
    assert same_weights(begun, student)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(ConfigError, match="another run is writing to"):
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_resumed_run_writes_the_same_bytes(tmp_path: Path) -> None:
    config = changed(CPU, optimizer={"name": "relative_adam", "learning_rate": 0.02})
    for name, reads in (("straight", 99), ("stopped", 4)):
        with suppress(KeyboardInterrupt):
            distill(tiny_network(0), tiny_network(1), Interrupted(face_images(), reads), config, tmp_path / name)
    distill(tiny_network(0), tiny_network(1), face_images(), config, tmp_path / "stopped", resume=True)
    for file in ("checkpoint.pt", "log.jsonl"):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_where_a_run_cannot_be_kept_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder" / "log.jsonl").mkdir(parents=True)
    for folder, cause in (
        ("a_file", "not a writable folder"),
        ("a_file/run", "not a writable folder"),
        ("a_folder", r"log\.jsonl"),
    ):
        with pytest.raises(ExportError, match=cause) as caught:
            distill(tiny_network(0), tiny_network(1), tmp_path / "nowhere", CPU, tmp_path / folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "options", "cause"),
    [
        ("cuda:99", {}, "cuda:99"),
        ("cpu", {"resume": True}, "run_dir"),
        ("cpu", {"run_dir": "taken"}, "resume=True"),
        ("cpu", {"run_dir": "taken", "resume": True}, None),
        ("cpu", {"run_dir": "new/run"}, None),
        ("cpu", {}, None),
    ],
    ids=str,
)
def test_a_run_can_be_checked_before_it_begins(
    device: str, options: dict[str, Any], cause: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(CPU, device=device)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "checkpoint.pt").touch()
    monkeypatch.chdir(tmp_path)
    if cause is None:
        check_run(config, **options)
    else:
        with pytest.raises(ConfigError, match=cause):
            check_run(config, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"taken"}


class Spoiling(Interrupted):
    """Puts a folder where the log is, at one of its reads."""

    def __init__(self, images: TensorImages, reads: int, log: Path) -> None:
        super().__init__(images, reads)
        self.path = log

    def read(self, indices: Sequence[int]) -> Tensor:
        try:
            return super().read(indices)
        except KeyboardInterrupt:
            self.path.unlink()
            self.path.mkdir()
            return self.images.read(indices)


def test_a_log_that_cannot_be_written_any_more_is_told_in_a_line(tmp_path: Path) -> None:
    log_file = tmp_path / "log.jsonl"
    with pytest.raises(ExportError, match=r"log\.jsonl: Is a directory"):
        distill(tiny_network(0), tiny_network(1), Spoiling(face_images(), 4, log_file), CPU, tmp_path)


def test_a_log_of_any_bytes_is_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_network(0), tiny_network(1), Interrupted(face_images(), 4), CPU, tmp_path)
    first, *others = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(b"".join([b"\xff\n", *others]))
    distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path, resume=True)
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    assert len(lines) == 6
    assert lines[0] == b"\xff" != first


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_in_a_line_and_costs_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_network(0), tiny_network(1), Interrupted(face_images(), 4), CPU, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with full_disk(len(before) // 2), pytest.raises(ExportError, match=r"checkpoint\.pt") as caught:
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoint.pt", "log.jsonl"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"PK\x03\x04truncated",
        b"\x80\x020.",  # a pickle that pops an empty stack
        b"\x80\x02h\x05.",  # one that names what it has not kept
        b"\x80\x02)b.",
        b"\x80\x02N}R.",
    ],
)
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged"):
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path, resume=True)


def test_a_damaged_byte_is_found_in_each_part(tmp_path: Path) -> None:
    distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = [part for part in archive.infolist() if part.file_size]
    assert len(parts) > 10
    for part in parts:
        lengths = struct.unpack_from("<HH", whole, part.header_offset + 26)  # of the name and of what pads it
        place = part.header_offset + 30 + sum(lengths) + part.file_size // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged"):
            distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path, resume=True)


@pytest.mark.parametrize("found", [None, 1, 3])
def test_a_checkpoint_of_another_format_is_refused_in_one_line(found: int | None, tmp_path: Path) -> None:
    distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved.pop("format") == 2
    assert saved["config"]["losses"]["ekd_weight"] == 0.1
    torch.save(saved if found is None else saved | {"format": found}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=f"has format {found or 1}, but .* resumes format 2: finish") as caught:
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of a distillation"):
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("part", "value", "cause"),
    [
        ("config", [], "no checkpoint"),
        ("config", {"seed": torch.zeros(2)}, "no checkpoint"),
        ("inputs", "word", "no checkpoint"),
        ("format", torch.zeros(2), "no checkpoint"),
        ("state", None, "no checkpoint"),
        ("state", {"step": "two"}, "no checkpoint"),
        ("state", {"step": 2, "total": 6, "student": {}, "objective": {}}, "no checkpoint"),
        ("state", {"step": 2, "total": 6, "student": {}, "objective": {}, "optimizer": {}}, "damaged"),
        ("state", {"step": 6, "total": 6, "student": {}, "objective": {}, "optimizer": {}}, "damaged"),
    ],
    ids=str,
)
def test_a_checkpoint_of_other_types_is_named(part: str, value: Any, cause: str, tmp_path: Path) -> None:
    distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**saved, part: value}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=cause) as caught:
        distill(tiny_network(0), tiny_network(1), face_images(), CPU, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_each_step_says_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with displayed(Lines(lines.append, interval=0)):
        distill_with_progress(tiny_network(0), tiny_network(1), face_images(), CPU)
    assert capsys.readouterr().out == ""
    assert any("6/6" in line and "loss" in line for line in lines)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_brings_the_networks_back_to_the_cpu(tmp_path: Path) -> None:
    student, teacher = tiny_network(0), tiny_network(1)
    before = copy.deepcopy(student)
    distill(student, teacher, face_images(), changed(CPU, device=None, losses={"class_head": True}), tmp_path)
    assert {parameter.device.type for network in (student, teacher) for parameter in network.parameters()} == {"cpu"}
    assert not same_weights(student, before)
    resumed = distill(
        tiny_network(0), teacher, face_images(), changed(CPU, losses={"class_head": True}), tmp_path, resume=True
    )
    assert same_weights(student, resumed)


def test_tensor_images_may_carry_labels_that_have_gaps() -> None:
    faces = face_images()
    images = TensorImages(faces.images, faces.labels * 3)
    distill(tiny_network(0), tiny_network(1), images, changed(CPU, losses={"class_head": True}))


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(face_images().images)


def test_a_loader_without_a_length_trains_for_max_steps(tmp_path: Path) -> None:
    loader = DataLoader(Endless(), batch_size=8)
    distill(tiny_network(0), tiny_network(1), loader, changed(CPU, max_steps=6), tmp_path)
    assert len(log(tmp_path)) == 6
    with pytest.raises(ConfigError, match="set max_steps"):
        distill(tiny_network(0), tiny_network(1), loader, CPU)


def test_a_loader_that_runs_dry_is_an_error() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = iter(face_images().images.split(8))

        def __iter__(self) -> Iterator[Tensor]:
            return self.left

    with pytest.raises(ImagesError, match="yields no batches of two"):
        distill(tiny_network(0), tiny_network(1), Once(), changed(CPU, max_steps=20))


def test_a_last_batch_of_one_image_is_passed_over(tmp_path: Path) -> None:
    student = with_preprocessing(nn.Sequential(*tiny_network(0), nn.BatchNorm1d(8)), WIDE)
    images = face_images().images
    distill(student, tiny_network(1), [images[:8], images[8:16], images[16:17]], CPU, tmp_path)
    assert len(log(tmp_path)) == 3 * CPU.epochs
    with pytest.raises(ImagesError, match="yields no batches of two"):
        distill(student, tiny_network(1), images.split(1), CPU)


class Dropping(nn.Module):
    """Drops half of its features by chance, in a function that no mode of a layer switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_network(0)
        with_preprocessing(self, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.network(x), 0.5, self.training)


def test_what_a_network_draws_follows_from_the_seed(tmp_path: Path) -> None:
    def trained(rng: int, **options: Any) -> nn.Module:
        torch.manual_seed(rng)
        return distill(Dropping(), tiny_network(1), face_images(), changed(CPU, **options))

    assert same_weights(trained(0), trained(1))
    assert not same_weights(trained(0), trained(0, seed=1, horizontal_flip=False))
    stopped, resumed = Dropping(), Dropping()
    with pytest.raises(KeyboardInterrupt):
        distill(stopped, tiny_network(1), Interrupted(face_images(), 4), CPU, tmp_path)
    torch.manual_seed(2)
    distill(resumed, tiny_network(1), face_images(), CPU, tmp_path, resume=True)
    assert same_weights(resumed, trained(0))


@pytest.mark.parametrize("labels", [torch.tensor([-1] * 32), torch.rand(32)])
def test_labels_that_are_no_identities_are_refused(labels: Tensor) -> None:
    with pytest.raises(ImagesError, match="integers >= 0"):
        TensorImages(face_images().images, labels)
    loader = DataLoader(TensorDataset(face_images().images, labels), batch_size=8)
    with pytest.raises(ImagesError, match="integers >= 0"):
        distill(tiny_network(0), tiny_network(1), loader, CPU)


def test_labels_of_any_integer_type_will_do() -> None:
    faces = face_images()
    assert faces.labels is not None
    config = changed(CPU, losses={"class_head": True})
    small = TensorImages(faces.images, faces.labels.to(torch.int32))
    wide = distill(tiny_network(0), tiny_network(1), faces, config)
    assert same_weights(distill(tiny_network(0), tiny_network(1), small, config), wide)
