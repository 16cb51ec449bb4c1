import pytest
import torch

from qface.data import LoaderImages, TensorImages, normalize
from qface.errors import ImagesError
from qface.preprocessing import Preprocessing


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(0, 3, 112, 112),
        torch.zeros(3, 112, 112),
        torch.zeros(2, 1, 112, 112),
        torch.zeros(2, 3, 96, 112, dtype=torch.uint8),
        torch.zeros(2, 3, 112, 112, dtype=torch.int64),
    ],
)
def test_tensor_of_wrong_shape_or_type_is_refused(images):
    with pytest.raises(ImagesError):
        TensorImages(images)


def test_tensor_needs_one_label_an_image():
    with pytest.raises(ImagesError, match="2 images need 2 labels"):
        TensorImages(torch.zeros(2, 3, 8, 8), torch.zeros(3))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_tensor_batches_give_each_image_once_in_order(batch_size):
    images = torch.arange(5).float().view(5, 1, 1, 1).expand(5, 3, 2, 2)
    batches = list(TensorImages(images).batches(batch_size))
    assert all(len(batch) <= batch_size for batch in batches)
    assert torch.equal(torch.cat(batches), images)


def test_tensor_reads_in_any_order():
    images = torch.arange(5).float().view(5, 1, 1, 1).expand(5, 3, 2, 2)
    assert TensorImages(images).read([4, 0, 4])[:, 0, 0, 0].tolist() == [4, 0, 4]


def test_loader_passes_tensors_and_first_elements():
    batch = torch.zeros(2, 3, 4, 4)
    assert [b.shape for b in LoaderImages([batch, (batch, torch.zeros(2)), [batch]]).batches(1)] == [batch.shape] * 3


def test_loader_of_other_things_is_refused():
    with pytest.raises(ImagesError, match="not str"):
        list(LoaderImages(["face.png"]).batches(1))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 112, 112, dtype=torch.uint8), "wrap it in a DataLoader"),
        (torch.zeros(2, 3, 160, 160, dtype=torch.uint8), "these are 160x160"),
        (torch.zeros(2, 1, 112, 112, dtype=torch.uint8), r"\[N, 3, height, width\]"),
        (torch.zeros(2, 112, 112, 3), r"\[N, 3, height, width\]"),
        (torch.zeros(2, 3, 112, 112, dtype=torch.int64), "not torch.int64"),
    ],
)
def test_batches_of_a_loader_are_held_to_what_tensors_are(batch, message):
    with pytest.raises(ImagesError, match=message):
        list(LoaderImages([(batch, 0)]).batches(1))


def test_normalize_touches_bytes_only():
    floats = torch.rand(1, 3, 112, 112)
    assert normalize(floats, Preprocessing()) is floats
    white = torch.full((1, 3, 112, 112), 255, dtype=torch.uint8)
    assert torch.equal(normalize(white, Preprocessing()), torch.ones(1, 3, 112, 112))
