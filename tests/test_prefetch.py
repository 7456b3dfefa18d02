"""Images decoded ahead: the same tensors, each once, and errors where the image is used."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

import prefetch
from common import BadInput
from data import Record
from formats import checkpoints
from prefetch import Prefetch


class Decoder:
    """An image n becomes a tensor of 10 numbers n; notes who decoded what."""

    def __init__(self):
        self.calls, self.threads = [], set()

    def __call__(self, n):
        self.calls.append(n)
        self.threads.add(threading.current_thread().name)
        if n == 13:
            raise BadInput("image 13 is torn.")
        return torch.full((10,), float(n)), (n, n)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_what_is_decoded_ahead_is_what_is_asked_for(workers):
    decode = Decoder()
    ahead = Prefetch(decode, workers)
    ahead.expect([*range(12), None, *range(12)])
    for n in [*range(12), 3, 20]:
        pixels, size = ahead.get(n)
        assert pixels.tolist() == [n] * 10 and size == (n, n)
    assert sorted(decode.calls) == [*range(12), 20], "each once; 20 was not expected"
    here = threading.current_thread().name
    assert (decode.threads - {here} != set()) == (workers > 0)


def test_another_number_of_workers_is_another_pool():
    """Also after the first use, and 0: then the threads stop."""
    decode = Decoder()
    ahead = Prefetch(decode, 1)
    for workers, first in ((1, 0), (3, 20), (0, 40), (2, 60)):
        ahead.workers = workers
        ahead.expect(range(first, first + 6))
        assert len(ahead.begun) == (6 if workers else 0)
        assert not workers or ahead.pool._max_workers == workers
        assert [ahead.get(n)[1][0] for n in range(first, first + 6)] == [*range(first, first + 6)]
    assert sorted(decode.calls) == [n + i for n in (0, 20, 40, 60) for i in range(6)]


def test_an_error_is_raised_where_its_image_is_asked_for():
    ahead = Prefetch(Decoder())
    ahead.expect([11, 12, 13, 14])
    assert ahead.get(11)[1] == (11, 11) and ahead.get(12)[1] == (12, 12)
    with pytest.raises(BadInput, match="image 13 is torn"):
        ahead.get(13)
    assert ahead.get(14)[1] == (14, 14)


def test_no_more_than_some_are_decoded_ahead_and_kept(monkeypatch):
    monkeypatch.setattr(prefetch, "AHEAD", 3)
    decode = Decoder()
    ahead = Prefetch(decode, 2, kept_bytes=90)  # two images of 40 bytes
    ahead.expect(range(100))
    for future in ahead.begun.values():
        future.result()
    assert sorted(decode.calls) == [0, 1, 2]
    ahead.get(0), ahead.get(1), ahead.get(0), ahead.get(2)
    assert list(ahead.kept) == [0, 2] and ahead.bytes == 80, "1 was asked for longest ago"
    ahead.expect([7, 8])
    assert set(ahead.begun) == {7, 8}, "what is expected no more makes room"


def test_batches_are_the_same_with_and_without_threads(checkpoint, tmp_path):
    examples, batches = [], []
    rng = np.random.default_rng(0)
    for i in range(6):
        noise = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    for workers in (0, 3):
        _, processor = checkpoints.load(checkpoint)
        processor.prefetch.workers = workers
        records = [
            Record(f"row {i}", tmp_path / f"{i}.png", ("What?",), ("A", "B")) for i in range(6)
        ]
        examples = [processor.encode(record) for record in records]
        processor.prefetch.expect([e.record.image for e in examples])
        batches.append(processor.collate(examples).pixel_values)
    assert torch.equal(*batches) and len(batches[0].unique()) > 500, "it is noise"
