"""Corruptions obey the laws that a comparison over severities needs, at the sizes of digits and of photographs."""

import sys
from itertools import pairwise

import pytest
import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from ftp.finetuning.corruptions import CORRUPTIONS, SEVERITIES, corruption

SHAPES = [(6, 1, 8, 8), (4, 1, 28, 28), (2, 3, 40, 56), (2, 3, 224, 224)]
DETERMINISTIC = {"gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
# The distance that each severity makes to two photographs of scikit-learn, of 224 x 224 pixels, each in two crops: the root of the mean
# square, by `imagecorruptions-imaug` 1.1.5, the published code, mean of 3 seeds.
PUBLISHED = {
    "gaussian_noise": (0.0742, 0.1080, 0.1551, 0.2126, 0.2869),
    "shot_noise": (0.0762, 0.1138, 0.1587, 0.2334, 0.2897),
    "impulse_noise": (0.1040, 0.1477, 0.1811, 0.2482, 0.3136),
    "gaussian_blur": (0.0409, 0.0617, 0.0734, 0.0814, 0.0929),
    "defocus_blur": (0.0593, 0.0673, 0.0794, 0.0871, 0.0937),
    "motion_blur": (0.0655, 0.0815, 0.0979, 0.1139, 0.1249),
    "zoom_blur": (0.0898, 0.1022, 0.1084, 0.1177, 0.1254),
    "brightness": (0.0726, 0.1381, 0.1969, 0.2547, 0.3094),
    "contrast": (0.1745, 0.2036, 0.2327, 0.2618, 0.2762),
    "pixelate": (0.0407, 0.0450, 0.0539, 0.0635, 0.0674),
    "jpeg_compression": (0.0419, 0.0462, 0.0490, 0.0562, 0.0637),
}


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pictures(shape: tuple[int, ...]) -> Tensor:
    """Pictures with structure of all sizes, from black to white."""
    structure = [interpolate(torch.rand(*shape[:2], size, size) / size**0.5, shape[2:], mode="bilinear") for size in (2, 5, 13, 31, 101)]
    images = sum(structure).float()
    low, high = images.aminmax()
    return (images - low) / (high - low)


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).square().mean((1, 2, 3)).sqrt().mean())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_laws(name, shape):
    images = pictures(shape)
    original = images.clone()
    distances = []
    for severity in SEVERITIES:
        corrupted = CORRUPTIONS[name](images, severity, generator())
        assert (corrupted.shape, corrupted.dtype) == (images.shape, torch.float32)
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        torch.testing.assert_close(corrupted, CORRUPTIONS[name](images, severity, generator()), rtol=0, atol=0)
        torch.testing.assert_close(images, original, rtol=0, atol=0)
        other = CORRUPTIONS[name](images, severity, generator(1))
        assert torch.equal(corrupted, other) == (name in DETERMINISTIC)
        many = images.repeat(10, 1, 1, 1) if name == "fog" else images  # clouds differ much
        distances.append(distance(CORRUPTIONS[name](many, severity, generator()), many))
    assert distances[0] > 1e-3
    assert distances[-1] > 1.15 * distances[0]
    for weaker, stronger in pairwise(distances):
        assert stronger >= (0.97 if name == "fog" else 1) * weaker  # two severities of fog differ by its roughness alone


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_image_looks_at_another(name):
    images = pictures((3, 3, 32, 32))
    if name in DETERMINISTIC:
        alone = torch.cat([CORRUPTIONS[name](image[None], 3, generator()) for image in images])
        torch.testing.assert_close(CORRUPTIONS[name](images, 3, generator()), alone)
    first = CORRUPTIONS[name](images, 3, generator())
    changed = torch.cat([images[:1], 1 - images[1:]])
    if name != "shot_noise":  # how much a Poisson draw takes of the generator depends on its rate
        torch.testing.assert_close(CORRUPTIONS[name](changed, 3, generator())[0], first[0])


@pytest.mark.parametrize("name", ["brightness", "contrast", "gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "pixelate", "fog"])
def test_gray_is_color_with_equal_channels(name):
    gray = pictures((2, 1, 24, 24))
    torch.testing.assert_close(
        CORRUPTIONS[name](gray.expand(-1, 3, -1, -1), 4, generator()), CORRUPTIONS[name](gray, 4, generator()).expand(-1, 3, -1, -1)
    )


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "contrast", "pixelate"])
@pytest.mark.parametrize("size", [1, 8, 50])
def test_a_plain_image_stays_as_it_is(name, size):
    images = torch.full((1, 3, size, size), 0.3, dtype=torch.float32)
    torch.testing.assert_close(CORRUPTIONS[name](images, 5, generator()), images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_of_one_pixel_and_one_of_black(name):
    for images in (torch.rand(1, 1, 1, 1).float(), torch.zeros(1, 3, 9, 5).float()):
        assert CORRUPTIONS[name](images, 5, generator()).isfinite().all()


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "brightness"])
def test_a_small_image_suffers_as_its_enlargement(name):
    small = pictures((2, 3, 28, 28))
    large = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    for severity in SEVERITIES:
        reference = CORRUPTIONS[name](large, severity, generator()).unflatten(2, (28, 8)).unflatten(4, (28, 8)).mean((3, 5))
        result = CORRUPTIONS[name](small, severity, generator())
        assert distance(result, reference) < (0.6 if name == "zoom_blur" else 0.12) * distance(small, reference)


def test_distances_are_those_of_the_published_code():
    images = photographs()
    for name, published in PUBLISHED.items():
        for severity in SEVERITIES:
            ours = sum(distance(CORRUPTIONS[name](images, severity, generator(seed)), images) for seed in range(3)) / 3
            assert ours == pytest.approx(published[severity - 1], rel=0.06), (name, severity)


def photographs() -> Tensor:
    """Square crops, left and right, of the two photographs of scikit-learn."""
    import numpy
    from PIL import Image
    from sklearn.datasets import load_sample_images

    crops = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels)
        side = image.height
        for left in (0, image.width - side):
            crops.append(numpy.array(image.crop((left, 0, left + side, side)).resize((224, 224), Image.Resampling.BICUBIC)))
    return torch.tensor(numpy.stack(crops)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5, 3.0, "3", None])
def test_a_severity_out_of_range_is_refused(severity):
    with pytest.raises(ValueError, match=r"severity=.* must be a whole number from 1 to 5"):
        CORRUPTIONS["fog"](pictures((1, 1, 8, 8)), severity, generator())


def test_an_unknown_name_is_refused():
    assert corruption("fog") is CORRUPTIONS["fog"]
    with pytest.raises(ValueError, match=r"corruption 'snow' is unknown: choose from gaussian_noise, .*jpeg_compression"):
        corruption("snow")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 8, dtype=torch.float64), "float64.* must have shape .* float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8.* must have shape"),
        (torch.rand(3, 8, 8, dtype=torch.float32), r"\(3, 8, 8\).* must have shape \(n, c, h, w\) with c = 1 or 3"),
        (torch.rand(2, 4, 8, 8, dtype=torch.float32), "c = 1 or 3"),
        (torch.rand(0, 3, 8, 8, dtype=torch.float32), "must have shape"),
        (
            torch.full((1, 1, 2, 2), 1.5, dtype=torch.float32),
            r"from 1.5 to 1.5 must be in \[0, 1\]: corrupt them before",
        ),
        (torch.full((1, 1, 2, 2), torch.nan, dtype=torch.float32), "must be in"),
    ],
)
def test_images_that_are_none_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        CORRUPTIONS["contrast"](images, 1, generator())


def test_the_extra_with_pillow_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r'^pillow is not installed: pip install "hyperopt-nested\[finetune\]"$'):
        CORRUPTIONS["jpeg_compression"](pictures((1, 1, 8, 8)), 1, generator())
