import numpy as np
import pytest
import shapes
import small_corruptions


@pytest.mark.parametrize("corruption", small_corruptions.CORRUPTIONS)
def test_corruptions_grow_with_severity_and_leave_something_to_see(corruption):
    photos = [next(iter(shapes.images(0, "val", label, 0).values()))[4:60, 4:60] for label in range(10)]
    changes = []
    for severity in range(1, 6):
        made = [small_corruptions.corrupt(np.random.default_rng(0), photo, corruption, severity) for photo in photos]
        assert all(image.shape == (56, 56, 3) and image.dtype == np.uint8 and image.std() > 2 for image in made)
        changes.append(np.mean([np.abs(image - photo.astype(float)).mean() for image, photo in zip(made, photos)]))
    assert changes[0] > 1 and all(np.diff(changes) > 0), changes
