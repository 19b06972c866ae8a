"""The pool of output memory of the CPU backend."""

import torch

import spectral_ext
from spectral_ext.backends import cpu


def outputs(size):
    return cpu.allocate([torch.empty(size, 1024)], [0])[0][0]


def test_memory_is_reused_and_given_back():
    spectral_ext.empty_cache()
    first = outputs(512)  # 2 MiB
    address = first.data_ptr()
    assert address % 64 == 0
    kept = outputs(512)
    assert kept.data_ptr() != address
    del first
    assert outputs(512).data_ptr() == address
    assert spectral_ext.empty_cache() >= 2 << 20
    assert spectral_ext.empty_cache() == 0
    kept.fill_(1)  # still ours
    assert kept.sum() == kept.numel()


def test_pool_holds_no_more_than_was_in_use():
    spectral_ext.empty_cache()
    for size in (512, 640, 768):  # one after the other, no two at a time
        outputs(size)
    assert spectral_ext.empty_cache() <= 3 << 20
